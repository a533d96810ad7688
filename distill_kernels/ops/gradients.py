"""What the custom ops do alike: sums that autocast must not reach, and gradients that are scaled, rounded and differentiated no further."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill_kernels import memory


def without_autocast(device: torch.device) -> torch.autocast:
    """Without autocast, which ops run under as their caller does: what was to be cast has been, and sums in float32 must not be."""
    return torch.autocast(device.type, enabled=False)


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves tensors for backward, those of torch.inference_mode() too, which autograd refuses: nobody can write to them, and they get no
    gradient, so they are held as they are."""
    constant = [tensor is not None and not torch.compiler.is_compiling() and tensor.is_inference() for tensor in tensors]
    ctx.constants = [tensor if alone else None for tensor, alone in zip(tensors, constant, strict=True)]
    ctx.save_for_backward(*(None if alone else tensor for tensor, alone in zip(tensors, constant, strict=True)))


def kept(ctx: Any) -> tuple[Any, ...]:
    """What `keep` was given."""
    return tuple(saved if constant is None else constant for saved, constant in zip(ctx.saved_tensors, ctx.constants, strict=True))


def finished(
    gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], wanted: Sequence[bool], inputs: int
) -> tuple[Any, ...]:
    """What a backward returns for the op's inputs: gradients of the first three, student's hidden states, head and bias, where wanted."""
    gradients = [
        rounded(gradient, dtype) if want and gradient is not None and dtype is not None else None
        for gradient, dtype, want in zip(gradients, dtypes, wanted, strict=True)
    ]
    if torch.is_grad_enabled():  # create_graph=True
        gradients = [None if gradient is None else without_second_derivative(gradient) for gradient in gradients]
    return *gradients, *[None] * (inputs - len(gradients))


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient · upstream: in place where this backward is the last that will read it, so that no second copy is ever held.

    A backward that keeps the graph hands out copies, even at upstream 1: the caller may overwrite what it gets. Under a tracer tensors
    are of other types, and the compiler decides what is done in place.
    """
    traced = type(gradient) is not Tensor or type(upstream) is not Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradient
    return gradient.mul_(upstream)


def without_second_derivative(gradient: Tensor) -> Tensor:
    """The gradient as a function of the inputs that cannot be differentiated again: an error in place of a silent zero."""
    last: Tensor = _NoSecondDerivative.apply(gradient, gradient.new_zeros((), requires_grad=True))
    return last


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        raise NotImplementedError("losses and log-probabilities have no second derivatives here: call them without create_graph=True")


def rounded(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient if gradient.dtype == dtype else memory.empty(*gradient.shape, like=gradient, dtype=dtype).copy_(gradient)
