"""Whether a model keeps documents apart that a batch has in one row: found out once, by some of them alone.

Of some architectures only some attention implementations do, or only with inputs that a collator does not make unless it is asked to, and
recurrences mostly do not. What the loss says of such a run looks healthy, for teacher and student err alike.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill_kernels.api.models.hidden_states import evaluating
from distill_kernels.api.models.measured_logits import coarsest

DOCUMENTS, TOKENS = 3, 64  # of a batch that are compared, and of each of them
# Model -> under which circumstances it was found to keep documents apart.
_checked: "weakref.WeakKeyDictionary[nn.Module, set[Any]]" = weakref.WeakKeyDictionary()


def check(model: Any, hidden: Callable[..., Tensor], inputs: Mapping[str, Any]) -> None:
    """Compares the hidden states of packed documents with theirs alone, if `inputs` are packed and it was not done before.

    hidden: (model, **inputs) -> (B, S, D).

    Raises ValueError where they differ by more than rounding, with how far, and what to do.
    """
    if torch.compiler.is_compiling() or not isinstance(inputs.get("input_ids"), Tensor):
        return
    circumstances = (getattr(model.config, "_attn_implementation", None), model.dtype, frozenset(_given(inputs)))
    checked = _checked.setdefault(model, set())
    if circumstances in checked:
        return
    documents = _some_documents(inputs)
    if documents is None:
        return
    row, spans = documents
    error, tolerance = _difference(model, hidden, inputs, row, spans)
    if error > tolerance:
        raise ValueError(_words(model, hidden, inputs, row, spans, error, tolerance))
    checked.add(circumstances)


def _given(inputs: Mapping[str, Any]) -> list[str]:
    return [name for name, value in inputs.items() if value is not None]


def _some_documents(inputs: Mapping[str, Any]) -> tuple[int, list[tuple[int, int]]] | None:
    """A row with more than one document, and where some of them begin and end; None if there is none, or inputs are not of text alone."""
    length = inputs["input_ids"].shape[1]
    starts = _starts(inputs)
    if starts is None or any(isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2 for value in inputs.values()):
        return None
    mask = inputs.get("attention_mask")
    real = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(starts)
    packed = (starts & real & real.roll(1, dims=1))[:, 1:].any(1)
    if not bool(packed.any()):  # waits for the device, in batches that may be packed and are not known to be right
        return None
    row = int(packed.nonzero()[0])
    begins = starts[row].nonzero().flatten().tolist()
    spans = [(begin, min(end, begin + TOKENS)) for begin, end in zip(begins, [*begins[1:], length], strict=True)]
    kept = [(begin, begin + int(real[row, begin:end].sum())) for begin, end in spans if real[row, begin]]
    return row, kept[:DOCUMENTS]


def _starts(inputs: Mapping[str, Any]) -> Tensor | None:
    """(B, S) bool: where a document begins, by whichever of a collator's ways to say so there is."""
    shape, device = inputs["input_ids"].shape, inputs["input_ids"].device
    positions, indices, bounds = (inputs.get(name) for name in ("position_ids", "seq_idx", "cu_seq_lens_q"))
    starts = torch.zeros(shape, dtype=torch.bool, device=device)
    starts[:, :1] = True
    if isinstance(positions, Tensor) and positions.dim() == 2:
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    elif isinstance(indices, Tensor):
        starts[:, 1:] = indices[:, 1:] != indices[:, :-1]
    elif isinstance(bounds, Tensor) and shape[0] == 1:
        starts[0, bounds[:-1].long()] = True
    else:
        return None
    return starts


def _difference(
    model: Any, hidden: Callable[..., Tensor], inputs: Mapping[str, Any], row: int, spans: list[tuple[int, int]]
) -> tuple[float, float]:
    """By how much the hidden states of a document's tokens differ from those of the document alone, relative; and what rounding may do.

    In 32 bits that of the worst token. In 16 bits rounding can send a token to another expert, so it is that of half of the tokens.
    """
    ids = inputs["input_ids"]
    with torch.no_grad(), evaluating(model):
        packed = hidden(model, **_cut(inputs, row, spans))[0].float().split([end - begin for begin, end in spans])
        alone = []
        for begin, end in spans:
            one = {"input_ids": ids[row : row + 1, begin:end]}
            positions = inputs.get("position_ids")
            if isinstance(positions, Tensor) and positions.dim() == 2:
                own = positions[min(row, len(positions) - 1), begin:end][None]
                one |= {} if int(own[0, 0]) == 0 else {"position_ids": own}
            alone.append(hidden(model, **one)[0].float())
    eps = coarsest(next(iter(model.parameters())), packed[0])
    worst = [
        ((got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)).quantile(1.0 if eps < 1e-4 else 0.5)
        for got, wanted in zip(packed, alone, strict=True)
    ]
    return float(torch.stack(worst).max()), eps**0.5


def _cut(inputs: Mapping[str, Any], row: int, spans: list[tuple[int, int]]) -> dict[str, Any]:
    """The documents of `spans` as a batch of one row, packed as they were."""
    rows, length = inputs["input_ids"].shape
    device = inputs["input_ids"].device
    index = torch.cat([torch.arange(begin, end, device=device) for begin, end in spans])
    bounds = torch.tensor([0, *(end - begin for begin, end in spans)], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    made: dict[str, Any] = {}
    for name, value in inputs.items():
        if name.startswith("cu_seq_lens"):
            made[name] = bounds
        elif name.startswith("max_length"):
            made[name] = int((bounds[1:] - bounds[:-1]).max())
        elif isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] in (1, rows) and length in value.shape[1:]:
            part = value[min(row, value.shape[0] - 1)][None]
            for dim in range(1, part.dim()):
                part = part.index_select(dim, index.to(part.device)) if part.shape[dim] == length else part
            made[name] = part
        else:
            made[name] = value
    return made


def _words(
    model: Any,
    hidden: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    row: int,
    spans: list[tuple[int, int]],
    error: float,
    tolerance: float,
) -> str:
    kind, attention = type(model).__name__, getattr(model.config, "_attn_implementation", None)
    begun = f"{kind}, with attention implementation {attention!r}, does not keep documents apart that are packed into one row"
    found = f"their hidden states differ from those of each document alone by {error:.2g} of their size (rounding: {tolerance:.0e})"
    if inputs.get("attention_mask") is not None:
        bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
        if _difference(model, hidden, bare, row, spans)[0] <= tolerance:
            return f"{begun} and come with an attention_mask: {found}; leave attention_mask out of packed batches, then it does"
    missing = [name for name in ("seq_idx", "cu_seq_lens_q") if inputs.get(name) is None]
    collator = {"seq_idx": "return_seq_idx=True", "cu_seq_lens_q": "return_flash_attn_kwargs=True"}
    others = ""
    if missing:
        asked = ", ".join(collator[name] for name in missing)
        others = f", or try DataCollatorWithFlattening({asked}), which recurrences and flash attention read where they have kernels for it"
    return f"{begun}: {found}. Pad instead, one document to a row; or load it with another attn_implementation{others}"
