"""What is taken along to a machine without a network: what is in it, and that imports come from it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_suite import bundle

ROOT = Path(__file__).resolve().parents[2]
THIS = "{}.{}".format(*sys.version_info)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A bundle for this Python, in a tree that is where the real one is not, with nothing compiled in it."""
    tree = tmp_path / "tree"
    for name in ("distill_kernels", "python", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    monkeypatch.setattr(bundle, "ROOT", tree)
    made = tree / "build" / "gpu-bundle"
    bundle.link(made)
    (made / bundle.MANIFEST).write_text(json.dumps({"python": THIS, "sources": "", "extension": "_cuda.so", "chip": "90a"}))
    return made


def test_package_is_imported_from_the_bundle_without_an_installation(folder):
    (folder / "distill_kernels" / "_cuda.py").write_text("divergences = ['from the bundle']")
    program = f"""
import sys
sys.path[:] = [path for path in sys.path if path]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, {str(folder.parents[1])!r})
from benchmarks.gpu_suite import bundle
bundle.use()
import distill_kernels, distill_kernels.api.losses.distillation as loss
from distill_kernels.backends.cuda import extension
print(distill_kernels.__file__, loss.__file__, extension.kernels.divergences[0], sep="|")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env={"PATH": os.environ["PATH"]})
    assert ran.returncode == 0, ran.stderr
    package, loss, divergence = ran.stdout.strip().split("|")
    assert Path(package).is_relative_to(folder) and Path(loss).is_relative_to(folder) and divergence == "from the bundle"


def test_links_hold_where_the_tree_is_copied_to(folder, tmp_path):
    copied = tmp_path / "elsewhere"
    shutil.copytree(folder.parents[1], copied, symlinks=True)
    shutil.rmtree(folder.parents[1])
    package = copied / "build" / "gpu-bundle" / "distill_kernels"
    assert (package / "api" / "losses").resolve() == copied / "python" / "losses" and (package / "__init__.py").exists()


def test_bundle_for_another_python_is_not_used(folder, monkeypatch):
    monkeypatch.setattr(bundle, "FOLDER", folder)
    (folder / bundle.MANIFEST).write_text(json.dumps({"python": "2.7"}))
    before = list(sys.path)
    bundle.use()
    assert sys.path == before and bundle.describe() == "none"
    assert bundle.why_outdated() is None  # the package is installed here


def test_bundle_of_other_sources_is_refused(folder, monkeypatch):
    monkeypatch.setattr(bundle, "FOLDER", folder)
    monkeypatch.setattr(bundle, "ROOT", ROOT)
    assert "make gpu-bundle" in bundle.why_outdated()
    (folder / bundle.MANIFEST).write_text(json.dumps({"python": THIS, "sources": bundle.sources()}))
    assert bundle.why_outdated() is None


@pytest.mark.exhaustive
def test_bundle_has_the_extension_of_its_chip_and_the_peers(tmp_path):
    """And the extension loads in its Python, without a GPU, a driver or torch."""
    try:
        python = bundle.interpreter()
    except SystemExit as error:
        pytest.skip(str(error))
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is no nvcc")
    made = bundle.build(tmp_path / "gpu-bundle")
    folder = tmp_path / "gpu-bundle"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    assert size <= bundle.MOST_BYTES and made["sources"] == bundle.sources()
    assert {"distill_kernels", "liger_kernel", "cut_cross_entropy", bundle.MANIFEST} <= {path.name for path in folder.iterdir()}
    extension = bundle.extension_in(folder)
    assert "cpython-312" in extension.name
    said = subprocess.run([python, "-c", bundle.LOADS, str(extension)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    cuobjdump = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    if not Path(cuobjdump).exists():
        from triton.backends import nvidia

        cuobjdump = str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")
    listed = subprocess.run([cuobjdump, "--list-elf", str(extension)], capture_output=True, text=True).stdout
    assert "sm_90a" in listed and "sm_80" not in listed and "sm_100" not in listed
