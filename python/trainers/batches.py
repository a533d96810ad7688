"""What of a Trainer's batch is for whom: the inputs of each model, the tokens that are learned from, and their weights."""

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill_kernels.api.models.labels import next_token_labels
from distill_kernels.api.models.lm_head import without_peft

IGNORED = -100
TARGETS = ("labels", "shift_labels")
# 1 at tokens to learn from: of TRL's data sets, and of chat templates that mark what the assistant says.
MASKS = ("completion_mask", "assistant_masks")
WEIGHT = "token_weight"
OF_THE_LOSS = (*TARGETS, *MASKS, WEIGHT)
# What others call weights and masks. To leave them unread would be to learn from what they leave out.
NOT_READ = (
    "token_weights", "loss_weight", "loss_weights", "sample_weight", "sample_weights", "loss_mask", "labels_mask", "label_mask",
    "assistant_mask", "completion_masks", "prompt_mask", "response_mask",
)  # fmt: skip
# Where packed documents begin and end, which models take by way of **kwargs.
_PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def targets(batch: Mapping[str, Any], placeholders: Collection[int] = ()) -> Tensor:
    """Labels (B, S) of the next tokens, IGNORED where there is none to learn from; those that are shifted already are taken as they are.

    placeholders: ids of tokens in whose place a model reads images.
    """
    masks = {name: batch[name] for name in MASKS if batch.get(name) is not None}
    shifted: Tensor | None = batch.get("shift_labels")
    if shifted is not None:
        if masks:
            raise ValueError(f"the batch has shift_labels and {', '.join(masks)}; wanted the mask in the labels, as {IGNORED}")
        return shifted
    ids = batch.get("input_ids")
    if ids is None:
        raise ValueError(f"the batch has no input_ids (batch, sequence), only {', '.join(batch)}")
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if labels is not None and mask is not None and mask.dim() != 2:
        mask = None  # it says who attends to whom, and the labels alone where there is a target
    for name, learned in masks.items():
        _check_shape(name, learned, ids)
        labels = torch.where(learned != 0, ids if labels is None else labels, IGNORED)
    positions = batch.get("position_ids")
    if positions is not None and positions.dim() == 3:  # of text first, if there are four, then in time and in the plane of an image
        positions = positions[0] if len(positions) == 4 else None
    return next_token_labels(
        ids, labels=labels, attention_mask=mask, position_ids=positions, placeholders=placeholders, ignore_index=IGNORED
    )


def weights(batch: Mapping[str, Any]) -> Tensor | None:
    """token_weight (B, S) of the next tokens, as `targets` has them: a data set gives each token its own."""
    given = batch.get(WEIGHT)
    if given is None:
        return None
    if batch.get("shift_labels") is not None:
        raise ValueError(f"the batch has shift_labels and {WEIGHT}; wanted labels, which are shifted together with their weights")
    _check_shape(WEIGHT, given, batch["input_ids"])
    moved: Tensor = given.roll(-1, dims=1)
    return moved if moved.is_floating_point() else moved.float()


def _check_shape(name: str, tensor: Any, ids: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != ids.shape:
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} of the batch is {shape}, wanted {tuple(ids.shape)} as input_ids has")


def readable(ids: Tensor, rows: int, stand_in: int | None) -> Tensor:
    """input_ids that a model with so many embeddings can read, `stand_in` in the place of the others. Waits for the device.

    Raises ValueError where there are others, and there is no stand-in.
    """
    beyond = ids >= rows
    if stand_in is None and bool(beyond.any()):
        raise ValueError(
            f"the batch has token {int(ids.max())}, but the teacher reads {rows} tokens only; pass teacher_stand_in_id=, a token that "
            "it is to read in the place of those that it does not have, or leave out such rows"
        )
    return ids if stand_in is None else torch.where(beyond, stand_in, ids)


class Reader:
    """What a model's own forward takes of a batch."""

    def __init__(self, model: nn.Module):
        parameters = inspect.signature(type(without_peft(model)).forward).parameters.values()
        self.names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD} - {"self", *TARGETS}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            self.names.update(_PACKING)
        # Whether it takes them or not: what it does with packed documents is checked by them.
        self.names.add("position_ids")

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name in self.names}


def check_columns(names: Iterable[str]) -> None:
    """Raises ValueError where a data set or a batch has what looks like a weight or a mask, and is not read as one."""
    found = [name for name in names if name in NOT_READ]
    if found:
        raise ValueError(
            f"{', '.join(found)} would change nothing here: wanted weights of tokens as {WEIGHT}, and masks of the tokens to learn from as "
            f"{' or '.join(MASKS)}, or as {IGNORED} in labels; rename or remove the column"
        )


def check_read(batch: Mapping[str, Any], readers: Iterable[Reader], others: Collection[str]) -> None:
    """Raises ValueError where a batch has what neither the models nor the loss read."""
    check_columns(batch)
    unread = set(batch).difference(OF_THE_LOSS, others, *(reader.names for reader in readers))
    if unread:
        raise ValueError(
            f"the batch has {', '.join(sorted(unread))}, which neither a model's forward nor the loss takes; leave it out in the "
            "data_collator, or with remove_unused_columns=True, which drops a data set's columns that nobody takes"
        )
