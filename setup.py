"""Builds the CPU extension, and the CUDA one where there is nvcc, beside the Python packages; everything declarative is in pyproject.toml.

Without a C++ compiler the installation still works, on the torch backend, and says so in a sentence; DISTILL_KERNELS_REQUIRE_NATIVE=1 has
the failure raised. DISTILL_KERNELS_CUDA: 0 leaves out CUDA, "required" has its lack raised, "only" builds it alone. CUDAARCHS: for which.
"""

import os
import shutil
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

from pybind11 import get_include
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CCompilerError, ExecError, PlatformError
from setuptools.modified import newer_group

SOURCES = ["bindings", "cpu/chunk", "cpu/draw", "cpu/parallel"]
SOURCES += ["cpu/chunk_baseline", "cpu/chunk_avx2", "cpu/chunk_avx512", "cpu/chunk_avx512vnni", "cpu/chunk_avx512bf16"]


def headers(*folders):
    found = (path for folder in folders for path in Path("csrc", folder).iterdir() if path.suffix in (".h", ".inc", ".cuh"))
    return ["csrc/params.h", "csrc/divergence.h", *sorted(map(str, found))]


# math-errno: sqrt and friends need not set errno, which would keep them scalar.
native = Pybind11Extension(
    "distill_kernels._native",
    sources=[f"csrc/{source}.cpp" for source in SOURCES],
    cxx_std=17,
    extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unknown-pragmas"],
    libraries=["dl", "pthread"] if sys.platform.startswith("linux") else [],
    depends=headers("cpu", "generated"),
)
# One binary for every chip: of each kind from 8.0 on machine code, and of the last what a later driver makes its own from.
CHIPS = {"80": "arch=compute_80,code=sm_80", "90a": "arch=compute_90a,code=sm_90a", "100": "arch=compute_100,code=[sm_100,compute_100]"}
GENCODES = [f"-gencode={CHIPS[chip]}" for chip in os.environ.get("CUDAARCHS", ";".join(CHIPS)).split(";")]
cuda = Extension(
    "distill_kernels._cuda",
    sources=["csrc/cuda/bindings.cpp", *sorted(map(str, Path("csrc/cuda").glob("*.cu")))],
    include_dirs=[get_include()],
    define_macros=[("DK_MODULE", "_cuda")],
    extra_compile_args=["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", *GENCODES],
    extra_link_args=["-shared", "-cudart=static", *GENCODES],
    depends=headers("cuda", "generated"),
)
CUDA, CUDA_HOME = os.environ.get("DISTILL_KERNELS_CUDA"), os.environ.get("CUDA_HOME")
candidates = [*([f"{CUDA_HOME}/bin/nvcc"] if CUDA_HOME else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
NVCC = next(filter(None, map(shutil.which, candidates)), None) if CUDA != "0" else None
if NVCC is None and CUDA in ("required", "only"):
    raise SystemExit(f"distill_kernels: the CUDA kernels are required, and there is no nvcc ({', '.join(candidates)})")
MISSING = {
    native.name: "CPU kernels could not be built ({}).\nThe installation goes on and will run on the torch backend. For the native one, "
    "install a C++17 compiler\n(for example: apt-get install g++) and install distill_kernels again.",
    cuda.name: "CUDA kernels could not be built ({}).\nThe installation goes on, without the cuda backend, which takes nvcc 12.8 or later.",
}


class BuildExtensions(build_ext):
    """Compiles the extensions, or says what is missing and goes on without."""

    def build_extension(self, extension):
        try:
            self.build_cuda() if extension is cuda else super().build_extension(extension)
        except (CCompilerError, ExecError, PlatformError) as error:
            if os.environ.get("DISTILL_KERNELS_REQUIRE_NATIVE") or (extension is cuda and CUDA in ("required", "only")):
                raise
            print(f"\ndistill_kernels: the compiled {MISSING[extension.name].format(error)}\n", file=sys.stderr)
            extension.optional = True  # so that nothing looks for the library that was not made

    def build_cuda(self):
        library = Path(self.get_ext_fullpath(cuda.name))
        if not (self.force or newer_group(cuda.sources + cuda.depends, str(library), "newer")):
            return
        host = ["-ccbin", os.environ["CXX"].split()[0]] if os.environ.get("CXX") else []
        include = [f"-I{path}" for path in (*cuda.include_dirs, *self.include_dirs)] + [f"-D{n}={v}" for n, v in cuda.define_macros]
        objects = [str(Path(self.build_temp, "cuda", Path(source).stem + ".o")) for source in cuda.sources]
        Path(objects[0]).parent.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        compiles = [
            [NVCC, *host, *cuda.extra_compile_args, *include, "-c", source, "-o", made]
            for source, made in zip(cuda.sources, objects, strict=True)
            if self.force or newer_group([source, *cuda.depends], made, "newer")
        ]
        ThreadPool(os.cpu_count()).map(self.spawn, compiles, chunksize=1)
        self.spawn([NVCC, *host, *cuda.extra_link_args, *objects, "-o", str(library)])


extensions = ([] if CUDA == "only" else [native]) + ([cuda] if NVCC else [])
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
