"""What the folder of a teacher cache holds, and how large it will be.

    index.json            the plan, and every file with its size and sha256; written last, so that a folder with one is whole
    head.safetensors      weight (V, D), and bias (V,) if there is one; of the kind "hidden" only
    shard-00000.safetensors, ...  a run of whole rows each

A shard of T tokens in R rows:

    token_ids (T,) int32, offsets (R + 1,) int64, row_hash (R,) int64     rows are packed: row i is offsets[i] to offsets[i + 1]
    of the kind "hidden":   hidden (T, D) float32, bfloat16 or float16, or int8 rows with hidden_scale (T,) float32 (see int8_rows);
                            logsumexp (T,) and entropy (T,) float32, of the logits of these hidden states, divided by the temperature
    of the kind "top-k":    top_ids (T, k) int32, top_logprobs (T, k) float32 or float16, falling; tail_mass (T,) float32: the
                            probability of all other tokens

and in its header the fingerprint of the plan and its own number, so that a shard of another cache, or in another's place, is told.

While a cache is being written, unfinished.json holds the plan, and NAME.json beside each whole file its size and sha256. Shards begin and
end where the plan says, whoever writes them: that is a function of the rows' lengths and `shard_mib` alone.
"""

import hashlib
import importlib.util
import itertools
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from distill_kernels.api.user_error import UserError
from distill_kernels.estimators.quantised import padded_dim

FORMAT, VERSION = "distill_kernels teacher cache", 1
INDEX, UNFINISHED, HEAD = "index.json", "unfinished.json", "head.safetensors"
METADATA = "distill_kernels"  # the only key: several would be written in an order that changes from run to run
HEADER_BYTES = 1024  # of a shard or a head, at most; one line of the index is below that, too

Kind = Literal["hidden", "top-k"]
Dtype = Literal["float32", "bfloat16", "float16", "int8"]  # of what is kept
Columns = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of tensors, by their names

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int8", "int32", "int64")}
# And their dtypes, the default first.
KINDS: dict[str, tuple[Dtype, ...]] = {"hidden": ("bfloat16", "float16", "float32", "int8"), "top-k": ("float32", "float16")}


class Manifest(TypedDict):
    """What is known of a whole file."""

    name: str
    bytes: int
    sha256: str


class CacheError(UserError):
    """A teacher cache cannot be written or read as asked; the message names the file, the row or the option."""


def check_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise CacheError(f'teacher caches need {", ".join(missing)}: pip install "distill_kernels[train]"')


def shard_name(shard: int) -> str:
    return f"shard-{shard:05}.safetensors"


