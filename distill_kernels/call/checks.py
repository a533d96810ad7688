"""Checks of arguments, before any work: the right exception, the argument's name, what was got and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def finite_number(
    name: str, value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None, optional: bool = False
) -> None:
    """Raises TypeError or ValueError unless `value` is a finite Python number within the bounds (or None where `optional`)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {type(value).__name__}")
    inside = (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    if not -math.inf < value < math.inf or not inside:  # by comparison, which a compiler can trace
        bounds = ("above", above), ("at least", least), ("at most", most)
        wanted = " and".join(f" {word} {bound:g}" for word, bound in bounds if bound is not None)
        raise ValueError(f"{name} must be a finite number{wanted}, got {value!r}")
    if value != 0 and not 1e-18 <= abs(value) <= 1e18:  # so that its square is a normal float32
        raise ValueError(f"{name} must be 0 or of a magnitude between 1e-18 and 1e18, got {value!r}")


def integer(name: str, value: Any, *, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def matrix(name: str, tensor: Any, dim: int | None = None) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if (dim is None and tensor.dim() < 1) or (dim is not None and tensor.dim() != dim):
        raise ValueError(
            f"{name} must have {'at least 1 dimension' if dim is None else f'{dim} dimensions'}, got shape {tuple(tensor.shape)}"
        )


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would take this tensor here."""
    device = tensor.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and tensor.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if casts else tensor.dtype


def head(prefix: str, hidden: Any, weight: Any, bias: Any) -> None:
    """Hidden states, head and bias of one model fit together. `prefix` of their names: "student_", "teacher_" or none."""
    matrix(f"{prefix}hidden", hidden)
    if hasattr(weight, "ds_shape") and weight.shape != weight.ds_shape:
        raise ValueError(
            f"{prefix}weight is a parameter of shape {tuple(weight.ds_shape)} of which DeepSpeed's ZeRO-3 has left {tuple(weight.shape)} "
            "here; call the loss, and its backward, under deepspeed.zero.GatheredParameters, or inside of the engine's forward"
        )
    matrix(f"{prefix}weight", weight, 2)
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden has {hidden.shape[-1]} features (shape {tuple(hidden.shape)}) but {prefix}weight has "
            f"{weight.shape[1]} columns (shape {tuple(weight.shape)}); wanted hidden (..., D) and weight (V, D)"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{prefix}weight is empty: shape {tuple(weight.shape)} (a sharded head has to be gathered first)")
    if autocast_dtype(hidden) != autocast_dtype(weight):
        raise TypeError(
            f"{prefix}hidden is {hidden.dtype} but {prefix}weight is {weight.dtype}; cast one, or call under torch.autocast, "
            "which casts both (float64 excepted)"
        )
    if bias is not None:
        matrix(f"{prefix}bias", bias, 1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{prefix}bias has {bias.shape[0]} entries but {prefix}weight has {weight.shape[0]} rows")


def tokens(name: str, tensor: Any, shape: Sequence[int], dtypes: Sequence[torch.dtype], wanted: str) -> None:
    """A tensor with one entry for each token."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have one entry for each token, shape {tuple(shape)}, got {tuple(tensor.shape)}")


def devices(tensors: dict[str, Tensor | None]) -> None:
    found = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(found.values())) > 1:
        raise ValueError("all tensors must be on one device, got " + ", ".join(f"{name} on {device}" for name, device in found.items()))


def teacher(tensors: dict[str, Tensor | None]) -> None:
    """The teacher is a constant here; a gradient that silently stayed zero would be worse than an error."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, but the teacher gets no gradient here: run the teacher under torch.no_grad() and call "
                f"teacher.requires_grad_(False), or pass {name}.detach()"
            )


def shared_vocabulary(student_weight: Tensor, teacher_weight: Tensor, vocab_mismatch: str) -> int:
    """Rows of the heads that both have, or ValueError if they differ and were not said to be cut."""
    rows = student_weight.shape[0], teacher_weight.shape[0]
    if rows[0] != rows[1] and vocab_mismatch == "error":
        raise ValueError(
            f"student_weight has {rows[0]} rows but teacher_weight has {rows[1]}; if the first {min(rows)} entries mean the same tokens, "
            'pass vocab_mismatch="truncate" to compare those, renormalised; labels may still be any of the student\'s'
        )
    return min(rows)


NO_LABEL = torch.iinfo(torch.int64).min  # stands for ignore_index below the public API, where no label can be mistaken for it


def labels(name: str, given: Tensor | None, vocabulary: int) -> None:
    """Labels (N,) index the vocabulary or are NO_LABEL. It reads them, which elsewhere than on CPU would wait for the device."""
    if given is None or given.device.type != "cpu":
        return
    wrong = given[((given < 0) & (given != NO_LABEL)) | (given >= vocabulary)]
    if wrong.numel():
        raise ValueError(f"{name} must be at least 0 and below the vocabulary size {vocabulary}, or ignore_index, got {int(wrong[0])}")
