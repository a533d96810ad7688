"""Builds the CPU extension beside the Python packages; everything declarative is in pyproject.toml.

Without a C++ compiler the installation still works, on the torch backend: the failure is reported in a sentence, not raised.
Set DISTILL_KERNELS_REQUIRE_NATIVE=1 to have it raised (continuous integration does).
"""

import os
import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = ["bindings", "cpu/chunk", "cpu/draw", "cpu/parallel"]
SOURCES += ["cpu/chunk_baseline", "cpu/chunk_avx2", "cpu/chunk_avx512", "cpu/chunk_avx512vnni", "cpu/chunk_avx512bf16"]

# math-errno: sqrt and friends need not set errno, which would keep them scalar.
native = Pybind11Extension(
    "distill_kernels._native",
    sources=[f"csrc/{source}.cpp" for source in SOURCES],
    cxx_std=17,
    extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unknown-pragmas"],
    libraries=["dl", "pthread"] if sys.platform.startswith("linux") else [],
)
native.depends = ["csrc/params.h", "csrc/divergence.h"] + [
    f"csrc/{folder}/{name}"
    for folder in ("cpu", "generated")
    for name in sorted(os.listdir(f"csrc/{folder}"))
    if name.endswith((".h", ".inc"))
]


class BuildNative(build_ext):
    """Compiles the extension, or says what is missing and goes on without it."""

    def build_extension(self, extension):
        try:
            super().build_extension(extension)
        except (CCompilerError, ExecError, PlatformError) as error:
            if os.environ.get("DISTILL_KERNELS_REQUIRE_NATIVE"):
                raise
            print(
                f"\ndistill_kernels: the compiled CPU kernels could not be built ({error}).\n"
                "The installation goes on and will run on the torch backend. For the native one, install a C++17 compiler\n"
                "(for example: apt-get install g++) and install distill_kernels again.\n",
                file=sys.stderr,
            )
            extension.optional = True  # so that nothing looks for the library that was not made


setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})
