"""What leaves the source tree: wheels with and without a compiler, and the source archive."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from distill_kernels.backends import native

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pybind11")

ROOT = Path(__file__).resolve().parents[2]
CLEAR_MESSAGE = r"distill_kernels: the compiled CPU kernels could not be built .*\n *The installation goes on .* torch backend"
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


@pytest.fixture
def tree(tmp_path):
    """A copy of the tree as git would commit it now."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the source tree is not a git checkout")
    for name in set(listed.stdout.split("\0")) - {""}:
        if (ROOT / name).is_file():  # not deleted since
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def compiled(tree):
    """The tree with the extension that the tests run with, as its own build would have left it: made from the same sources. Compiling it
    takes minutes, and set-up has proved that it compiles; the exhaustive test does so once more, in a clean place."""
    library = Path(native._native.__file__) if native._native else None
    if library is None:
        pytest.skip("the compiled extension was not built")
    # As setuptools names the folder.
    folder = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "distill_kernels"
    folder.mkdir(parents=True)
    shutil.copy(library, folder)  # without its times: newer than the sources
    return tree


# Set-up has compiled all this with optimisation.
WITHOUT_OPTIMISATION = """#!/bin/bash
exec c++ "${@/-O3/-O0}"
"""


def run(*arguments, cwd, succeeds=True, **environment):
    # A clean environment: what the machine sets for its own builds must not decide whether these succeed. The CUDA kernels, which take a
    # minute, are built where a test asks for them.
    inherited = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "DISTILL_KERNELS_REQUIRE_NATIVE")}
    inherited |= {"DISTILL_KERNELS_CUDA": "0"}
    made = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=inherited | environment)
    assert (made.returncode == 0) == succeeds, made.stdout + made.stderr
    return made.stdout + made.stderr


def pip(*arguments, cwd, **options):
    """pip, with nothing to fetch."""
    offline = ("--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index")
    return run("-m", "pip", *arguments, *offline, cwd=cwd, **options)


def hook(tree, name, out, **options):
    """A build hook of PEP 517, called directly. Returns the path of what it made, and the output."""
    out.mkdir(exist_ok=True)
    program = f"from setuptools import build_meta; print('MADE', build_meta.{name}({str(out)!r}))"
    output = run("-c", program, cwd=tree, **options)
    return out / re.findall(r"^MADE (.+)$", output, re.MULTILINE)[-1], output


def compiler():
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("there is no C++ compiler here")


LOSS = """
import sys
site, target = sys.argv[1:]
sys.path[:0] = [target, site]
import torch
import distill_kernels
assert distill_kernels.__file__.startswith(target), distill_kernels.__file__
hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
loss = distill_kernels.distillation_loss(hidden, head, torch.randn(4, 6), torch.randn(30, 6))
loss.backward()
assert loss.isfinite() and head.grad.any()
reasons = distill_kernels.doctor()
print("NATIVE", "ready" if reasons["native"] is None else reasons["native"])
"""


def loss_of_installation(target):
    """Runs the loss from an installation in `target`, apart from the one that runs these tests."""
    packages = Path(torch.__file__).resolve().parents[1]
    output = run("-S", "-c", LOSS, packages, target, cwd="/")
    return re.search(r"^NATIVE (.*)$", output, re.MULTILINE)[1]


def test_wheel_holds_the_packages_the_extension_and_working_entry_points(compiled, tmp_path):
    # With a compiler that fails: what is there is not to be compiled again.
    check_wheel(compiled, tmp_path, **NO_COMPILER)


@pytest.mark.exhaustive
def test_wheel_compiles_the_extension(tree, tmp_path):
    compiler()
    wrapper = tmp_path / "c++"
    wrapper.write_text(WITHOUT_OPTIMISATION)
    wrapper.chmod(0o755)
    check_wheel(tree, tmp_path, CC=str(wrapper), CXX=str(wrapper))


