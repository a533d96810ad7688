"""What a training run is asked for, and the models and texts that are read for it: identified, for a run goes on with the same alone."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_kernels.api.cache.reading import TeacherCache
from distill_kernels.api.models import initial_models
from distill_kernels.api.runs import checkpoints, corpus, loop
from distill_kernels.api.user_error import UserError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
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
    precision: str = "float32"
    gradient_checkpointing: bool = False
    device: str | None = None  # None: the accelerator, if there is one
    tail: str | None = None  # of sparse_distillation_loss, for a cache of top-k log-probabilities
    resume: bool = False
    loss: Mapping[str, Any] = field(default_factory=dict)  # options of DistillationLoss


@dataclass(frozen=True)
class Inputs:
    """What there is once everything has been loaded and checked."""

    student: nn.Module
    tokenizer: Any
    text: loop.Text
    held_out: loop.Text
    order: Tensor  # (steps, windows in a step)
    loss: dict[str, Any]  # its options
    description: dict[str, Any]  # of the models and the text, for the report
    identity: dict[str, Any]  # settings, and hashes of what they name


def load(settings: Settings, checkpoint: Path | None) -> Inputs:
    """Everything of a run, its student from the checkpoint if there is one. Raises UserError if that is of another run."""
    initial_models.silence_transformers()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(settings.device or accelerator)
    autocast = PRECISIONS[settings.precision]
    teacher, tokenizer = None, None
    if settings.teacher is not None:
        teacher, tokenizer = initial_models.load("--teacher", settings.teacher, autocast or torch.float32)
        teacher.requires_grad_(False).to(device)
    student, tokenizer, trained = _student(settings, checkpoint, teacher, tokenizer)
    if settings.teacher_cache is None:
        for model, name in ((teacher, "the teacher"), (student, "the student")):
            if model is not None:
                initial_models.check_length(model, settings.sequence_length, name)
        text, held_out, order, read, text_hash = _from_text(settings, tokenizer, teacher, device, autocast)
    else:
        text, held_out, order, read, text_hash = _from_cache(settings, tokenizer, student, device)
    hashes = {"text": text_hash}
    for name in ("student", "teacher"):
        if getattr(settings, name) is not None:
            hashes[name] = initial_models.weight_hashes(getattr(settings, name))
    identity = {"settings": _plain(settings), "sha256": hashes}
    if checkpoint is not None:
        check_same_settings(checkpoints.read_run(checkpoint), settings, checkpoint)
        _check_same_files(checkpoints.read_run(checkpoint), hashes, checkpoint)
    for name, parameter in student.named_parameters():
        if trained is not None:
            parameter.requires_grad_(name in trained)
    description = {
        "teacher": None if teacher is None else {"name": str(settings.teacher), **initial_models.describe(teacher)},
        "student": {"name": str(settings.student or "cut from the teacher"), **initial_models.describe(student)},
        "text": read,
    }
    if settings.teacher_cache is not None:
        description["teacher"] = {"name": str(settings.teacher_cache)}
    if settings.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    print(f"student: {description['student']['trained_parameters']:,} trained parameters of {description['student']['name']}")
    print(f"text: {read['split']}; {read['train_tokens']:,} tokens are read in training, {read['held_out_tokens']:,} held out", flush=True)
    loss = dict(settings.loss)
    if settings.tail is not None:
        loss.setdefault("temperature", text.cache.plan.temperature)
    return Inputs(student.to(device), tokenizer, text, held_out, order, loss, description, identity)


def _student(settings, checkpoint, teacher, tokenizer) -> tuple[nn.Module, Any, list[str] | None]:
    """(model, tokenizer, names of the parameters that are trained: None, those that require it)."""
    if checkpoint is not None:
        student, student_tokenizer = initial_models.load("--resume", checkpoint)
        return student, student_tokenizer, checkpoints.read_run(checkpoint)["trained"]
    if settings.student is None:
        keep = settings.student_layers or initial_models.layers_to_keep(teacher)
        student = initial_models.cut_student(teacher, initial_models.check_layers(teacher, keep))
        # In this order: a model that remembers its quantisation refuses float(), too.
        return initial_models.savable(student).float(), tokenizer, None
    student, student_tokenizer = initial_models.load("--student", settings.student)
    if tokenizer is not None:
        initial_models.check_tokenizers(tokenizer, student_tokenizer)
    return initial_models.savable(student).requires_grad_(True), student_tokenizer, None


def _from_text(settings, tokenizer, teacher, device, autocast):
    documents = corpus.split_documents(settings.text, settings.seed, field=settings.text_field, held_out=settings.held_out)
    *ids, order = corpus.draw(
        documents, tokenizer, settings.sequence_length, settings.batch_size, settings.steps, settings.seed, settings.held_out_tokens
    )
    if teacher is None:
        text, held_out = (loop.PlainText(windows, device) for windows in ids)
    else:
        text, held_out = (loop.TaughtText(windows, device, model=teacher, autocast=autocast) for windows in ids)
    read = {"split": documents.split, "train_tokens": ids[0].numel(), "held_out_tokens": ids[1].numel()}
    return text, held_out, order, read, hashlib.sha256(torch.cat(ids).numpy().tobytes()).hexdigest()


def _from_cache(settings, tokenizer, student, device):
    """The cache's own rows, its last fifth held out."""
    cache = TeacherCache.open(settings.teacher_cache, tokenizer=tokenizer)
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
    read = {
        "split": f"{cache.path}: the first {first} rows to train on, {len(held_out)} of the last {len(cache) - first} held out",
        "train_tokens": int(lengths[order.unique()].sum()),
        "held_out_tokens": int(lengths[held_out].sum()),
    }
    texts = (loop.CachedText(cache, numbers, device, settings.tail) for numbers in (torch.arange(first), held_out))
    plan = cache.plan
    return *texts, order, read, " ".join(map(str, (plan.dataset_sha256, plan.teacher, plan.kind, plan.dtype, plan.top_k, plan.temperature)))


def _plain(settings: Settings) -> dict[str, Any]:
    """As it stands in JSON, without what may change."""

    def plain(value):
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in sorted(value.items())}
        if isinstance(value, tuple):
            return list(value)
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    return {entry.name: plain(getattr(settings, entry.name)) for entry in fields(settings) if entry.name not in FREE}


def check_same_settings(before: Mapping[str, Any], settings: Any, where: Path) -> None:
    """Raises UserError naming what differs, unless what is `where`, a checkpoint or a report, is of a run with these settings."""
    for name, value in _plain(settings).items():
        begun = before["settings"].get(name)
        if begun != value:
            raise UserError(
                f"{where} is of a run with {name} {begun}, and {name} is now {value}; pass what it began with, or another --output"
            )


def _check_same_files(before: Mapping[str, Any], hashes: Mapping[str, str], checkpoint: Path) -> None:
    for name, value in hashes.items():
        if before["sha256"].get(name) != value:
            raise UserError(f"{checkpoint} is of a run with another {name}: it has changed on the disk since")
