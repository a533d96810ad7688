"""The compiled kernels, if the package was installed where nvcc is. Importing them asks for no driver and no GPU."""

try:
    from distill_kernels import _cuda as kernels

    MISSING = None
except ImportError as error:
    kernels, MISSING = None, str(error)
