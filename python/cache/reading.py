"""Reading a teacher cache: rows by number or by their token ids, memory-mapped, in any number of workers."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill_kernels.api.cache import layout, mapped_shards, token_rows, whole_files
from distill_kernels.api.cache.layout import CacheError, CachePlan, Manifest
from distill_kernels.api.cache.mapped_shards import MappedShards
from distill_kernels.api.cache.teacher_pass import PAD_ID, restore_hidden
from distill_kernels.api.cache.token_rows import TokenRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tail = Literal["bucket", "renormalise", "ignore"]  # what is done with the tokens that a top-k cache has not kept

HASHED_BYTES = 2**20  # at a time
PADDING = {"top_ids": -1}  # of a column where there is no token; 0 elsewhere


@dataclass(frozen=True, eq=False)
class CachedHead:
    """The teacher's LM head: logits are softcap(logit_scale · (hidden @ weight.T + bias))."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    def to(self, device: torch.device) -> "CachedHead":
        bias = None if self.bias is None else self.bias.to(device)
        return CachedHead(self.weight.to(device), bias, self.logit_scale, self.softcap)


@dataclass(frozen=True, eq=False)
class CachedTeacher:
    """A teacher's outputs for a batch, in the place of a run of the teacher; 0 where the batch is padded.

    Of a cache of hidden states: hidden (B, S, D) in the dtype of `head`, logsumexp and entropy (B, S) float32, of the logits divided by
    `temperature`. Of a top-k cache: top_ids (B, S, k) int64, -1 where the batch is padded, top_logprobs (B, S, k) and tail_mass (B, S)
    float32, at that temperature. The others are None.
    """

    temperature: float
    hidden: Tensor | None = None
    head: CachedHead | None = None
    logsumexp: Tensor | None = None
    entropy: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    tail_mass: Tensor | None = None

    def as_teacher(self) -> dict[str, Any]:
        """The teacher's keyword arguments of distillation_loss, exact over the full vocabulary and at any temperature."""
        if self.hidden is None:
            raise CacheError("a top-k cache has no hidden states; use sparse_distillation_loss(**as_sparse_teacher(tail))")
        return {"teacher_hidden": self.hidden, **{f"teacher_{name}": value for name, value in vars(self.head).items()}}

    def as_sparse_teacher(self, tail: Tail) -> dict[str, Any]:
        """The teacher's keyword arguments of sparse_distillation_loss, `tail` among them; with "bucket" the tail's mass as it was kept."""
        if self.top_ids is None:
            raise CacheError("a cache of hidden states has no lists of tokens; use distillation_loss(**as_teacher())")
        mass = {"teacher_tail_mass": self.tail_mass} if tail == "bucket" else {}
        lists = {"teacher_ids": self.top_ids, "teacher_logprobs": self.top_logprobs, "teacher_temperature": self.temperature}
        return {"tail": tail, **lists, **mass}


