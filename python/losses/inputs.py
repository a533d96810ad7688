"""The tensors of a call as its caller has them: one frozen object that goes through checks, ranks and flattening whole."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_kernels.api.losses.prepared_heads import PreparedHead, weight_of
from distill_kernels.call import checks
from distill_kernels.call.options import Options


@dataclass(frozen=True)
class Inputs:
    student_hidden: Tensor  # (..., D_s)
    student_weight: Tensor | PreparedHead  # (V, D_s)
    teacher_hidden: Tensor | None = None  # (..., D_t)
    teacher_weight: Tensor | PreparedHead | None = None  # (V, D_t)
    labels: Tensor | None = None  # (...) int64
    student_bias: Tensor | None = None  # (V,)
    teacher_bias: Tensor | None = None  # (V,)
    token_weight: Tensor | None = None  # (...)
    num_items: int | Tensor | None = None  # () if a tensor

    @property
    def tokens(self) -> torch.Size:
        """Shape of the tokens, (...)."""
        return self.student_hidden.shape[:-1]

    @property
    def student_head(self) -> Tensor:
        """student_weight without what was prepared of it."""
        return weight_of(self.student_weight)

    @property
    def teacher_head(self) -> Tensor | None:
        return None if self.teacher_weight is None else weight_of(self.teacher_weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        hidden = (self.student_hidden, self.teacher_hidden)
        return torch.float64 if any(tensor is not None and tensor.dtype is torch.float64 for tensor in hidden) else torch.float32

    def check(self, options: Options, **others: Tensor | None) -> None:
        """Raises TypeError or ValueError unless the tensors fit each other and the options; `others` are on the same device."""
        checks.head("student_", self.student_hidden, self.student_head, self.student_bias)
        self._check_teacher(options)
        self.check_tokens(options)
        num_items = self.num_items if isinstance(self.num_items, Tensor) else None
        checks.devices(
            {
                "student_hidden": self.student_hidden,
                "student_weight": self.student_head,
                "student_bias": self.student_bias,
                "teacher_hidden": self.teacher_hidden,
                "teacher_weight": self.teacher_head,
                "teacher_bias": self.teacher_bias,
                **others,
                "labels": self.labels,
                "token_weight": self.token_weight,
                "num_items": num_items,
            }
        )

    def _check_teacher(self, options: Options) -> None:
        hidden, head = self.teacher_hidden, self.teacher_head
        if (hidden is None) != (head is None) or (hidden is None and options.kd_weight != 0 and options.tail is None):
            raise TypeError("teacher_hidden and teacher_weight must be tensors, or both None with kd_weight=0")
        if hidden is None or head is None:
            if self.teacher_bias is not None:
                raise TypeError("teacher_bias was passed without teacher_hidden and teacher_weight")
            return
        checks.head("teacher_", hidden, head, self.teacher_bias)
        if hidden.shape[:-1] != self.tokens:
            raise ValueError(
                f"student_hidden has tokens of shape {tuple(self.tokens)} but teacher_hidden {tuple(hidden.shape[:-1])}; "
                "both models must have read the same tokens"
            )
        checks.shared_vocabulary(self.student_head, head, options.vocab_mismatch)
        checks.teacher({"teacher_hidden": hidden, "teacher_weight": head, "teacher_bias": self.teacher_bias})

    def check_tokens(self, options: Options) -> None:
        """Labels, weights and normaliser suit the tokens and the options."""
        if self.labels is not None:
            checks.tokens("labels", self.labels, self.tokens, (torch.int64,), "int64")
        elif options.ce_weight != 0:
            raise ValueError("ce_weight is not 0 but labels is None; pass labels (...) int64, already shifted, or ce_weight=0")
        if self.token_weight is not None:
            checks.tokens("token_weight", self.token_weight, self.tokens, checks.DTYPES, "a floating-point tensor")
            if self.token_weight.requires_grad:
                raise ValueError('token_weight gets no gradient; detach it, or use reduction="none" and multiply')
        if self.num_items is None:
            return
        if isinstance(self.num_items, Tensor):
            if self.num_items.dim() != 0:
                raise ValueError(f"num_items must be an int or a 0-d tensor, got a tensor of shape {tuple(self.num_items.shape)}")
            if self.num_items.requires_grad:
                raise ValueError("num_items gets no gradient; detach it")
        else:
            checks.finite_number("num_items", self.num_items, above=0)
        if options.reduction != "mean":
            raise ValueError(f'num_items is the normaliser of reduction="mean", but reduction is {options.reduction!r}')
