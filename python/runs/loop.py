"""The training loop: optimizer steps over windows of text, and how close the student comes to the teacher on held-out ones.

What is read is a `Text`: the teacher reads along (`TaughtText`), has read everything before (`ReadText`, `CachedText`), or is absent
(`PlainText`).
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distill_kernels.api.cache.reading import Tail, TeacherCache
from distill_kernels.api.losses.distillation import distillation_loss, distillation_loss_and_stats
from distill_kernels.api.losses.prepared_heads import PreparedHead, prepare_head
from distill_kernels.api.losses.sparse import sparse_distillation_loss
from distill_kernels.api.models.backbone import BackboneOutput, run_backbone
from distill_kernels.api.models.labels import next_token_labels
from distill_kernels.api.progress_bar import progress
from distill_kernels.api.user_error import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = {"kl": "held-out KL {:.3f}", "perplexity": "held-out perplexity {:.1f}"}  # beside a progress bar
Inputs = dict[str, Tensor]  # of run_backbone: input_ids (B, S) int64, and attention_mask (B, S) where rows are padded


class Text(Protocol):
    """Rows of token ids, and what the loss has to know of the teacher there; both on the device of the loss."""

    def __len__(self) -> int: ...

    def inputs(self, rows: Tensor) -> Inputs: ...

    def teacher(self, rows: Tensor, inputs: Inputs) -> dict[str, Any]:
        """The loss's keyword arguments for the rows of which `inputs` are."""
        ...


@dataclass(frozen=True)
class PlainText:
    """Windows of text without a teacher."""

    input_ids: Tensor  # (n, S) int64
    device: str | torch.device = "cpu"

    def __len__(self) -> int:
        return len(self.input_ids)

    def inputs(self, rows: Tensor) -> Inputs:
        return {"input_ids": self.input_ids[rows].to(self.device)}

    def teacher(self, rows: Tensor, inputs: Inputs) -> dict[str, Any]:
        return {"teacher_hidden": None, "teacher_weight": None}


@dataclass(frozen=True, kw_only=True)
class TaughtText(PlainText):
    """Windows of text that the teacher reads whenever the student does."""

    model: "PreTrainedModel"
    autocast: torch.dtype | None = None

    @torch.no_grad()
    def teacher(self, rows: Tensor, inputs: Inputs) -> dict[str, Any]:
        with casting(self.model.device, self.autocast):
            return run_backbone(self.model, **inputs).as_teacher()


@dataclass(frozen=True, kw_only=True)
class ReadText(PlainText):
    """Windows of text, and the states in which the teacher read them: its whole distribution, for the price of a matrix."""

    output: BackboneOutput  # hidden (n, S, D_t), on the CPU; the head where the loss runs

    def teacher(self, rows: Tensor, inputs: Inputs) -> dict[str, Any]:
        return {**self.output.as_teacher(), "teacher_hidden": self.output.hidden[rows].to(self.device)}


@dataclass(frozen=True)
class CachedText:
    """Rows of a teacher cache."""

    cache: TeacherCache
    numbers: Tensor  # (n,) int64, of the rows
    device: str | torch.device = "cpu"
    tail: Tail | None = None  # of sparse_distillation_loss, for a cache of top-k log-probabilities

    def __len__(self) -> int:
        return len(self.numbers)

    def inputs(self, rows: Tensor) -> Inputs:
        batch = self.cache.collate([self.cache.row(number) for number in self.numbers[rows].tolist()])
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def teacher(self, rows: Tensor, inputs: Inputs) -> dict[str, Any]:
        output = self.cache.teacher_output({**inputs, "row": self.numbers[rows]})
        return output.as_teacher() if self.tail is None else output.as_sparse_teacher(self.tail)