class TeacherCache:
    """A teacher's outputs over a data set, as write_teacher_cache left them; made by `TeacherCache.open`.

    Rows are read from memory-mapped files when they are asked for. The object can be pickled to other processes, which open the files
    themselves.

    Example
        >>> cache = TeacherCache.open(folder, tokenizer=tokenizer)
        >>> for batch in DataLoader(cache.dataset(), batch_size=8, shuffle=True, collate_fn=cache.collate, num_workers=2):
        ...     learned = run_backbone(student, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        ...     labels = next_token_labels(batch["input_ids"], attention_mask=batch["attention_mask"])
        ...     loss = distillation_loss(**learned.as_student(), **cache.teacher_output(batch).as_teacher(), labels=labels)
    """

    def __init__(self, path: Path, plan: CachePlan, files: list[Manifest]) -> None:
        self.path, self.plan = path, plan
        self._files = files
        self._shards = MappedShards(path, plan)
        self._heads: dict[torch.device, CachedHead] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        vocabulary: int | None = None,
        rows: TokenRows | Tensor | Iterable[Sequence[int]] | None = None,
    ) -> "TeacherCache":
        """Open a whole cache: its index, and the size and header of every file are checked. `verify` reads all of them.

        tokenizer, vocabulary, rows: of the student and its data set; a cache of another is refused. None: not compared.

        Raises CacheError naming the file, and what was found and wanted.
        """
        layout.check_packages("safetensors")
        path = Path(path)
        plan, files = _index(path)
        if [file["name"] for file in files] != list(plan.files):
            raise CacheError(f"{path / layout.INDEX} is damaged: its list of files does not fit its plan")
        for place, file in enumerate(files):
            # The head comes first, where there is one.
            shard = place - (plan.kind == "hidden")
            mapped_shards.check_file(path, plan, file, None if shard < 0 else shard)
        if vocabulary is not None and vocabulary != plan.vocabulary:
            raise CacheError(f"{path} is of a teacher with {plan.vocabulary} vocabulary entries, wanted {vocabulary}")
        if tokenizer is not None and plan.tokenizer_sha256 is None:
            raise CacheError(f"{path} was written without its tokenizer, so that {type(tokenizer).__name__} cannot be compared; pass None")
        if tokenizer is not None and token_rows.tokenizer_sha256(tokenizer) != plan.tokenizer_sha256:
            raise CacheError(f"{path} is of another tokenizer: its tokens or their ids differ")
        if rows is not None and (given := TokenRows.of(rows)).sha256() != plan.dataset_sha256:
            raise CacheError(
                f"{path} is of another data set: it has {plan.rows} rows of {plan.tokens} tokens, wanted {len(given)} rows of "
                f"{len(given.ids)} tokens, of the same ids in the same order"
            )
        return cls(path, plan, files)

    def __len__(self) -> int:
        """Rows."""
        return self.plan.rows

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped or found: another process opens the files itself."""
        return {"path": self.path, "plan": self.plan, "files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TeacherCache.__init__(self, **state)

    def verify(self) -> None:
        """Read every file and compare its sha256 with the index. Raises CacheError naming those that differ."""
        wrong = [file["name"] for file in self._files if _sha256(self.path / file["name"]) != file["sha256"]]
        if wrong:
            raise CacheError(f"{self.path}: the contents of {', '.join(wrong)} have changed since they were written")

    @property
    def head(self) -> CachedHead:
        """The teacher's LM head, memory-mapped on the CPU. Raises CacheError for a top-k cache, which has none."""
        return self.head_on(torch.device("cpu"))

    def head_on(self, device: torch.device) -> CachedHead:
        """The head on a device, moved there once."""
        if self.plan.kind != "hidden":
            raise CacheError(f"{self.path} is a top-k cache, which has no head")
        if device not in self._heads:
            if device.type == "cpu":
                with mapped_shards.open_file(self.path / layout.HEAD) as file:
                    tensors = {name: file.get_tensor(name) for name in self.plan.head_columns()}
                head = CachedHead(tensors["weight"], tensors.get("bias"), self.plan.logit_scale, self.plan.softcap)
            else:
                head = self.head.to(device)
            self._heads[device] = head
        return self._heads[device]

    def lengths(self) -> Tensor:
        """Tokens of every row, (rows,) int64."""
        return torch.cat([torch.tensor(self._shards.of(shard).offsets).diff() for shard in range(len(self.plan.shard_rows))])

    def dataset(self) -> "CachedRows":
        """A torch Dataset of the rows in their order, for a DataLoader with collate_fn=cache.collate."""
        return CachedRows(self)

    def row(self, row: int) -> dict[str, Any]:
        """One row as it is stored: "row", "input_ids" (length,) int64 and, named "teacher_...", what is kept of the teacher.

        Raises IndexError, or CacheError if its token ids are not those that were written.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, there is no row {row}")
        return self._shards.row(row)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of rows, padded on the right to the longest: row (B,), input_ids and attention_mask (B, S) int64, and the teacher's."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        input_ids = _lay_out([row["input_ids"] for row in rows], mask, PAD_ID)
        numbers = torch.tensor([row["row"] for row in rows])
        return {"row": numbers, "input_ids": input_ids, "attention_mask": mask.long(), **_teacher_columns(rows, mask)}

    def find(self, input_ids: Tensor) -> int | None:
        """The number of the row of these token ids (length,), or None if there is none; of several alike, any."""
        hashes, rows = self._rows_by_hash
        wanted = token_rows.row_hash(input_ids)
        place = int(torch.searchsorted(hashes, wanted))
        return int(rows[place]) if place < len(hashes) and int(hashes[place]) == wanted else None

    def teacher_output(self, batch: Mapping[str, Any]) -> CachedTeacher:
        """The teacher's outputs for a batch, where they were computed by running the teacher before; on the batch's device.

        batch: input_ids (B, S), attention_mask (B, S) if rows are padded (on either side), and possibly row (B,), the numbers of the rows.
        Batches made by `collate` bring the outputs with them; for others they are read here, from the rows named, or else from those with
        the same token ids. Ids are always compared, on the CPU.

        Raises
            CacheError: a row of the batch has other ids than its row of the cache, or is in no row; it is named.
        """
        input_ids, mask = _ids_and_mask(batch)
        device = input_ids.device
        on_cpu, mask_on_cpu = input_ids.cpu(), mask.cpu()
        ids = [on_cpu[i][mask_on_cpu[i]] for i in range(len(on_cpu))]
        names = [f"teacher_{name}" for name in self.plan.token_columns()]
        columns: dict[str, Tensor] = {name: batch[name] for name in names if batch.get(name) is not None}
        missing = sorted(set(names) - columns.keys())
        if missing and columns:
            raise CacheError(f"the batch has some columns of a teacher but not {', '.join(missing)}; it is of another cache")
        if not missing and not bool((mask_on_cpu == (mask_on_cpu.cumsum(1) == torch.arange(1, mask.shape[1] + 1))).all()):
            raise CacheError("the batch brings a teacher's columns, which are padded on the right, but its attention_mask is not")
        numbers = self._row_numbers(batch.get("row"), ids)
        for i, number in enumerate(numbers):
            if self._shards.hash(number) != token_rows.row_hash(ids[i]):
                raise CacheError(f"row {i} of the batch has other token ids than row {number} of {self.path}, which it is said to be")
        if missing:
            columns = _teacher_columns([self._shards.row(number) for number in numbers], mask_on_cpu)
        columns = {name.removeprefix("teacher_"): column.to(device) for name, column in columns.items()}
        if self.plan.kind == "top-k":
            return CachedTeacher(
                self.plan.temperature, top_ids=columns["top_ids"].long(), top_logprobs=columns["top_logprobs"].float(),
                tail_mass=columns["tail_mass"],
            )  # fmt: skip
        head = self.head_on(device)
        hidden = restore_hidden(columns["hidden"], columns.get("hidden_scale"), self.plan.hidden_dim, head.weight.dtype)
        return CachedTeacher(self.plan.temperature, hidden, head, columns["logsumexp"], columns["entropy"])

    def _row_numbers(self, given: Tensor | None, ids: list[Tensor]) -> list[int]:
        numbers: list[int] = []
        if given is not None:
            numbers = given.tolist()
            if len(numbers) != len(ids):
                raise CacheError(f"the batch has {len(ids)} rows but {len(numbers)} row numbers")
            beyond = [number for number in numbers if not 0 <= number < len(self)]
            if beyond:
                raise CacheError(f"{self.path} has {len(self)} rows, there is no row {beyond[0]}")
            return numbers
        for i, row in enumerate(ids):
            number = self.find(row)
            if number is None:
                begin = ", ".join(map(str, row[:8].tolist()))
                raise CacheError(f"row {i} of the batch, {len(row)} token ids beginning {begin}, is in no row of {self.path}")
            numbers.append(number)
        return numbers

    @cached_property
    def _rows_by_hash(self) -> tuple[Tensor, Tensor]:
        """All rows' hashes (rows,) int64, rising, and whose they are."""
        return torch.cat([self._shards.of(shard).hashes for shard in range(len(self.plan.shard_rows))]).sort()