def check_wheel(tree, tmp_path, **environment):
    sources = [name for name in files_of(tree) if not name.startswith("build/")]
    pip("wheel", ".", "--wheel-dir", tmp_path / "out", cwd=tree, DISTILL_KERNELS_REQUIRE_NATIVE="1", **environment)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next((archive.read(n).decode() for n in names if n.endswith("entry_points.txt")), "")
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        archive.extractall(tmp_path / "installed")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert f"distill_kernels/_native{suffix}" in names
    for name in sources:
        folder, _, rest = name.partition("/")
        if name.endswith(".py") and folder in ("distill_kernels", "python"):
            assert f"{'distill_kernels' if folder == 'distill_kernels' else 'distill_kernels/api'}/{rest}" in names
    assert "distill_kernels/py.typed" in names  # by which a type checker takes the annotations
    # Only what is imported: no tests, no sources of the extension, no second top-level package.
    assert {n.partition("/")[0] for n in names} == {"distill_kernels", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert not [n for n in names if n.endswith((".cpp", ".h", ".inc"))]
    assert any(n.endswith("LICENSE") for n in names)
    assert "Requires-Dist: torch" in metadata
    assert loss_of_installation(tmp_path / "installed") == "ready"
    for module in re.findall(r"^[\w-]+ *= *([\w.]+):\w+", entry_points, re.MULTILINE):
        path = module.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & names, f"the script of {module} has no module"


def test_installation_without_a_compiler_says_so_and_runs_on_torch(tree, tmp_path):
    target = tmp_path / "installed"
    output = pip("install", ".", "-v", "--target", target, cwd=tree, **NO_COMPILER)
    assert re.search(CLEAR_MESSAGE, output)
    assert "Traceback" not in output
    assert not list(target.rglob("_native*"))
    assert re.match(r"the compiled extension is missing .* install a C\+\+17 compiler", loss_of_installation(target))


@pytest.mark.exhaustive
def test_build_without_a_compiler_fails_where_native_is_required(tree, tmp_path):
    out = tmp_path / "out"
    output = pip("wheel", ".", "--wheel-dir", out, cwd=tree, succeeds=False, **NO_COMPILER, DISTILL_KERNELS_REQUIRE_NATIVE="1")
    assert not list(out.glob("*.whl"))
    assert "/bin/false" in output


@pytest.mark.parametrize("path", ["/bin/false", "/nowhere/at/all/c++"])
@pytest.mark.exhaustive
def test_editable_build_without_a_compiler_goes_on(tree, tmp_path, path):
    """The path that copies the extension back into the tree, which must not look for what was not made."""
    wheel, output = hook(tree, "build_editable", tmp_path / "out", CC=path, CXX=path)
    assert re.search(CLEAR_MESSAGE, output) and wheel.is_file()
    assert not list(tree.rglob("*.so"))


def test_source_archive_builds_by_itself(tree, tmp_path):
    sources = files_of(tree)
    archive, _ = hook(tree, "build_sdist", tmp_path / "out")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()} - {""}
        opened.extractall(tmp_path / "unpacked", filter="data")
    wanted = [n for n in sources if n.startswith(("csrc/", "python/", "distill_kernels/", "tests/"))]
    wanted += ["pyproject.toml", "setup.py", "README.md", "LICENSE"]
    assert not [name for name in wanted if name not in names]
    assert {"csrc/params.h", "csrc/generated/divergences.h", "csrc/bindings.cpp"} <= names and any(n.endswith(".inc") for n in names)
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    # Complete: a wheel comes out of it, though without compiling everything once more.
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel, _ = hook(unpacked, "build_wheel", tmp_path / "wheel", **NO_COMPILER)
    with zipfile.ZipFile(wheel) as opened:
        assert {"distill_kernels/__init__.py", "distill_kernels/api/__init__.py"} <= set(opened.namelist())


# Stands for CUDA's compiler: writes down how it was called, and makes an empty file of what it was to make, or fails.
COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
exit {status}
"""


def with_nvcc(folder, status):
    """The environment of a build that finds such a compiler, and no other."""
    nvcc = folder / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(COMPILER.format(log=folder / "log", status=status))
    nvcc.chmod(0o755)
    return NO_COMPILER | {"CUDA_HOME": str(folder / "toolkit"), "DISTILL_KERNELS_CUDA": "1"}


def test_cuda_kernels_are_compiled_for_every_chip_in_one_binary_with_the_runtime_inside(tree, tmp_path):
    target = tmp_path / "installed"
    pip("install", ".", "--target", target, cwd=tree, **with_nvcc(tmp_path, 0))
    assert (target / f"distill_kernels/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    *compiles, link = (tmp_path / "log").read_text().splitlines()
    sources = sorted(path.name for path in (tree / "csrc" / "cuda").glob("*.c*") if path.suffix in (".cu", ".cpp"))
    assert sorted(Path(re.search(r"-c (\S+)", line)[1]).name for line in compiles) == sources
    for chip in ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_100,code=[sm_100,compute_100]"):
        assert all(f"-gencode={chip}" in line for line in compiles)
    assert "-cudart=static" in link and len(re.findall(r"\S+\.o\b", link)) == len(compiles)


@pytest.mark.exhaustive
def test_installation_whose_cuda_kernels_cannot_be_compiled_says_so_and_goes_on(tree, tmp_path):
    target = tmp_path / "installed"
    output = pip("install", ".", "-v", "--target", target, cwd=tree, **with_nvcc(tmp_path, 1))
    assert re.search(r"distill_kernels: the compiled CUDA kernels could not be built .*\n *The installation goes on", output)
    assert "Traceback" not in output and not list(target.rglob("_cuda*.so")) and (target / "distill_kernels").is_dir()


@pytest.mark.exhaustive
def test_build_whose_cuda_kernels_cannot_be_compiled_fails_where_they_are_required(tree, tmp_path):
    environment = with_nvcc(tmp_path, 1) | {"DISTILL_KERNELS_CUDA": "required"}
    output = pip("wheel", ".", "--wheel-dir", tmp_path / "out", cwd=tree, succeeds=False, **environment)
    assert not list(tmp_path.glob("out/*.whl")) and str(tmp_path / "toolkit") in output


def test_build_without_nvcc_fails_where_the_cuda_kernels_are_required(tree):
    program = "import runpy, shutil, sys; shutil.which = lambda name: None; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')"
    options = {"cwd": tree, "CUDA_HOME": "/nowhere"}
    output = run("-c", program, succeeds=False, DISTILL_KERNELS_CUDA="required", **options)
    assert "the CUDA kernels are required, and there is no nvcc (/nowhere/bin/nvcc, nvcc, /usr/local/cuda/bin/nvcc)" in output
    run("-c", program, DISTILL_KERNELS_CUDA="1", **options)


@pytest.mark.exhaustive
def test_installation_without_nvcc_has_no_cuda_kernels(tree, tmp_path):
    output = pip("install", ".", "-v", "--target", tmp_path / "installed", cwd=tree, **NO_COMPILER)
    assert "CUDA" not in output and not list((tmp_path / "installed").rglob("_cuda*"))
