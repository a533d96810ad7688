"""Writing a teacher cache: whole shards on a fixed grid, so that whoever dies, and however many write, the same files come of it."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

import torch
from torch import Tensor, nn

from distill_kernels.api.cache import layout, teacher_pass, token_rows, whole_files
from distill_kernels.api.cache.layout import CacheError, CachePlan, Dtype, Kind, Manifest
from distill_kernels.api.cache.token_rows import TokenRows
from distill_kernels.api.cache.whole_files import WriterLock, write_whole
from distill_kernels.api.models.backbone import BackboneOutput, run_backbone
from distill_kernels.api.models.offloaded import input_device
from distill_kernels.call import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Run = Callable[..., BackboneOutput]  # of a teacher, over input_ids (B, S) and, where rows are padded, attention_mask (B, S)


@dataclass(frozen=True)
class CacheReport:
    """What a call of write_teacher_cache has done, and how much is still to be done by other ranks."""

    path: str
    complete: bool  # the index is there: TeacherCache.open(path) works
    rows: int
    tokens: int
    shards: int
    shards_written: int  # by this call
    shards_kept: int  # that were whole when it began, of all ranks
    predicted_bytes: int  # of the whole cache, at most


def write_teacher_cache(
    teacher: nn.Module | Run,
    rows: TokenRows | Tensor | Iterable[Sequence[int]],
    output: str | Path,
    *,
    kind: Kind = "hidden",
    dtype: Dtype | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    batch_size: int = 8,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    fingerprint: str | None = None,
    shard_mib: float = 256,
    workspace_mib: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    progress: bool = False,
    predict_only: bool = False,
) -> CacheReport:
    """Run a teacher over a data set once, and keep what distillation needs of it, to be read by TeacherCache.

    kind "hidden" keeps the hidden state of every token, the LM head once, and the log-sum-exp and entropy of every token's tempered
    logits: distillation over the full vocabulary, at any temperature. kind "top-k" keeps the k most probable tokens, their tempered
    log-probabilities and the probability of all others.

    A call that was killed, or ended with an error, is repeated to go on: whole shards are kept, and the files come out the same, byte for
    byte, on the same hardware and with the same number of threads. Under torchrun (torch.distributed initialised) every rank writes
    its own shards, and the last to finish the index; the files are the same for any number of ranks. The folder must be one that all ranks
    see.

    Arguments
        teacher: a causal language model of transformers, in evaluation mode; or a function of input_ids (B, S) and, where rows are padded,
            attention_mask (B, S) that returns a BackboneOutput. float32, bfloat16 or float16.
        rows: token ids, a matrix (rows, length) or rows of any lengths.
        output: the folder, new or of an earlier call.
        dtype: of hidden states: "bfloat16" (default; exact for a teacher of that dtype), "float16", "float32", or "int8" with a scale for
            each token (see int8_rows); of log-probabilities: "float32" (default) or "float16".
        top_k: for kind "top-k", and required there.
        temperature: of log-sum-exp, entropy and log-probabilities.
        batch_size: rows that the teacher runs over at a time.
        tokenizer: of the rows, a transformers one; its hash is kept, so that a cache of another is refused. None: nothing is kept.
        fingerprint: what identifies the teacher; by default made from its weights, required for a function.
        shard_mib: size of a shard, which is held in memory until it is whole. Ranks beyond the number of shards have nothing to do.
        workspace_mib: memory for logits, as in distillation_loss.
        rank, world_size: of this process, by default torch.distributed's, or 0 of 1.
        progress: show a bar (tqdm).
        predict_only: write nothing; the report says how large the cache will be, and how much of it is there.

    Raises
        CacheError: before any work, if an argument or a row is bad, the vocabulary too small for a row, the disk too small, a package
            missing, or the folder holds something else, another cache or another writer; later, if a file cannot be written, for instance
            to a full disk.
        TypeError, ValueError: a number is not one that makes sense.

    Example
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=1000)
        >>> report = write_teacher_cache(LlamaForCausalLM(config).eval(), torch.randint(1000, (16, 32)), folder)
        >>> cache = TeacherCache.open(folder)
    """
    layout.check_packages("safetensors", *(["tqdm"] if progress else []))
    rank, world_size = _place(rank, world_size)
    checks.finite_number("temperature", temperature, above=0)
    checks.finite_number("shard_mib", shard_mib, above=0)
    checks.integer("batch_size", batch_size, least=1)
    rows = TokenRows.of(rows)
    run, fingerprint = _teacher(teacher, fingerprint)
    with torch.no_grad():
        head = run(input_ids=rows[0][None, :1].to(_device(teacher)))
    tokenizer_sha256 = None if tokenizer is None else token_rows.tokenizer_sha256(tokenizer)
    asked = _Asked(temperature=float(temperature), batch_size=batch_size, teacher=fingerprint, tokenizer_sha256=tokenizer_sha256)
    plan = _plan(head, rows, asked, kind=kind, dtype=dtype, top_k=top_k, shard_bytes=int(shard_mib * 2**20))
    folder = Path(output)
    files = plan.files
    report = partial(
        CacheReport, path=str(folder), rows=plan.rows, tokens=plan.tokens, shards=len(plan.shard_rows), predicted_bytes=sum(files.values())
    )
    whole = _whole_files(folder, plan)
    complete = (folder / layout.INDEX).exists()
    kept = len(plan.shard_rows) if complete else len(whole.keys() - {layout.HEAD})
    if predict_only:
        return report(complete=complete, shards_written=0, shards_kept=kept)
    if not complete:
        _check_room(folder, sum(bytes for name, bytes in files.items() if name not in whole))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"{folder} cannot be made: {error.strerror}") from error
    with WriterLock(folder, rank, world_size) as lock:
        whole = _whole_files(folder, plan)
        write = partial(_write, folder, plan, writer=lock.name)
        written = 0
        if not (folder / layout.INDEX).exists():
            if not (folder / layout.UNFINISHED).exists():
                write_whole(folder / layout.UNFINISHED, layout.to_json(layout.index_content(plan, [])), lock.name)
            if rank == 0 and layout.HEAD in files.keys() - whole.keys():
                tensors = {"weight": head.weight, "bias": head.bias}
                write(layout.HEAD, {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items() if tensor is not None})
            ours = [shard for shard in range(rank, len(plan.shard_rows), world_size) if layout.shard_name(shard) not in whole]
            with _bar(progress, sum(plan.shard_tokens[shard] for shard in ours)) as bar:
                for shard in ours:
                    columns = _shard(run, plan, rows, shard, head.weight.device, workspace_mib, bar)
                    write(layout.shard_name(shard), columns, shard=shard)
                    written += 1
        complete = _finish(folder, plan, lock.name)
    return report(complete=complete, shards_written=written, shards_kept=kept)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is None and world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if rank is None or world_size is None:
        raise CacheError(f"rank is {rank} and world_size {world_size}, wanted both or neither")
    checks.integer("rank", rank, least=0)
    checks.integer("world_size", world_size, least=1)
    if rank >= world_size:
        raise CacheError(f"rank is {rank}, wanted less than world_size, {world_size}")
    return rank, world_size


def _teacher(teacher: nn.Module | Run, fingerprint: str | None) -> tuple[Run, str]:
    if isinstance(teacher, nn.Module):
        if teacher.training:
            raise CacheError("teacher is in training mode, where dropout would be cached; call teacher.eval()")
        return partial(run_backbone, teacher), fingerprint or token_rows.model_fingerprint(teacher)
    if not callable(teacher):
        raise CacheError(f"teacher is {type(teacher).__name__}, wanted a model or a function that returns a BackboneOutput")
    if fingerprint is None:
        raise CacheError("teacher is a function, which does not say whose outputs it makes: pass fingerprint=, a name for its weights")
    return teacher, fingerprint


def _device(teacher: nn.Module | Run) -> torch.device:
    """Where a model wants its ids; a function moves them itself."""
    return input_device(teacher) if isinstance(teacher, nn.Module) else torch.device("cpu")


class _Asked(TypedDict):
    """What a plan takes over as it is."""

    temperature: float
    batch_size: int
    teacher: str
    tokenizer_sha256: str | None


def _plan(
    head: BackboneOutput, rows: TokenRows, asked: _Asked, *, kind: Kind, dtype: Dtype | None, top_k: int | None, shard_bytes: int
) -> CachePlan:
    if kind not in layout.KINDS:
        raise CacheError(f"kind must be one of {', '.join(map(repr, layout.KINDS))}, got {kind!r}")
    dtypes = layout.KINDS[kind]
    dtype = dtypes[0] if dtype is None else dtype
    if dtype not in dtypes:
        raise CacheError(f"dtype of kind {kind!r} must be one of {', '.join(map(repr, dtypes))}, got {dtype!r}")
    vocabulary, hidden_dim = head.weight.shape
    if (top_k is None) != (kind == "hidden"):
        raise CacheError(f"top_k is {top_k} with kind {kind!r}; it is for kind 'top-k', and required there")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= vocabulary):
        raise CacheError(f"top_k must be an integer from 1 to the teacher's vocabulary, {vocabulary}, got {top_k!r}")
    head_dtype = str(head.weight.dtype).removeprefix("torch.")
    if head_dtype not in ("float32", "bfloat16", "float16") or head.hidden.dtype != head.weight.dtype:
        got = f"the teacher's hidden states are {head.hidden.dtype} and its head {head.weight.dtype}"
        raise CacheError(f"{got}, wanted both float32, bfloat16 or float16")
    rows.check_vocabulary(vocabulary)
    plan = CachePlan(
        kind=kind, dtype=dtype, top_k=top_k or 0, vocabulary=vocabulary, hidden_dim=hidden_dim, head_dtype=head_dtype,
        has_bias=head.bias is not None, logit_scale=float(head.logit_scale), softcap=head.softcap, dataset_sha256=rows.sha256(),
        shard_rows=(), shard_tokens=(), **asked,
    )  # fmt: skip
    shard_rows, shard_tokens = layout.shard_grid(rows.lengths(), plan.token_bytes(), shard_bytes)
    return replace(plan, shard_rows=shard_rows, shard_tokens=shard_tokens)


def _whole_files(folder: Path, plan: CachePlan) -> dict[str, Manifest]:
    """The manifests of the files of an unfinished cache that are whole. Raises CacheError if the folder holds anything but this cache."""
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise CacheError(f"{folder} is a file, wanted a folder")
    # The index twice: another rank may put it in the place of the unfinished one's plan between our looking for the two.
    for name, what in ((layout.INDEX, "a cache"), (layout.UNFINISHED, "an unfinished cache"), (layout.INDEX, "a cache")):
        if (content := whole_files.read(folder / name)) is not None:
            found, _ = layout.parse(str(folder / name), content)
            if found != plan:
                raise CacheError(f"{folder} holds {what} of {plan.differences(found)}; choose another folder, or delete this one")
            return whole_files.manifests(folder, plan)
    foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if foreign:
        raise CacheError(f"{folder} is not empty and holds no cache (first {foreign[0]}); choose a new folder")
    return {}


def _check_room(folder: Path, wanted: int) -> None:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise CacheError(
            f"{folder} would take {wanted / 2**20:,.1f} MiB more, and its disk has {free / 2**20:,.1f} MiB free; make room, "
            "or choose another disk, dtype 'int8' or kind 'top-k'"
        )


def _shard(
    run: Run, plan: CachePlan, rows: TokenRows, shard: int, device: torch.device, workspace_mib: int | None, bar: "_Bar"
) -> dict[str, Tensor]:
    of_shard = rows[slice(*plan.first_rows[shard : shard + 2])]
    parts = []
    for begin in range(0, len(of_shard), plan.batch_size):
        batch = of_shard[begin : begin + plan.batch_size]
        parts.append(teacher_pass.teacher_columns(run, plan, batch, device, workspace_mib))
        bar.update(sum(map(len, batch)))
    return {
        "offsets": torch.tensor([0, *map(len, of_shard)], dtype=torch.int64).cumsum(0),
        "row_hash": torch.tensor([token_rows.row_hash(row) for row in of_shard], dtype=torch.int64),
        "token_ids": torch.cat(of_shard).int(),
        **{name: torch.cat([part[name] for part in parts]) for name in plan.token_columns()},
    }


def _write(folder: Path, plan: CachePlan, name: str, columns: dict[str, Tensor], *, writer: str, shard: int | None = None) -> None:
    """The file, and then its manifest: a file without one is written again."""
    from safetensors.torch import save

    manifest = write_whole(folder / name, save(columns, layout.metadata(plan, shard)), writer)
    write_whole(folder / whole_files.manifest_name(name), layout.to_json(manifest), writer)


def _finish(folder: Path, plan: CachePlan, writer: str) -> bool:
    """Write the index if every file is there, whoever wrote it; False if not. Several ranks may do so at once: it is the same index."""
    index = folder / layout.INDEX
    if not index.exists():
        manifests = whole_files.manifests(folder, plan)
        if manifests.keys() != plan.files.keys():
            return index.exists()  # if it is now, another rank has finished and taken the manifests away
        write_whole(index, layout.to_json(layout.index_content(plan, [manifests[name] for name in plan.files])), writer)
    for name in (*map(whole_files.manifest_name, plan.files), layout.UNFINISHED):
        (folder / name).unlink(missing_ok=True)
    return True


class _Bar(Protocol):
    def update(self, tokens: int, /) -> object: ...


class _NoBar:
    def update(self, tokens: int) -> None:
        pass


def _bar(progress: bool, tokens: int) -> AbstractContextManager[_Bar]:
    if not progress:
        return nullcontext(_NoBar())
    from tqdm import tqdm

    bar: AbstractContextManager[_Bar] = tqdm(total=tokens, unit="token", unit_scale=True, desc="teacher")
    return bar
