"""What a machine without a network has to bring: the CUDA extension for its Python and its chip, and the libraries that ours is beside.

    python -m benchmarks.gpu_suite.bundle       # `make gpu-bundle`: builds build/gpu-bundle

One folder, git-ignored, from which the suite takes its imports; the package itself is in it as links into this tree, so nothing needs to be
installed there. Nothing here imports torch.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu-bundle"
MANIFEST = "manifest.json"
PYTHON, CHIP = "3.12", "90a"
PEERS = ("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1")
BUILDERS = ("setuptools>=77", "pybind11>=2.12")
MOST_BYTES = 60 * 2**20


def link(folder: Path) -> None:
    """folder/distill_kernels, with links to all that the package has here, python/ as its `api`."""
    package = folder / "distill_kernels"
    package.mkdir(parents=True, exist_ok=True)
    here = [path for path in (ROOT / "distill_kernels").iterdir() if path.suffix != ".so" and path.name != "__pycache__"]
    for name, path in [*((path.name, path) for path in here), ("api", ROOT / "python")]:
        place, target = package / name, os.path.relpath(path, package)  # relative: it is to hold where the tree is copied to
        if place.is_symlink() and os.readlink(place) == target:
            continue  # other processes may be importing by it
        draft = place.with_name(f"{name}.{os.getpid()}")
        draft.symlink_to(target)
        draft.replace(place)


def extension_in(folder: Path) -> Path | None:
    return next((folder / "distill_kernels").glob("_cuda*.so"), None)


def sources() -> str:
    """Of what the extension is made of, a hash."""
    paths = [ROOT / "csrc" / name for name in ("params.h", "divergence.h")]
    paths += sorted(path for folder in ("cuda", "generated") for path in (ROOT / "csrc" / folder).iterdir())
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def manifest(folder: Path | None = None) -> dict | None:
    path = (FOLDER if folder is None else folder) / MANIFEST
    return json.loads(path.read_text()) if path.exists() else None


def _of_this_python(found: dict | None) -> bool:
    return found is not None and found["python"] == "{}.{}".format(*sys.version_info)


def use() -> None:
    """Imports of this process, and of those it starts, come from the bundle first, if there is one for this Python."""
    if not _of_this_python(manifest()):
        return
    link(FOLDER)  # the tree may have another file than when it was built
    places = [str(FOLDER), str(ROOT)]
    sys.path[:0] = places
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONSAFEPATH"] = "1"  # else the folder that a process is started in comes before


def describe() -> str:
    found = manifest()
    return f"{found['extension']} for sm_{found['chip']}" if found is not None and _of_this_python(found) else "none"


def why_outdated() -> str | None:
    """Why the suite would not run what this tree says, in words; None: it will."""
    found = manifest()
    if found is None or not _of_this_python(found):
        try:
            importlib.metadata.distribution("distill_kernels")
        except importlib.metadata.PackageNotFoundError:
            return "distill_kernels is not installed, and there is no bundle for this Python; `make gpu-bundle` builds one"
        return None
    if found["sources"] != sources():
        return "the bundle's extension was built from other sources than csrc/cuda has now; `make gpu-bundle` builds it again"
    return None


def interpreter() -> str:
    """A Python of the version that the bundle is for, with its headers."""
    candidates = [os.environ.get("PYTHON312"), shutil.which(f"python{PYTHON}")]
    candidates += [str(path) for path in Path.home().glob(f".pyenv/versions/{PYTHON}*/bin/python")]
    asked = (
        "import os, sys, sysconfig; print('{}.{}'.format(*sys.version_info), os.path.exists(sysconfig.get_path('include') + '/Python.h'))"
    )
    for candidate in filter(None, candidates):
        ran = subprocess.run([candidate, "-c", asked], capture_output=True, text=True)
        if ran.stdout.split() == [PYTHON, "True"]:
            return candidate
    raise SystemExit(f"there is no Python {PYTHON} with headers here; PYTHON312 in the environment may name one")


def build(folder: Path = FOLDER) -> dict:
    """Builds everything anew and returns the manifest; raises SystemExit in words where it cannot."""
    python = interpreter()
    work = folder.with_name(folder.name + "-work")
    shutil.rmtree(folder, ignore_errors=True)
    if not (work / "bin" / "python").exists():
        _run(python, "-m", "venv", str(work))
        _run(str(work / "bin" / "python"), "-m", "pip", "install", "--quiet", *BUILDERS)
    built = [str(work / "bin" / "python"), "setup.py", "--quiet", "build_ext"]
    built += ["--build-lib", str(folder), "--build-temp", str(work / "objects")]
    _run(*built, DISTILL_KERNELS_CUDA="only", CUDAARCHS=CHIP)
    extension = extension_in(folder)
    if extension is None:
        raise SystemExit("setup.py built no extension")
    _run(str(work / "bin" / "python"), "-c", LOADS, str(extension))
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder), *PEERS)
    link(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    made = {"python": PYTHON, "chip": CHIP, "extension": extension.name, "sources": sources(), "peers": PEERS, "bytes": size}
    (folder / MANIFEST).write_text(json.dumps(made, indent=1))
    if size > MOST_BYTES:
        raise SystemExit(f"{folder} has {size:,} bytes, more than {MOST_BYTES:,}")
    return made


# Without the package, which imports torch: the extension needs none.
LOADS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.divergences and not module.emulated
"""


def _run(*command: str, **environment: str) -> None:
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command[:6])}: {(ran.stdout + ran.stderr)[-2000:]}")


if __name__ == "__main__":
    print(json.dumps(build(), indent=1))
