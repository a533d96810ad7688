"""What every loss does with its tokens: masks, weights and the normaliser, one row for each token, and the problem that is then solved."""

from typing import Any

import torch
from torch import Tensor

from distill_kernels.api.losses.inputs import Inputs
from distill_kernels.call import checks
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem, Tensors


def factors(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(which tokens are not masked (...) bool, what each token's loss is multiplied by (...)), by ignore_index and reduction."""
    labels, device = inputs.labels, inputs.student_hidden.device
    valid = torch.ones(inputs.tokens, dtype=torch.bool, device=device) if labels is None else labels != options.ignore_index
    factor = valid.to(inputs.compute_dtype)
    if inputs.token_weight is not None:
        factor = factor * inputs.token_weight
    if options.reduction == "mean":
        factor = factor / (valid.sum().clamp(min=1) if inputs.num_items is None else inputs.num_items)
    return valid, factor


def marked(name: str, labels: Tensor, valid: Tensor, vocabulary: int | None) -> Tensor:
    """Labels with checks.NO_LABEL where they are not valid; checked here under the caller's name, and again below if compiled, or if the
    size of the vocabulary is not known here (None)."""
    labels = torch.where(valid, labels, checks.NO_LABEL)
    if not torch.compiler.is_compiling() and vocabulary is not None:
        checks.labels(name, labels, vocabulary)
    return labels


def coefficients(factor: Tensor, options: Options) -> Tensor:
    """(N, 3): a token's factor (...) times the weight of each of problem.TERMS."""
    factor = factor.reshape(-1)
    return torch.stack((factor * options.weight_of_divergence, factor * options.ce_weight, factor * options.z_loss_weight), -1)


def flat(inputs: Inputs, labels: Tensor | None, coefficients: Tensor, *, teacher: bool) -> Tensors:
    """One row for each token, in autocast's dtype where that is on; with the teacher or without. labels (...) as `marked`."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(checks.autocast_dtype(tensor))

    def cast_if_there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else cast(tensor)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else cast(tensor).reshape(-1, tensor.shape[-1])

    return Tensors(
        cast(inputs.student_hidden).reshape(-1, inputs.student_hidden.shape[-1]),
        cast(inputs.student_head),
        cast_if_there(inputs.student_bias),
        rows(inputs.teacher_hidden) if teacher else None,
        cast_if_there(inputs.teacher_head) if teacher else None,
        cast_if_there(inputs.teacher_bias) if teacher else None,
        None if labels is None else labels.reshape(-1),
        coefficients.to(inputs.compute_dtype),
    )


def problem(tensors: Tensors, options: Options, **asked: Any) -> Problem:
    """The problem of these tensors; gradients are computed for what asks for them now."""

    def asks(tensor: Tensor | None) -> bool:
        return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()

    return Problem.of(
        tensors,
        options,
        d_hidden=asks(tensors.student_hidden),
        d_weight=asks(tensors.student_weight),
        d_bias=asks(tensors.student_bias),
        deferred=options.deferred,
        **asked,
    )
