"""The kernels of csrc/cuda compiled by g++ for the emulation in tests/cuda_emulation, as the Python module that nvcc makes for a GPU.

What is built is kept under build/, by a hash of all sources; objects by a hash of theirs and of what these include, so that a change costs
the files that it reaches. Headers of the C++ library are compiled once. Any number of processes share what is there.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch

from distill_kernels.backends.cuda import extension

ON_GPU = torch.cuda.is_available() and extension.kernels is not None
DEVICE = torch.device("cuda" if ON_GPU else "cpu")  # of the backend's tests
ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
CACHE = ROOT / "build" / "cuda_emulation"
CXX = shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DDK_EMULATED", f"-I{EMULATION}")
LIBRARY = (
    "algorithm", "array", "cmath", "cstddef", "cstdint", "cstdio", "cstdlib", "cstring", "fstream", "functional", "memory", "random",
    "stdexcept", "string", "vector",
)  # fmt: skip
PARTS = ("scheduler", "instructions", "hopper")
MODULE = "_cuda_emulated"
# Of a sanitizer: how kernels are compiled, and what the scheduler, which is not to be instrumented, has to know.
SANITIZERS = {
    "": ((), ()),
    "address": (("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"), ("-DEMULATION_ASAN",)),
    "thread": (("-fsanitize=thread",), ("-DEMULATION_TSAN",)),
}


class CompilerError(Exception):
    pass


def run(*command):
    made = subprocess.run(list(map(str, command)), capture_output=True)
    if made.returncode:
        raise CompilerError(made.stderr.decode()[-4000:])
    return made.stdout


def require():
    """Skips the test where the emulation cannot be built."""
    if CXX is None:
        pytest.skip("there is no g++, which compiles the kernels for the emulation")
    if os.uname().machine != "x86_64":
        pytest.skip("the emulation switches stacks in x86-64 assembly")
    return pytest.importorskip("pybind11")


def cached(name, key, make):
    """The file `name` of that key; make(path) writes it if it is not there yet."""
    made = CACHE / hashlib.sha256(b"\0".join(key)).hexdigest()[:32] / name
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with open(made.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            draft = made.with_suffix(".draft")
            make(draft)
            draft.replace(made)
    return made


@functools.cache
def compiler():
    return run(CXX, "--version")


def included(source, folders):
    """The contents of a file and of all that it includes of its own folder and of `folders`; the compiler has the rest."""
    found = [Path(source)]
    for path in found:  # which grows
        for name in re.findall(r'^ *#include [<"](.+?)[>"]', path.read_text(), re.MULTILINE):
            places = (folder / name for folder in (path.parent, *folders))
            here = next((place.resolve() for place in places if place.exists()), None)
            if here is not None and here not in found:
                found.append(here)
    return [path.read_bytes() for path in found]


@functools.cache
def preamble(flags):
    """A header that includes LIBRARY; the compiler takes what it has compiled of it beside it. To parse it is a second for each object."""
    text = "".join(f"#include <{header}>\n" for header in LIBRARY)

    def make(draft):
        header = draft.with_name("preamble.h")
        header.write_text(text)
        run(CXX, *flags, "-x", "c++-header", header, "-o", draft)

    return cached("preamble.h.gch", [compiler(), text.encode(), " ".join(flags).encode()], make).with_suffix("")


def object_of(source, flags):
    how = [flag for flag in flags if not flag.startswith("-I")]
    folders = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    ours = [folder for folder in folders if folder == EMULATION or folder.name == "csrc"]
    key = [compiler(), " ".join(how).encode(), *included(source, ours)]
    header = preamble(tuple(flag for flag in how if not flag.startswith("-D")))
    command = (CXX, *flags, "-include", header, "-c", "-x", "c++", source)
    return cached(f"{Path(source).stem}.o", key, lambda out: run(*command, "-o", out))


def objects(sources, sanitizer="", flags=()):
    """Of kernels, and of the emulation that they run in."""
    of_kernels, of_emulation = SANITIZERS[sanitizer]
    work = [(source, (*FLAGS, *of_kernels, *flags)) for source in sources]
    work += [(EMULATION / f"{name}.cpp", (*FLAGS, "-O2", *of_emulation)) for name in PARTS]
    with ThreadPool(2) as pool:
        return pool.starmap(object_of, work)


def built(name, sources, csrc, sanitizer, compiled, linked):
    """`sources` with whatever they include of `csrc`, and the emulation, in one file."""
    read = [path for folder in (csrc, EMULATION) for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    flags = (*SANITIZERS[sanitizer][0], *compiled, *linked)
    key = [f"{name} {sanitizer} {' '.join(flags)}".encode(), *(path.read_bytes() for path in [*sources, *read] if "cpu" not in path.parts)]
    return cached(name, key, lambda out: run(CXX, *SANITIZERS[sanitizer][0], *linked, *objects(sources, sanitizer, compiled), "-o", out))


def module(csrc=ROOT / "csrc"):
    """The extension of these sources, for the emulation. Not where there is a GPU: whoever tests there means the GPU."""
    if torch.cuda.is_available():
        pytest.fail("there is a GPU, and no compiled extension for it: the emulation is not to stand in for it")
    pybind11 = require()
    sources = [csrc / "cuda" / "bindings.cpp", *sorted((csrc / "cuda").glob("*.cu"))]
    include = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", f"-DDK_MODULE={MODULE}")
    path = built(MODULE + sysconfig.get_config_var("EXT_SUFFIX"), sources, csrc, "", include, ("-shared",))
    spec = importlib.util.spec_from_file_location(MODULE, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def program(main, kernels, sanitizer="", csrc=ROOT / "csrc"):
    """A program by itself: `main`, a C++ file, with kernels, named as files of csrc/cuda are."""
    require()
    sources = [Path(main), *(csrc / "cuda" / f"{kernel}.cu" for kernel in kernels)]
    return built(Path(main).stem, sources, csrc, sanitizer, (f"-I{csrc}",), ())


def copy_of_sources(folder):
    """csrc as far as the kernels are made of it, in `folder`."""
    csrc = folder / "csrc"
    for part in ("cuda", "generated"):
        shutil.copytree(ROOT / "csrc" / part, csrc / part)
    for header in ("params.h", "divergence.h"):
        shutil.copy(ROOT / "csrc" / header, csrc)
    return csrc


def replace(path, old, new, count=1):
    source = path.read_text()
    assert source.count(old) == count, f"{path.name} has {old!r} {source.count(old)} times, not {count}"
    path.write_text(source.replace(old, new))
