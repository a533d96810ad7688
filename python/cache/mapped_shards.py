"""The shards of a cache in one process: checked, memory-mapped, and read row by row."""

import bisect
import json
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distill_kernels.api.cache import layout, token_rows
from distill_kernels.api.cache.layout import CacheError, CachePlan, Manifest

if TYPE_CHECKING:
    from safetensors import safe_open

OPEN_SHARDS = 64  # kept open by a process; each takes a file descriptor


class _Shard:
    """An open shard."""

    def __init__(self, path: Path, plan: CachePlan, shard: int) -> None:
        self.path, self.file = path, open_file(path)
        self.first_row = plan.first_rows[shard]
        self.offsets: list[int] = self.file.get_tensor("offsets").tolist()
        self.hashes = self.file.get_tensor("row_hash")
        steps = [end - begin for begin, end in zip(self.offsets, self.offsets[1:], strict=False)]
        if self.offsets[0] != 0 or self.offsets[-1] != plan.shard_tokens[shard] or min(steps) < 1:
            raise CacheError(f"{path} is damaged: its rows do not fit its tokens")

    def read(self, name: str, row: int) -> Tensor:
        begin, end = self.offsets[row - self.first_row : row - self.first_row + 2]
        rows: Tensor = self.file.get_slice(name)[begin:end]
        return rows


class MappedShards:
    """The shards of a cache that were used last, open. A forked process goes on with them: mapped files are only read."""

    def __init__(self, folder: Path, plan: CachePlan) -> None:
        self.folder, self.plan = folder, plan
        self.opened: OrderedDict[int, _Shard] = OrderedDict()

    def of(self, shard: int) -> _Shard:
        if shard not in self.opened:
            if len(self.opened) == OPEN_SHARDS:
                self.opened.popitem(last=False)
            self.opened[shard] = _Shard(self.folder / layout.shard_name(shard), self.plan, shard)
        self.opened.move_to_end(shard)
        return self.opened[shard]

    def with_row(self, row: int) -> _Shard:
        return self.of(bisect.bisect_right(self.plan.first_rows, row) - 1)

    def hash(self, row: int) -> int:
        shard = self.with_row(row)
        return int(shard.hashes[row - shard.first_row])

    def row(self, row: int) -> dict[str, Any]:
        shard = self.with_row(row)
        ids = shard.read("token_ids", row).long()
        if token_rows.row_hash(ids) != self.hash(row):
            raise CacheError(f"row {row} of {self.folder} is damaged: its token ids in {shard.path.name} are not those that were written")
        return {"row": row, "input_ids": ids, **{f"teacher_{name}": shard.read(name, row) for name in self.plan.token_columns()}}


def open_file(path: Path) -> "safe_open":
    """safetensors' reader. Raises CacheError if the file is not one, or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} cannot be read: {error}") from error


def check_file(folder: Path, plan: CachePlan, file: Manifest, shard: int | None) -> None:
    """Size and header of a file against the index and the plan; `shard` is its number, None that of the head."""
    path = folder / file["name"]
    if not path.exists():
        raise CacheError(f"{path} is missing; write the cache again")
    if (size := path.stat().st_size) != file["bytes"]:
        raise CacheError(f"{path} has {size} bytes where {file['bytes']} were written; write the cache again")
    with open_file(path) as opened:
        found = (opened.metadata() or {}).get(layout.METADATA)
        wanted = layout.metadata(plan, shard)[layout.METADATA]
        if found != wanted:
            raise CacheError(f"{path} is not the file that was written here: {_whose(found, plan)}")
        columns = plan.head_columns() if shard is None else plan.shard_columns(shard)
        if set(opened.keys()) != columns.keys():
            raise CacheError(f"{path} has the tensors {sorted(opened.keys())}, wanted {sorted(columns)}")
        for name, (_, shape) in columns.items():
            if tuple(opened.get_slice(name).get_shape()) != shape:
                raise CacheError(f"{path} has {name} of shape {tuple(opened.get_slice(name).get_shape())}, wanted {shape}")


def _whose(found: str | None, plan: CachePlan) -> str:
    try:
        content = json.loads(found or "")
        plan_found, shard = content["plan"], content["shard"]
    except (ValueError, KeyError, TypeError):
        return "it says nothing of a teacher cache"
    return "it is of another cache" if plan_found != plan.fingerprint else f"it says that it is shard {shard}"
