"""What the demo reads: text split by topic into training and held-out windows of token ids."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill_kernels.api.user_error import UserError

HELD_OUT_FRACTION = 0.2  # of the characters


@dataclass(frozen=True)
class Documents:
    """Documents of which each is trained on or held out as a whole."""

    train: list[str]
    held_out: list[str]
    split: str  # how they were divided, in words


def read_documents(path: str | Path | None, seed: int) -> Documents:
    """The documents of a UTF-8 text file, or of Python's own reference manual if `path` is None."""
    return _reference_manual(seed) if path is None else _text_file(Path(path))


def _reference_manual(seed: int) -> Documents:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python comes without pydoc_data.topics, the demo's default text; pass --text FILE") from error
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    wanted = HELD_OUT_FRACTION * sum(map(len, topics.values()))
    held_out, size = [], 0
    while size < wanted:
        held_out.append(names.pop())
        size += len(topics[held_out[-1]])
    split = f"pydoc_data.topics: {len(names)} topics to train on, {len(held_out)} whole topics held out (shuffled with seed {seed})"
    return Documents([topics[name] for name in names], [topics[name] for name in held_out], split)


def _text_file(path: Path) -> Documents:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path} is not UTF-8: byte {error.start} cannot be decoded; convert the file first") from error
    except OSError as error:
        raise UserError(f"--text {path} cannot be read: {error.strerror}") from error
    sections = [section for section in re.split(r"\n[ \t]*\n\s*", text.strip()) if section]
    if not sections:
        raise UserError(f"--text {path} is empty")
    if len(sections) == 1:
        raise UserError(f"--text {path} has no blank line, and the held-out part has to begin after one")
    # Neighbouring sections share names and phrases, so the held-out ones are the file's end rather than drawn from all over it.
    first, size = len(sections), 0
    while first > 1 and size < HELD_OUT_FRACTION * sum(map(len, sections)):
        first -= 1
        size += len(sections[first])
    split = f"{path}: the first {first} sections to train on, the last {len(sections) - first} held out (a blank line ends a section)"
    return Documents(["\n\n".join(sections[:first])], ["\n\n".join(sections[first:])], split)


def windows(documents: list[str], tokenizer, sequence_length: int) -> Tensor:
    """(n, sequence_length) int64 token ids; no window spans two documents, and what is left at a document's end is dropped."""
    rows = []
    for document in documents:
        # verbose=False: documents are longer than the model's context, but windows are not.
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        rows += [ids[start : start + sequence_length] for start in range(0, len(ids) - sequence_length + 1, sequence_length)]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, sequence_length)


def epochs(count: int, batch_size: int, steps: int, generator: torch.Generator) -> Tensor:
    """(steps, batch_size) indices below `count`: every window is drawn once before any is drawn again."""
    passes = -(-steps * batch_size // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])[: steps * batch_size].view(steps, batch_size)
