"""What a training run is asked for, and the models and texts that are read for it: identified, for a run goes on with the same alone."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from distill_kernels.api.cache.reading import Tail, TeacherCache
from distill_kernels.api.models import initial_models
from distill_kernels.api.runs import checkpoints, corpus, loop
from distill_kernels.api.user_error import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
NO_STUDENT = "there is no student: pass --student PATH, or --teacher PATH to cut one from its layers"
# What a run may go on with otherwise than it began: none of it changes a result.
FREE = ("output", "resume", "checkpoint_every")


@dataclass(frozen=True)
class Settings:
    output: Path
    student: Path | None = None  # None: cut from the teacher's layers
    student_layers: tuple[int, ...] | None = None  # None: evenly spaced ones
    teacher: Path | None = None
    teacher_cache: Path | None = None  # which brings its text
    text: Path | None = None
    text_field: str = "text"
    held_out: Path | None = None  # None: the last fifth of the text
    steps: int = 200
    sequence_length: int = 256
    batch_size: int = 8  # windows in a step
    at_once: int | None = None  # windows that are held at a time, None: all of a step
    learning_rate: float = 3e-4
    seed: int = 0
    evaluate_every: int = 50
    held_out_tokens: int = 8192
    checkpoint_every: int = 50
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    device: str | None = None  # None: the accelerator, if there is one
    tail: Tail | None = None  # of sparse_distillation_loss, for a cache of top-k log-probabilities
    resume: bool = False
    loss: Mapping[str, Any] = field(default_factory=dict)  # options of DistillationLoss


@dataclass(frozen=True)
class Inputs:
    """What there is once everything has been loaded and checked."""

    student: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    text: loop.Text
    held_out: loop.Text
    order: Tensor  # (steps, windows in a step)
    loss: dict[str, Any]  # its options
    description: dict[str, Any]  # of the models and the text, for the report
    identity: dict[str, Any]  # settings, and hashes of what they name


@dataclass(frozen=True)
class _Read:
    """The texts of a run."""

    text: loop.Text
    held_out: loop.Text
    order: Tensor  # (steps, windows in a step)
    description: dict[str, Any]
    sha256: str  # or what else identifies them
    temperature: float | None = None  # at which a teacher's log-probabilities were kept, where that is all of it


class _Loaded(NamedTuple):
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    trained: list[str] | None = None  # names of the parameters that are trained; None: those that require it


def load(settings: Settings, checkpoint: Path | None) -> Inputs:
    """Everything of a run, its student from the checkpoint if there is one. Raises UserError if that is of another run."""
    initial_models.silence_transformers()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(settings.device or accelerator or "cpu")
    autocast = PRECISIONS[settings.precision]
    loaded, teacher = None, None
    if settings.teacher is not None:
        loaded = _Loaded(*initial_models.load("--teacher", settings.teacher, autocast or torch.float32))
        teacher = loaded.model
        teacher.requires_grad_(False)
        initial_models.move(teacher, device)
    student, tokenizer, trained = _student(settings, checkpoint, loaded)
    if settings.teacher_cache is None:
        for model, name in ((teacher, "the teacher"), (student, "the student")):
            if model is not None:
                initial_models.check_length(model, settings.sequence_length, name)
        read = _from_text(settings, tokenizer, teacher, device, autocast)
    else:
        read = _from_cache(settings, settings.teacher_cache, tokenizer, student, device)
    hashes: dict[str, str | dict[str, str]] = {"text": read.sha256}
    for name, path in (("student", settings.student), ("teacher", settings.teacher)):
        if path is not None:
            hashes[name] = initial_models.weight_hashes(path)
    identity = {"settings": _plain(settings), "sha256": hashes}
    if checkpoint is not None:
        check_same_settings(checkpoints.read_run(checkpoint), settings, checkpoint)
        _check_same_files(checkpoints.read_run(checkpoint), hashes, checkpoint)
    for name, parameter in student.named_parameters():
        if trained is not None:
            parameter.requires_grad_(name in trained)
    description: dict[str, Any] = {
        "teacher": None if teacher is None else {"name": str(settings.teacher), **initial_models.describe(teacher)},
        "student": {"name": str(settings.student or "cut from the teacher"), **initial_models.describe(student)},
        "text": read.description,
    }
    if settings.teacher_cache is not None:
        description["teacher"] = {"name": str(settings.teacher_cache)}
    if settings.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    print(f"student: {description['student']['trained_parameters']:,} trained parameters of {description['student']['name']}")
    tokens = f"{read.description['train_tokens']:,} tokens are read in training, {read.description['held_out_tokens']:,} held out"
    print(f"text: {read.description['split']}; {tokens}", flush=True)
    loss = dict(settings.loss)
    if read.temperature is not None:
        loss.setdefault("temperature", read.temperature)
    initial_models.move(student, device)
    return Inputs(student, tokenizer, read.text, read.held_out, read.order, loss, description, identity)


def _student(settings: Settings, checkpoint: Path | None, teacher: _Loaded | None) -> _Loaded:
    if checkpoint is not None:
        return _Loaded(*initial_models.load("--resume", checkpoint), checkpoints.read_run(checkpoint)["trained"])
    if settings.student is None:
        if teacher is None:
            raise UserError(NO_STUDENT)
        keep = settings.student_layers or initial_models.layers_to_keep(teacher.model)
        student = initial_models.cut_student(teacher.model, initial_models.check_layers(teacher.model, keep))
        # In this order: a model that remembers its quantisation refuses float(), too.
        return _Loaded(initial_models.savable(student).float(), teacher.tokenizer)
    student, tokenizer = initial_models.load("--student", settings.student)
    if teacher is not None:
        initial_models.check_tokenizers(teacher.tokenizer, tokenizer)
    student = initial_models.savable(student)
    student.requires_grad_(True)
    return _Loaded(student, tokenizer)


def _from_text(
    settings: Settings,
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel | None",
    device: torch.device,
    autocast: torch.dtype | None,
) -> _Read:
    documents = corpus.split_documents(settings.text, settings.seed, field=settings.text_field, held_out=settings.held_out)
    drawn = corpus.draw(
        documents, tokenizer, settings.sequence_length, settings.batch_size, settings.steps, settings.seed, settings.held_out_tokens
    )

    def text(windows: Tensor) -> loop.Text:
        if teacher is None:
            return loop.PlainText(windows, device)
        return loop.TaughtText(windows, device, model=teacher, autocast=autocast)

    description = {"split": documents.split, "train_tokens": drawn.train.numel(), "held_out_tokens": drawn.held_out.numel()}
    sha256 = hashlib.sha256(torch.cat((drawn.train, drawn.held_out)).numpy().tobytes()).hexdigest()
    return _Read(text(drawn.train), text(drawn.held_out), drawn.order, description, sha256)


def _from_cache(
    settings: Settings, path: Path, tokenizer: "PreTrainedTokenizerBase", student: "PreTrainedModel", device: torch.device
) -> _Read:
    """The cache's own rows, its last fifth held out."""
    cache = TeacherCache.open(path, tokenizer=tokenizer)
    if (cache.plan.kind == "top-k") != (settings.tail is not None):
        wanted = "pass --tail bucket, renormalise or ignore" if settings.tail is None else "leave out --tail"
        raise UserError(f"--teacher-cache {cache.path} is one of kind {cache.plan.kind}: {wanted}")
    first = round((1 - corpus.HELD_OUT_FRACTION) * len(cache))
    if not 0 < first < len(cache):
        raise UserError(f"--teacher-cache {cache.path} has {len(cache)} row, and a fifth is held out; write it from a longer text")
    generator = torch.Generator().manual_seed(settings.seed)
    order = corpus.epochs(first, settings.batch_size, settings.steps, generator)
    lengths = cache.lengths()
    initial_models.check_length(student, int(lengths.max()), "the student", "a row of --teacher-cache of length")
    mean = cache.plan.tokens / cache.plan.rows
    held_out = first + torch.randperm(len(cache) - first, generator=generator)[: max(1, int(settings.held_out_tokens / mean))]
    description = {
        "split": f"{cache.path}: the first {first} rows to train on, {len(held_out)} of the last {len(cache) - first} held out",
        "train_tokens": int(lengths[order.unique()].sum()),
        "held_out_tokens": int(lengths[held_out].sum()),
    }
    train, measured = (loop.CachedText(cache, numbers, device, settings.tail) for numbers in (torch.arange(first), held_out))
    plan = cache.plan
    identity = " ".join(map(str, (plan.dataset_sha256, plan.teacher, plan.kind, plan.dtype, plan.top_k, plan.temperature)))
    return _Read(train, measured, order, description, identity, None if settings.tail is None else plan.temperature)


def _plain(settings: Settings) -> dict[str, Any]:
    """As it stands in JSON, without what may change."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in sorted(value.items())}
        if isinstance(value, tuple):
            return list(value)
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    return {entry.name: plain(getattr(settings, entry.name)) for entry in fields(settings) if entry.name not in FREE}


def check_same_settings(before: Mapping[str, Any], settings: Settings, where: Path) -> None:
    """Raises UserError naming what differs, unless what is `where`, a checkpoint or a report, is of a run with these settings."""
    for name, value in _plain(settings).items():
        begun = before["settings"].get(name)
        if begun != value:
            raise UserError(
                f"{where} is of a run with {name} {begun}, and {name} is now {value}; pass what it began with, or another --output"
            )


def _check_same_files(before: Mapping[str, Any], hashes: Mapping[str, str | dict[str, str]], checkpoint: Path) -> None:
    for name, value in hashes.items():
        if before["sha256"].get(name) != value:
            raise UserError(f"{checkpoint} is of a run with another {name}: it has changed on the disk since")
