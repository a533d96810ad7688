"""Large CPU tensors in huge pages.

A head's gradient is hundreds of megabytes, touched for the first time while it is written: in pages of 4 KiB the faults alone take
as long as one of the products that make it.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch

HUGE_PAGE = 2**21


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """libc's madvise, or None where there is no such advice to give."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty(*shape: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`like.new_empty(shape, dtype=dtype)`, in huge pages where it is large, on CPU, and not being traced."""
    tensor = like.new_empty(shape, dtype=dtype)
    large = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.nbytes >= 2 * HUGE_PAGE
    if large and (advise := _madvise()) is not None:
        begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)  # advice: a refusal changes nothing
    return tensor
