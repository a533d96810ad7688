"""Heads quantised once and kept, for losses with a quantised sweep."""

from typing import Any

import torch
from torch import Tensor

from distill_kernels.call import checks
from distill_kernels.ops import whole_vocabulary


class PreparedHead:
    """An LM head and its 8-bit copy, which a loss with `sweep` reads in place of quantising the head anew; made by `prepare_head`.

    The copy follows the head: it is made when first needed, and made again once the head was written to in place (an optimizer's step) or
    its storage replaced. Writes that torch does not count (through `.data`, a NumPy view or a raw pointer) want `refresh()` each time. A
    slightly outdated copy costs accuracy, for sums are still corrected by exact columns; one of another head makes errors beyond any
    tolerance, and every chunk is computed exactly.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # (V, D), the caller's: nothing is copied, and gradients go to it
        self._copies: dict[str, tuple[Any, tuple[Tensor, Tensor]]] = {}  # by kind of sweep: the state of the head, and the copy

    def quantised(self, sweep: str) -> tuple[Tensor, Tensor]:
        """The 8-bit rows and their scales, as `distill_kernels.estimators.quantised.quantise` documents them."""
        weight = self.weight
        # An inference tensor has no version, for nothing may write to it.
        written = None if weight.is_inference() else weight._version
        state = (written, weight.data_ptr(), weight.dtype)
        found = self._copies.get(sweep)
        if found is None or found[0] != state:
            found = None
            self._copies.pop(sweep, None)  # before there is another
            self._copies[sweep] = state, whole_vocabulary.quantise(weight.detach(), sweep)
        return self._copies[sweep][1]

    def refresh(self) -> None:
        """Forgets the copies, so that they are made again when next needed."""
        self._copies.clear()

    @property
    def nbytes(self) -> int:
        """Of the copies that exist: V · (D, padded to a multiple of 64, + 12) for each kind of sweep."""
        return sum(tensor.nbytes for _, copy in self._copies.values() for tensor in copy)

    def __repr__(self) -> str:
        kinds = ", ".join(self._copies) or "nothing yet"
        return f"PreparedHead({tuple(self.weight.shape)}, {self.weight.dtype}, {kinds}: {self.nbytes / 2**20:,.0f} MiB)"


def prepare_head(weight: Tensor) -> PreparedHead:
    """A head to be passed as teacher_weight or student_weight, so that a loss with `sweep` does not quantise it at every call.

    Worth it for a teacher's, which does not change; of a student's head it saves the copies of gradient accumulation only. Takes a quarter
    of a float32 head's memory once it is used. Without `sweep` it is the head and nothing else, and so it is under torch.compile, where
    the head is quantised at every call: a graph could not see that it has changed.

    Arguments
        weight (V, D): float32, bfloat16 or float16; a Parameter or a tensor. It is referred to, not copied.

    Raises
        TypeError, ValueError: if it is not such a matrix.

    Example
        >>> hidden, head = torch.randn(128, 64, requires_grad=True), torch.randn(16384, 64, requires_grad=True)
        >>> teacher_hidden, teacher_head = torch.randn(128, 96), prepare_head(torch.randn(16384, 96))
        >>> loss = distill_kernels.distillation_loss(hidden, head, teacher_hidden, teacher_head, column_fraction=0.08, sweep="int8")
        >>> loss.backward()
    """
    checks.matrix("weight", weight, 2)
    if weight.dtype is torch.float64:
        raise TypeError("weight must be float32, bfloat16 or float16 to be quantised, got torch.float64")
    return PreparedHead(weight)


def weight_of(head: Tensor | PreparedHead) -> Tensor:
    """The tensor of a prepared head, or what was passed."""
    return head.weight if isinstance(head, PreparedHead) else head


def quantised(head: Tensor | PreparedHead, weight: Tensor, sweep: str) -> tuple[Tensor, Tensor]:
    """8-bit rows and scales of the first rows of a head, as many as `weight` has; `head` may be prepared."""
    if isinstance(head, PreparedHead) and not torch.compiler.is_compiling():  # a compiled graph could not see that the head changed
        rows, scales = head.quantised(sweep)
    else:
        rows, scales = whole_vocabulary.quantise(weight, sweep)
    return rows[: len(weight)], scales[: len(weight)]
