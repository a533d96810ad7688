"""The training loop: optimizer steps over windows of text, and how close the student comes to the teacher on held-out ones.

A text is anything with `input_ids` (n, S) and `batch(rows)`: the windows of these rows, on the device of the loss, and what the loss has
to know of the teacher there. The teacher reads along (`TaughtText`), has read everything before (`ReadText`), or is absent (`PlainText`).
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill_kernels.api.losses import distillation_loss, distillation_loss_and_stats
from distill_kernels.api.models import BackboneOutput, next_token_labels, run_backbone
from distill_kernels.api.user_error import UserError

Batch = tuple[Tensor, dict[str, Any]]  # input_ids (B, S), and the loss's keyword arguments of the teacher
SHOWN = {"kl": "held-out KL {:.3f}", "perplexity": "held-out perplexity {:.1f}"}  # beside a progress bar
NO_TEACHER = {"teacher_hidden": None, "teacher_weight": None}


class Text(Protocol):
    input_ids: Tensor  # (n, S) int64

    def batch(self, rows: Tensor) -> Batch: ...


@dataclass(frozen=True)
class PlainText:
    """Windows of text without a teacher."""

    input_ids: Tensor  # (n, S) int64
    device: str | torch.device = "cpu"

    def batch(self, rows: Tensor) -> Batch:
        return self.input_ids[rows].to(self.device), NO_TEACHER


@dataclass(frozen=True)
class TaughtText:
    """Windows of text that the teacher reads whenever the student does."""

    input_ids: Tensor  # (n, S) int64
    teacher: nn.Module
    autocast: torch.dtype | None = None

    @torch.no_grad()
    def batch(self, rows: Tensor) -> Batch:
        input_ids = self.input_ids[rows].to(self.teacher.device)
        with casting(self.teacher.device, self.autocast):
            return input_ids, run_backbone(self.teacher, input_ids=input_ids).as_teacher()


@dataclass(frozen=True)
class ReadText:
    """Windows of text, and the states in which the teacher read them: its whole distribution, for the price of a matrix."""

    input_ids: Tensor  # (n, S) int64
    teacher: BackboneOutput  # hidden (n, S, D_t), on the CPU; the head where the loss runs

    def batch(self, rows: Tensor) -> Batch:
        device = self.teacher.weight.device
        hidden = self.teacher.hidden[rows].to(device)
        return self.input_ids[rows].to(device), {**self.teacher.as_teacher(), "teacher_hidden": hidden}


@torch.no_grad()
def read(teacher: nn.Module, input_ids: Tensor, batch_size: int, autocast: torch.dtype | None = None) -> ReadText:
    """Runs the teacher over input_ids (n, S), a batch at a time."""
    outputs = []
    for batch in progress(input_ids.split(batch_size), "teacher reads the text"):
        with casting(teacher.device, autocast):
            output = run_backbone(teacher, input_ids=batch.to(teacher.device))
        outputs.append(BackboneOutput(**{**vars(output), "hidden": output.hidden.cpu()}))
    hidden = torch.cat([output.hidden for output in outputs])
    return ReadText(input_ids, BackboneOutput(**{**vars(outputs[0]), "hidden": hidden}))


@torch.no_grad()
def check_loss(student: nn.Module, text: Text, autocast: torch.dtype | None = None, **loss_options: Any) -> None:
    """Lets the library refuse the models, or the options, on one window, rather than after minutes. Raises UserError."""
    try:
        input_ids, teacher = text.batch(torch.tensor([0]))
        with casting(input_ids.device, autocast):
            output = run_backbone(student, input_ids=input_ids)
            distillation_loss(**output.as_student(), **teacher, labels=next_token_labels(input_ids), **loss_options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error


def optimizer_and_schedule(
    student: nn.Module, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, its learning rate rising for a tenth of the steps and falling to a tenth of its peak."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (0.1 + 0.9 * (1 - step / steps))
    )
    return optimizer, schedule


def train(
    student: nn.Module,
    text: Text,
    order: Tensor,  # (steps, windows in a step)
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    at_once: int | None = None,
    autocast: torch.dtype | None = None,
    **loss_options: Any,
) -> Iterator[float]:
    """Trains the student, one step for each loss that is taken from it.

    at_once: windows that are held at a time, None for all of a step's; the gradients of a step are those of all its windows together.
    """
    for rows in order:
        num_items = int((next_token_labels(text.input_ids[rows]) != -100).sum())
        total = 0.0
        for part in rows.split(at_once or len(rows)):
            input_ids, teacher = text.batch(part)
            with casting(input_ids.device, autocast):
                output = run_backbone(student, input_ids=input_ids)
                labels = next_token_labels(input_ids)
                loss = distillation_loss(**output.as_student(), **teacher, labels=labels, num_items=num_items, **loss_options)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield float(total)


def train_and_evaluate(
    student: nn.Module,
    text: Text,
    order: Tensor,  # (steps, windows in a step)
    held_out: Text,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    marks: Collection[int],
    done: int = 0,
    title: str = "training",
    at_once: int | None = None,
    autocast: torch.dtype | None = None,
    **loss_options: Any,
) -> Iterator[dict[str, float]]:
    """Trains from step `done` on; says of every step {"step", "learning_rate", "loss"}, and what `evaluate` does after those of `marks`.

    Of step 0, the start, there is only the latter, and only if it is marked.

    Raises
        UserError: the loss is no finite number.
    """
    evaluation = {"batch_size": at_once or order.shape[1], "autocast": autocast}
    if "vocab_mismatch" in loss_options:
        evaluation["vocab_mismatch"] = loss_options["vocab_mismatch"]
    quality = {}
    if done == 0 and 0 in marks:
        quality = evaluate(student.eval(), held_out, **evaluation)
        yield {"step": 0, **quality}
    losses = train(student.train(), text, order[done:], optimizer, schedule, at_once=at_once, autocast=autocast, **loss_options)
    with progress(range(done + 1, len(order) + 1), title, total=len(order), initial=done) as bar:
        for step in bar:
            record = {"step": step, "learning_rate": schedule.get_last_lr()[0], "loss": next(losses)}
            if not math.isfinite(record["loss"]):
                raise UserError(f"the loss of {title} is {record['loss']} at step {step}; pass a smaller --learning-rate")
            if step in marks:
                quality = evaluate(student.eval(), held_out, **evaluation)
                record |= quality
                student.train()
            shown = [SHOWN[name].format(quality[name]) for name in SHOWN if name in quality]
            bar.set_postfix_str(", ".join([f"loss {record['loss']:.3f}", *shown]))
            yield record


@torch.no_grad()
def evaluate(
    student: nn.Module, text: Text, batch_size: int, *, autocast: torch.dtype | None = None, vocab_mismatch: str = "error"
) -> dict[str, float]:
    """kl: mean KL(teacher‖student) at temperature 1, nats per token; top1_agreement: fraction of tokens; perplexity: of the text.

    Without a teacher there is only the perplexity.
    """

    def batches():
        for rows in torch.arange(len(text.input_ids)).split(batch_size):
            input_ids, teacher = text.batch(rows)
            with casting(input_ids.device, autocast):
                yield run_backbone(student, input_ids=input_ids).as_student(), input_ids, teacher

    return _evaluate(batches(), vocab_mismatch)


@torch.no_grad()
def evaluate_teacher(text: Text, batch_size: int) -> dict[str, float]:
    """The teacher as its own student: perplexity is what it is for, and the rest says how exact `evaluate` is."""
    batches = map(text.batch, torch.arange(len(text.input_ids)).split(batch_size))
    return _evaluate(
        ({name.replace("teacher", "student"): value for name, value in teacher.items()}, input_ids, teacher)
        for input_ids, teacher in batches
    )


def _evaluate(batches, vocab_mismatch="error") -> dict[str, float]:
    totals = dict.fromkeys(("divergence", "top1_agreement", "cross_entropy", "valid"), 0.0)
    for student, input_ids, teacher in batches:
        kd_weight = 1.0 if teacher["teacher_hidden"] is not None else 0.0
        _, stats = distillation_loss_and_stats(
            **student, **teacher, labels=next_token_labels(input_ids), kd_weight=kd_weight, vocab_mismatch=vocab_mismatch
        )
        for name in totals:
            totals[name] += getattr(stats, name).sum().item()
    kl, agreement, cross_entropy = (totals[name] / totals["valid"] for name in ("divergence", "top1_agreement", "cross_entropy"))
    # A float overflows past exp(709); a student as broken as that is reported, not an error.
    perplexity = math.exp(min(cross_entropy, 700))
    return {"kl": kl, "top1_agreement": agreement, "perplexity": perplexity} if kd_weight else {"perplexity": perplexity}


def casting(device: torch.device, dtype: torch.dtype | None):
    """Autocast to `dtype`, or nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def progress(iterable, description: str, **options: Any):
    """A progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(iterable, desc=f"{description:24}", dynamic_ncols=True, **options)
