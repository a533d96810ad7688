"""Labels of the next tokens, in the form distillation_loss takes."""

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

# Hugging Face labels mark positions without a target by this value, whatever ignore_index a loss uses.
_HF_IGNORED = -100
_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)")


def placeholder_ids(model: Any) -> tuple[int, ...]:
    """The tokens in whose place a model reads images, videos or sounds, as its configuration names them."""
    named = {name: value for name, value in vars(model.config).items() if _PLACEHOLDER.fullmatch(name) and isinstance(value, int)}
    return tuple(sorted(set(named.values())))


def next_token_labels(
    input_ids: Tensor,
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    placeholders: Collection[int] = (),
    ignore_index: int = -100,
) -> Tensor:
    """Labels with which hidden[:, t] is scored on token t + 1, in the shape of input_ids, so that hidden needs no slicing.

        out[b, t] = targets[b, t + 1], where targets is `labels` if given and input_ids otherwise; ignore_index where there is none

    There is no target at the last position; where token t or token t + 1 is padding (on either side); where labels[b, t + 1] is
    -100; where token t + 1 is a placeholder, such as an image is put in place of; and where position_ids[b, t + 1] !=
    position_ids[b, t] + 1, which is where one packed document ends and the next begins.

    Args:
        input_ids: (B, S), integer.
        labels: (B, S), integer, not shifted, -100 where there is no target (the Hugging Face convention).
        attention_mask: (B, S), bool or integer, zero at padding.
        position_ids: (B, S) or (1, S), integer, counting up by one within a document and starting again at the next.
        placeholders: ids of tokens that nothing is to be learned of; `placeholder_ids(model)` has a model's.
        ignore_index: what to write where there is no target.

    Returns:
        (B, S) int64, on the device of input_ids.

    Raises:
        ValueError: a shape or device differs from what is wanted.
        TypeError: a dtype differs from what is wanted.

    Example:
        >>> next_token_labels(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
        tensor([[   6, -100,    8, -100]])
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, wanted (batch, sequence)")
    batch, length = input_ids.shape
    _check_integers("input_ids", input_ids, input_ids, {(batch, length)})
    targets = input_ids
    if labels is not None:
        _check_integers("labels", labels, input_ids, {(batch, length)})
        targets = labels
    # roll brings the first column to the end, where it is never used because the last position has no target.
    targets = targets.roll(-1, dims=1).long()
    has_target = torch.arange(length, device=input_ids.device) < length - 1
    if labels is not None:
        has_target = has_target & (targets != _HF_IGNORED)
    following = input_ids.roll(-1, dims=1)
    for placeholder in placeholders:
        has_target = has_target & (following != placeholder)
    if attention_mask is not None:
        _check_integers("attention_mask", attention_mask, input_ids, {(batch, length)}, or_bool=True)
        real = attention_mask != 0
        has_target = has_target & real & real.roll(-1, dims=1)
    if position_ids is not None:
        _check_integers("position_ids", position_ids, input_ids, {(batch, length), (1, length)})
        has_target = has_target & (position_ids.roll(-1, dims=1) == position_ids + 1)
    return torch.where(has_target, targets, ignore_index)


def _check_integers(name: str, tensor: Tensor, input_ids: Tensor, shapes: set[tuple[int, int]], or_bool: bool = False) -> None:
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {' or '.join(map(str, sorted(shapes)))} as input_ids has")
    if tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and not or_bool):
        raise TypeError(f"{name} has dtype {tensor.dtype}, wanted {'bool or ' if or_bool else ''}an integer type")
    if tensor.device != input_ids.device:
        raise ValueError(f"{name} is on {tensor.device}, wanted {input_ids.device}, where input_ids is")