class PreparedText:
    """A text whose teacher's head is quantised once, for losses with a sweep."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.head: PreparedHead | None = None
        self.inputs = text.inputs

    def __len__(self) -> int:
        return len(self.text)

    def teacher(self, rows: Tensor, inputs: Inputs) -> dict[str, Any]:
        teacher = self.text.teacher(rows, inputs)
        if self.head is None:
            self.head = prepare_head(teacher["teacher_weight"])
        return {**teacher, "teacher_weight": self.head}


@torch.no_grad()
def read(text: TaughtText, batch_size: int) -> ReadText:
    """Runs the teacher over the text, a batch at a time."""
    outputs = []
    for rows in progress(torch.arange(len(text)).split(batch_size), "teacher reads the text"):
        with casting(text.model.device, text.autocast):
            output = run_backbone(text.model, **text.inputs(rows))
        outputs.append(BackboneOutput(**{**vars(output), "hidden": output.hidden.cpu()}))
    hidden = torch.cat([output.hidden for output in outputs])
    return ReadText(text.input_ids, text.device, output=BackboneOutput(**{**vars(outputs[0]), "hidden": hidden}))


@torch.no_grad()
def check_loss(student: "PreTrainedModel", text: Text, autocast: torch.dtype | None = None, **loss_options: Any) -> None:
    """Lets the library refuse the models, or the options, on one window, rather than after minutes. Raises UserError."""
    try:
        row = torch.tensor([0])
        inputs = text.inputs(row)
        teacher = text.teacher(row, inputs)
        with casting(inputs["input_ids"].device, autocast):
            output = run_backbone(student, **inputs)
            loss_for(teacher)(**output.as_student(), **teacher, labels=labels_of(inputs), **loss_options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error


def labels_of(inputs: Inputs) -> Tensor:
    """(B, S)"""
    return next_token_labels(inputs["input_ids"], attention_mask=inputs.get("attention_mask"))


def loss_for(teacher: dict[str, Any]) -> Callable[..., Tensor]:
    """The loss that takes these arguments of a teacher."""
    return sparse_distillation_loss if "teacher_ids" in teacher else distillation_loss


def optimizer_and_schedule(
    student: "PreTrainedModel", learning_rate: float, steps: int, done: int = 0
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, its learning rate rising for a tenth of the steps and falling to a tenth of its peak; `done` of the steps are behind."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "initial_lr": learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (0.1 + 0.9 * (1 - step / steps)), last_epoch=done - 1
    )
    return optimizer, schedule


def train(
    student: "PreTrainedModel",
    text: Text,
    order: Tensor,  # (steps, windows in a step)
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    at_once: int | None = None,
    autocast: torch.dtype | None = None,
    **loss_options: Any,
) -> Iterator[dict[str, float]]:
    """Trains the student, one step for each dict that is taken from it: its loss, and beside it the auxiliary losses that are part of it.

    at_once: windows that are held at a time, None for all of a step's; the gradients of a step are those of all its windows together.
    """
    for rows in order:
        inputs = text.inputs(rows)
        num_items = int((labels_of(inputs) != -100).sum())
        totals: dict[str, Tensor | float] = {}
        for part in torch.arange(len(rows)).split(at_once or len(rows)):
            some = {name: tensor[part] for name, tensor in inputs.items()}
            teacher = text.teacher(rows[part], some)
            with casting(some["input_ids"].device, autocast):
                output = run_backbone(student, **some)
                labels = labels_of(some)
                loss = loss_for(teacher)(**output.as_student(), **teacher, labels=labels, num_items=num_items, **loss_options)
                share = len(part) / len(rows)
                loss = loss + share * output.auxiliary_loss
            loss.backward()
            terms = {"loss": loss, **{name: share * value for name, (value, _) in output.auxiliary.items()}}
            totals = {name: totals.get(name, 0.0) + term.detach() for name, term in terms.items()}
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield {name: float(total) for name, total in totals.items()}


def train_and_evaluate(
    student: "PreTrainedModel",
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
    """Trains from step `done` on; says of every step {"step", "learning_rate"} and its losses, and, after those of `marks`, what `evaluate`
    does.

    Of step 0, the start, there is only the latter, and only if it is marked.

    Raises
        UserError: the loss is no finite number.
    """
    mismatch = loss_options.get("vocab_mismatch", "error")
    measured = partial(evaluate, batch_size=at_once or order.shape[1], autocast=autocast, vocab_mismatch=mismatch)
    quality: dict[str, float] = {}
    if done == 0 and 0 in marks:
        quality = measured(student.eval(), held_out)
        yield {"step": 0, **quality}
    losses = train(student.train(), text, order[done:], optimizer, schedule, at_once=at_once, autocast=autocast, **loss_options)
    with progress(range(done + 1, len(order) + 1), title, total=len(order), initial=done) as bar:
        for step in bar:
            record = {"step": step, "learning_rate": float(schedule.get_last_lr()[0]), **next(losses)}
            if not math.isfinite(record["loss"]):
                raise UserError(f"the loss of {title} is {record['loss']} at step {step}; pass a smaller --learning-rate")
            if step in marks:
                quality = measured(student.eval(), held_out)
                record |= quality
                student.train()
            shown = [SHOWN[name].format(quality[name]) for name in SHOWN if name in quality]
            bar.set_postfix_str(", ".join([f"loss {record['loss']:.3f}", *shown]))
            yield record


@torch.no_grad()
def evaluate(
    student: "PreTrainedModel", text: Text, batch_size: int, *, autocast: torch.dtype | None = None, vocab_mismatch: str = "error"
) -> dict[str, float]:
    """kl: mean KL(teacher‖student) at temperature 1, nats per token; top1_agreement: fraction of tokens; perplexity: of the text.

    Without a teacher, or with one of whom only log-probabilities of some tokens are known, there is only the perplexity.
    """

    def batches() -> Iterator[_Batch]:
        for rows in torch.arange(len(text)).split(batch_size):
            inputs = text.inputs(rows)
            yield _Batch(inputs, run_backbone(student, **inputs).as_student(), text.teacher(rows, inputs))

    with casting(student.device, autocast):
        return _evaluate(batches(), vocab_mismatch)


@torch.no_grad()
def evaluate_teacher(text: Text, batch_size: int) -> dict[str, float]:
    """The teacher as its own student: perplexity is what it is for, and the rest says how exact `evaluate` is."""

    def batches() -> Iterator[_Batch]:
        for rows in torch.arange(len(text)).split(batch_size):
            inputs = text.inputs(rows)
            teacher = text.teacher(rows, inputs)
            yield _Batch(inputs, {name.replace("teacher", "student"): value for name, value in teacher.items()}, teacher)

    return _evaluate(batches())


class _Batch(NamedTuple):
    """What was read, and the loss's keyword arguments of either model."""

    inputs: Inputs
    student: dict[str, Any]
    teacher: dict[str, Any]


def _evaluate(batches: Iterable[_Batch], vocab_mismatch: str = "error") -> dict[str, float]:
    totals = dict.fromkeys(("divergence", "top1_agreement", "cross_entropy", "valid"), 0.0)
    for inputs, student, teacher in batches:
        if teacher.get("teacher_hidden") is None:
            teacher, kd_weight = {"teacher_hidden": None, "teacher_weight": None}, 0.0
        else:
            kd_weight = 1.0
        _, stats = distillation_loss_and_stats(
            **student, **teacher, labels=labels_of(inputs), kd_weight=kd_weight, ce_weight=1, vocab_mismatch=vocab_mismatch
        )
        for name in totals:
            totals[name] += getattr(stats, name).sum().item()
    kl, agreement, cross_entropy = (totals[name] / totals["valid"] for name in ("divergence", "top1_agreement", "cross_entropy"))
    # A float overflows past exp(709); a student as broken as that is reported, not an error.
    perplexity = math.exp(min(cross_entropy, 700))
    return {"kl": kl, "top1_agreement": agreement, "perplexity": perplexity} if kd_weight else {"perplexity": perplexity}


def casting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to `dtype`, or nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
