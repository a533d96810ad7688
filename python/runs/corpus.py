"""Text split into training and held-out documents, and those into windows of token ids."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distill_kernels.api.user_error import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_FRACTION = 0.2  # of the characters
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Documents:
    """Documents of which each is trained on or held out as a whole."""

    train: list[str]
    held_out: list[str]
    split: str  # how they were divided, in words


def split_documents(path: Path | None, seed: int, *, field: str = "text", held_out: Path | None = None) -> Documents:
    """The documents of a file, its last fifth held out, or those of Python's own reference manual if `path` is None.

    path: UTF-8 text, of which the held-out part begins after a blank line, or JSON lines (.jsonl), each a document in `field`.
    held_out: a file of the same kinds, which is then what is held out, whole.
    seed: of the shuffled topics of the manual; files are divided in their own order.
    """
    if path is None:
        if held_out is not None:
            raise UserError("--held-out needs --text, for the default text is split by itself")
        return _reference_manual(seed)
    if held_out is not None:
        split = f"{path} to train on, {held_out} held out"
        return Documents(read_documents(path, field, "--text"), read_documents(held_out, field, "--held-out"), split)
    return _last_held_out(path, field)


def read_documents(path: Path, field: str = "text", flag: str = "--text") -> list[str]:
    """All documents of a UTF-8 file: its lines' `field` if it is JSON lines, otherwise the one text that it is.

    Raises
        UserError: naming `flag`, the file and the line.
    """
    text = _read(path, flag)
    if path.suffix.lower() not in JSON_LINES:
        documents = [text.strip()]
    else:
        documents = [_field_of(line, field, f"{flag} {path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not any(documents):
        raise UserError(f"{flag} {path} is empty")
    return documents


def _read(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is not UTF-8: byte {error.start} cannot be decoded; convert the file first") from error
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from error


def _field_of(line: str, field: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        got = f"the fields {', '.join(value) or '(none)'}" if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: wanted an object with text in {field!r}, got {got}; --text-field names another field")
    return text


def _reference_manual(seed: int) -> Documents:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python comes without pydoc_data.topics, the default text; pass --text FILE") from error
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    wanted = HELD_OUT_FRACTION * sum(map(len, topics.values()))
    held_out: list[str] = []
    size = 0
    while size < wanted:
        held_out.append(names.pop())
        size += len(topics[held_out[-1]])
    split = f"pydoc_data.topics: {len(names)} topics to train on, {len(held_out)} whole topics held out (shuffled with seed {seed})"
    return Documents([topics[name] for name in names], [topics[name] for name in held_out], split)


def _last_held_out(path: Path, field: str) -> Documents:
    parts, kind = read_documents(path, field), "lines"
    if path.suffix.lower() not in JSON_LINES:
        parts, kind = [section for section in re.split(r"\n[ \t]*\n\s*", parts[0]) if section], "sections"
        if len(parts) == 1:
            raise UserError(f"--text {path} has no blank line, and the held-out part has to begin after one")
    elif len(parts) == 1:
        raise UserError(f"--text {path} has one line, and the held-out part has to be whole lines")
    # Neighbouring sections share names and phrases, so the held-out ones are the file's end rather than drawn from all over it.
    first, size = len(parts), 0
    while first > 1 and size < HELD_OUT_FRACTION * sum(map(len, parts)):
        first -= 1
        size += len(parts[first])
    split = f"{path}: the first {first} {kind} to train on, the last {len(parts) - first} held out"
    if kind == "lines":
        return Documents(parts[:first], parts[first:], split)
    return Documents(["\n\n".join(parts[:first])], ["\n\n".join(parts[first:])], f"{split} (a blank line ends a section)")


def windows(documents: list[str], tokenizer: "PreTrainedTokenizerBase", sequence_length: int) -> Tensor:
    """(n, sequence_length) int64 token ids; no window spans two documents, and what is left at a document's end is dropped."""
    rows: list[list[int]] = []
    for document in documents:
        # verbose=False: documents are longer than the model's context, but windows are not.
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        rows += [ids[start : start + sequence_length] for start in range(0, len(ids) - sequence_length + 1, sequence_length)]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, sequence_length)


def epochs(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Tensor:
    """(steps, batch_size) indices below `count`: every window is drawn once before any is drawn again."""
    passes = -(-steps * batch_size // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])[: steps * batch_size].view(steps, batch_size)


class Drawn(NamedTuple):
    """What a run reads."""

    train: Tensor  # (n, S) int64
    held_out: Tensor  # (m, S) int64
    order: Tensor  # (steps, B), rows of the former for each step


def draw(
    documents: Documents,
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    batch_size: int,
    steps: int,
    seed: int,
    held_out_tokens: int,
) -> Drawn:
    """Training windows (n, S), held-out windows (m, S), and rows of the former for each step (steps, B).

    n counts the windows that `steps` steps need; m · S is `held_out_tokens` at most, unless one window is more. Raises UserError if there
    are none.
    """
    pools = [windows(part, tokenizer, sequence_length) for part in (documents.train, documents.held_out)]
    if not all(map(len, pools)):
        raise UserError(
            f"the text is too short: it has {len(pools[0])} windows of {sequence_length} tokens to train on and {len(pools[1])} held out, "
            "wanted at least one of each; pass a longer --text or a smaller --sequence-length"
        )
    generator = torch.Generator().manual_seed(seed)
    order = epochs(len(pools[0]), batch_size, steps, generator)
    used, order = order.unique(return_inverse=True)
    held_out = torch.randperm(len(pools[1]), generator=generator)[: max(1, held_out_tokens // sequence_length)]
    return Drawn(pools[0][used], pools[1][held_out], order)