class CachedRows(Dataset[dict[str, Any]]):
    """The rows of a cache as items; see TeacherCache.dataset."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.cache.row(row)


def _index(path: Path) -> tuple[CachePlan, list[Manifest]]:
    content = whole_files.read(path / layout.INDEX)
    if content is not None:
        return layout.parse(str(path / layout.INDEX), content)
    content = whole_files.read(path / layout.UNFINISHED)
    if content is None:
        raise CacheError(f"{path} holds no teacher cache: there is no {layout.INDEX}")
    plan, _ = layout.parse(str(path / layout.UNFINISHED), content)
    whole = whole_files.manifests(path, plan).keys() - {layout.HEAD}
    raise CacheError(
        f"{path} is an unfinished cache with {len(whole)} of {len(plan.shard_rows)} shards; call write_teacher_cache, or the command that "
        "began it, again to go on"
    )


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASHED_BYTES):
            total.update(block)
    return total.hexdigest()


def _ids_and_mask(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(B, S) both; the mask is bool."""
    input_ids = batch.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        got = f"shape {tuple(input_ids.shape)} {input_ids.dtype}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise CacheError(f'the batch has "input_ids" of {got}, wanted integers (batch, sequence)')
    mask = batch.get("attention_mask")
    if mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    if mask.shape != input_ids.shape:
        raise CacheError(f"attention_mask has shape {tuple(mask.shape)}, wanted {tuple(input_ids.shape)} as input_ids has")
    return input_ids, mask != 0


def _teacher_columns(rows: list[dict[str, Any]], mask: Tensor) -> dict[str, Tensor]:
    names = [name for name in rows[0] if name.startswith("teacher_")]
    return {name: _lay_out([row[name] for row in rows], mask, PADDING.get(name.removeprefix("teacher_"), 0)) for name in names}


def _lay_out(columns: list[Tensor], mask: Tensor, padding: int) -> Tensor:
    """(B, S, ...) with each row's (length, ...) where the mask (B, S) is true, in order."""
    packed = torch.cat(columns)
    out = packed.new_full((*mask.shape, *packed.shape[1:]), padding)
    out[mask] = packed
    return out