@dataclass(frozen=True)
class CachePlan:
    """What is to be written: a cache is continued, and its shards belong to it, if all of this is the same."""

    kind: Kind
    dtype: Dtype  # of the hidden states or of the log-probabilities
    top_k: int  # 0 for hidden states
    temperature: float
    vocabulary: int
    hidden_dim: int
    head_dtype: str
    has_bias: bool
    logit_scale: float
    softcap: float | None
    batch_size: int  # rows that the teacher runs over at a time: the last bits of its results depend on it
    teacher: str  # its fingerprint
    tokenizer_sha256: str | None
    dataset_sha256: str
    shard_rows: tuple[int, ...]
    shard_tokens: tuple[int, ...]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(to_json(asdict(self))).hexdigest()

    @property
    def rows(self) -> int:
        return sum(self.shard_rows)

    @property
    def tokens(self) -> int:
        return sum(self.shard_tokens)

    def shard_columns(self, shard: int) -> Columns:
        """dtype and shape of every tensor of a shard."""
        rows, tokens = self.shard_rows[shard], self.shard_tokens[shard]
        return {
            "offsets": (torch.int64, (rows + 1,)),
            "row_hash": (torch.int64, (rows,)),
            "token_ids": (torch.int32, (tokens,)),
            **{name: (dtype, (tokens, *shape)) for name, (dtype, shape) in self.token_columns().items()},
        }

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """Number of each shard's first row, and at the end of all rows."""
        return (0, *itertools.accumulate(self.shard_rows))

    def token_columns(self) -> Columns:
        """dtype and shape of what is kept of the teacher for one token."""
        dtype = DTYPES[self.dtype]
        if self.kind == "top-k":
            return {
                "top_ids": (torch.int32, (self.top_k,)),
                "top_logprobs": (dtype, (self.top_k,)),
                "tail_mass": (torch.float32, ()),
            }
        width = padded_dim(self.hidden_dim) if self.dtype == "int8" else self.hidden_dim
        scale: Columns = {"hidden_scale": (torch.float32, ())} if self.dtype == "int8" else {}
        return {"hidden": (dtype, (width,)), **scale, "logsumexp": (torch.float32, ()), "entropy": (torch.float32, ())}

    def token_bytes(self) -> int:
        """Of one token in a shard."""
        return DTYPES["int32"].itemsize + _column_bytes(self.token_columns())

    def head_columns(self) -> Columns:
        """dtype and shape of the tensors of the head; none where it is not stored."""
        if self.kind == "top-k":
            return {}
        dtype = DTYPES[self.head_dtype]
        bias: Columns = {"bias": (dtype, (self.vocabulary,))} if self.has_bias else {}
        return {"weight": (dtype, (self.vocabulary, self.hidden_dim)), **bias}

    @cached_property
    def files(self) -> dict[str, int]:
        """Name and size in bytes, at most, of every file but the index; the head first. Real ones have shorter headers."""
        head = {HEAD: _column_bytes(self.head_columns()) + HEADER_BYTES} if self.kind == "hidden" else {}
        shards = {shard_name(i): _column_bytes(self.shard_columns(i)) + HEADER_BYTES for i in range(len(self.shard_rows))}
        return head | shards

    def differences(self, other: "CachePlan") -> str:
        """In words: what `other` has otherwise."""
        words = []
        for field in fields(self):
            ours, others = getattr(self, field.name), getattr(other, field.name)
            if ours != others and not field.name.startswith("shard_"):
                words.append(f"{field.name} {_brief(others)} where {_brief(ours)} is wanted")
        return ", ".join(words) or "shards of another size (shard_mib)"


def _brief(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 20 else repr(value)


def _column_bytes(columns: Columns) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in columns.values())


def shard_grid(lengths: Tensor, token_bytes: int, shard_bytes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and tokens of each shard: as many whole rows as `shard_bytes` have room for, one at least."""
    rows: list[int] = []
    tokens: list[int] = []
    most = max(1, shard_bytes // token_bytes)
    for length in lengths.tolist():
        if not rows or tokens[-1] + length > most:
            rows.append(0)
            tokens.append(0)
        rows[-1] += 1
        tokens[-1] += length
    return tuple(rows), tuple(tokens)


def to_json(content: Any) -> bytes:
    """The same bytes for the same content."""
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def metadata(plan: CachePlan, shard: int | None) -> dict[str, str]:
    """In the header of a shard, or of the head (None)."""
    return {METADATA: json.dumps({"plan": plan.fingerprint, "shard": shard})}


def index_content(plan: CachePlan, files: list[Manifest]) -> dict[str, Any]:
    """`files`: name, bytes and sha256 of each, in the order of plan.files."""
    return {"format": FORMAT, "version": VERSION, "plan": asdict(plan), "files": files}


def parse(where: str, data: bytes) -> tuple[CachePlan, list[Manifest]]:
    """The plan and the files of an index or of unfinished.json, which `where` names. Raises CacheError unless it is one."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise CacheError(f"{where} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CacheError(f"{where} is not the index of a teacher cache")
    if content.get("version") != VERSION:
        raise CacheError(f"{where} is of version {content.get('version')!r} of the format, and this library reads version {VERSION}")
    try:
        values = content["plan"]
        plan = CachePlan(**values | {name: tuple(values[name]) for name in ("shard_rows", "shard_tokens")})
        files = [_manifest(file) for file in content["files"]]
        known = plan.kind in KINDS and plan.dtype in KINDS[plan.kind] and plan.head_dtype in DTYPES
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    if not known or len(plan.shard_rows) != len(plan.shard_tokens):
        raise CacheError(f"{where} is damaged: its plan does not make sense")
    return plan, files


def _manifest(content: Any) -> Manifest:
    return {"name": str(content["name"]), "bytes": int(content["bytes"]), "sha256": str(content["sha256"])}


def parse_manifest(data: bytes) -> Manifest | None:
    """Name, bytes and sha256 of a whole file; None if the manifest is damaged."""
    try:
        return _manifest(json.loads(data))
    except (KeyError, TypeError, ValueError):
        return None
