"""The data set of a teacher cache: rows of token ids, of any lengths; and what identifies it, its tokenizer and its teacher."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_kernels.api.cache.layout import CacheError
from distill_kernels.api.models.offloaded import present

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = NDArray[numpy.integer[Any]]

MOST_ID = 2**31 - 1  # what int32 holds
SAMPLED_ENTRIES = 4096  # of each of a model's tensors, for its fingerprint


class TokenRows(Sequence[Tensor]):
    """Rows of token ids, packed: row i is ids[offsets[i] : offsets[i + 1]].

    ids (tokens,) int32, offsets (rows + 1,) int64.
    """

    def __init__(self, ids: Tensor, offsets: Tensor) -> None:
        self.ids, self.offsets = ids, offsets

    @classmethod
    def of(cls, rows: "TokenRows | Tensor | Iterable[Sequence[int] | Tensor]") -> "TokenRows":
        """From a matrix of ids (rows, length), or from sequences of ids. Raises CacheError naming the first row that is none."""
        if isinstance(rows, cls):
            return rows
        if isinstance(rows, Tensor) and rows.dim() != 2:
            raise CacheError(f"rows is a tensor of shape {tuple(rows.shape)}, wanted token ids (rows, length)")
        arrays = [_token_ids(number, row) for number, row in enumerate(rows)]
        if not arrays:
            raise CacheError("there are no rows, wanted at least one row of token ids")
        offsets = torch.tensor([0, *(len(array) for array in arrays)], dtype=torch.int64).cumsum(0)
        return cls(torch.from_numpy(numpy.concatenate(arrays)), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, row: int) -> Tensor: ...

    @overload
    def __getitem__(self, row: slice) -> list[Tensor]: ...

    def __getitem__(self, row: int | slice) -> Tensor | list[Tensor]:
        """(length,) int64; of a slice, those of its rows."""
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.ids[self.offsets[row] : self.offsets[row + 1]].long()

    def lengths(self) -> Tensor:
        """(rows,) int64"""
        return self.offsets.diff()

    def sha256(self) -> str:
        """Of the data set: the ids of all rows, their lengths and their order."""
        ids, total = self.ids.numpy(), hashlib.sha256()
        for begin, end in itertools.pairwise(self.offsets.tolist()):
            total.update(_digest(ids[begin:end]))
        return total.hexdigest()

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises CacheError naming the first row with an id that is not below `vocabulary`."""
        beyond = (self.ids >= vocabulary).nonzero()
        if len(beyond):
            place = int(beyond[0])
            row = int(torch.searchsorted(self.offsets, place, right=True)) - 1
            raise CacheError(f"row {row} has the token id {int(self.ids[place])}, but the teacher's vocabulary has {vocabulary} entries")


def _token_ids(number: int, row: Sequence[int] | Tensor) -> IntArray:
    array = row.numpy(force=True) if isinstance(row, Tensor) else numpy.asarray(row)
    if array.ndim != 1 or len(array) == 0 or not numpy.issubdtype(array.dtype, numpy.integer):
        got = "nothing" if array.size == 0 else f"{array.dtype} of shape {array.shape}"
        raise CacheError(f"row {number} holds {got}, wanted one or more token ids")
    if array.min() < 0 or array.max() > MOST_ID:
        raise CacheError(f"row {number} has the token id {array.min() if array.min() < 0 else array.max()}, wanted 0 to {MOST_ID}")
    return array.astype(numpy.int32)


def _digest(ids: IntArray) -> bytes:
    """sha256 of ids (length,) as 8-byte little-endian integers."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).digest()


def row_hash(ids: Tensor) -> int:
    """The first 8 bytes of the sha256 of a row's ids, as an int64."""
    return int.from_bytes(_digest(ids.numpy(force=True))[:8], "little", signed=True)


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Of the tokens and their ids: tokenizers that agree in these give distributions over one vocabulary."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """sha256 of the names, shapes and dtypes of a model's tensors and of up to 4096 evenly spaced entries of each.

    It tells a teacher from another or from one that was trained further; it does not vouch for every weight.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # what a module keeps beside its tensors
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # Odd, so that it is no multiple of a matrix's width: it would then see a single column.
        step = (tensor.numel() // SAMPLED_ENTRIES) | 1
        with present(model, name, tensor) as values:
            entries = values.detach().reshape(-1)[::step][:SAMPLED_ENTRIES].cpu().contiguous()
        total.update(entries.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def cut(documents: list[str], tokenizer: "PreTrainedTokenizerBase", sequence_length: int) -> TokenRows:
    """Rows of at most `sequence_length` tokens, from documents tokenised without special tokens; none spans two documents.

    A row of a single token, from which nothing can be predicted, is left out. Raises CacheError if nothing is left.
    """
    rows: list[list[int]] = []
    for document in documents:
        # verbose=False: documents are longer than the model's context, but rows are not.
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        rows += [ids[start : start + sequence_length] for start in range(0, len(ids), sequence_length)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise CacheError(f"the text has no row of two tokens (sequence length {sequence_length})")
    return TokenRows.of(rows)
