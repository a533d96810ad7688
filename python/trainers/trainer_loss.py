"""The loss of a Trainer: options checked before training, and a forward of the student that returns it."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill_kernels.api.cache.reading import CachedTeacher, TeacherCache
from distill_kernels.api.losses.distillation import DistillationLoss, distillation_loss_and_stats
from distill_kernels.api.losses.sparse import sparse_distillation_loss
from distill_kernels.api.models.backbone import run_backbone
from distill_kernels.api.trainers.batches import IGNORED

Reduction = Literal["mean", "none"]
Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]  # a student's: the loss, sums over tokens, and what it adds of its own
NO_TEACHER: dict[str, Any] = {"teacher_hidden": None, "teacher_weight": None}
# What is logged, means over the tokens that are learned from: name -> the field of DistillationStats that it is made of.
METRICS = {
    "kd": "divergence",
    "ce": "cross_entropy",
    "top1_agreement": "top1_agreement",
    "student_entropy": "student_entropy",
    "teacher_entropy": "teacher_entropy",
}
_WITHOUT_A_TEACHER = ("ce", "student_entropy")
_READ_FROM_THE_MODELS = ("student_logit_scale", "student_softcap", "teacher_logit_scale", "teacher_softcap")
# Ranks of a Trainer have rows of their own, and whole heads.
_SET_BY_THE_TRAINER = {"reduction": "mean", "ignore_index": IGNORED, "process_group": None, "sequence_parallel": False}
# Of sparse_distillation_loss: what belongs to a batch, and to the cache.
_READ_FROM_THE_CACHE = ("teacher_temperature", "teacher_tail_mass")
_OF_A_BATCH = ("student_bias", "token_weight", "num_items")


class TrainerLoss:
    """The options of a loss, the metrics that come with it, and the forwards of a student that compute it.

    cache: the teacher, if it is one of top-k log-probabilities: the loss is then sparse_distillation_loss, which has no metrics.

    Raises TypeError or ValueError for an option that there is not, or is not to be set, or has a value that is refused.
    """

    def __init__(self, options: dict[str, Any], *, label_smoothing: float, has_teacher: bool, cache: TeacherCache | None) -> None:
        self.options = dict(options)
        for names, reason in (
            (_READ_FROM_THE_MODELS, "is read from the models"),
            (_READ_FROM_THE_CACHE, "is read from the cache"),
        ):
            for name in names:
                if name in options:
                    raise TypeError(f"{name} {reason}; it is no option of DistillationTrainer")
        for name, value in _SET_BY_THE_TRAINER.items():  # a preset has them
            if self.options.pop(name, value) != value:
                raise ValueError(f"{name} must be {value!r} in a Trainer, got {options[name]!r}")
        if label_smoothing != 0:
            self._smooth(label_smoothing)
        self.sparse = False
        self.metrics = {name: METRICS[name] for name in (METRICS if has_teacher else _WITHOUT_A_TEACHER)}
        if cache is not None and cache.plan.kind == "top-k":
            self._check_sparse(cache)
            self.sparse, self.metrics = True, {}
        else:
            self._check()
        self.auxiliary: tuple[str, ...] = ()  # the student's own losses, which the trainer learns from the model
        self.forwards: dict[Reduction, Forward] = {"mean": self._forward("mean"), "none": self._forward("none")}

    @property
    def logged(self) -> tuple[str, ...]:
        """The names of what is logged beside the loss, in the order of a forward's sums."""
        return (*self.metrics, *self.auxiliary)

    def _smooth(self, factor: float) -> None:
        """label_smoothing_factor of TrainingArguments as an option of the loss."""
        if self.options.get("label_smoothing", factor) != factor:
            given = self.options["label_smoothing"]
            raise ValueError(f"label_smoothing is {given} but args.label_smoothing_factor is {factor}; pass one of them")
        if self.options.get("ce_weight", 0.0) == 0:
            raise ValueError(f"args.label_smoothing_factor is {factor}, of the cross entropy, but ce_weight is 0; pass a ce_weight")
        self.options["label_smoothing"] = factor

    def _check(self) -> None:
        try:
            DistillationLoss(**self.options)
        except TypeError as error:
            raise TypeError(f"options of DistillationTrainer that are not of transformers.Trainer are the loss's: {error}") from error

    def _check_sparse(self, cache: TeacherCache) -> None:
        parameters = inspect.signature(sparse_distillation_loss).parameters.values()
        left_out = (*_READ_FROM_THE_MODELS, *_READ_FROM_THE_CACHE, *_SET_BY_THE_TRAINER, *_OF_A_BATCH)
        known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in left_out]
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            raise TypeError(
                f"sparse_distillation_loss, of a top-k cache, has no option {', '.join(unknown)}; its options are {', '.join(known)}"
            )
        if "tail" not in self.options:
            raise TypeError('a top-k cache wants tail="bucket", "renormalise" or "ignore": see sparse_distillation_loss')
        self.options.setdefault("temperature", cache.plan.temperature)
        # One token of two, for what values may be.
        ids = torch.zeros(1, 1, dtype=torch.int64)
        sparse_distillation_loss(
            torch.zeros(1, 1), torch.zeros(2, 1), ids, torch.zeros(1, 1), ids[0], teacher_temperature=cache.plan.temperature, **self.options
        )

    def _forward(self, reduction: Reduction) -> Forward:
        """Of a batch: the loss () or (B, S); sums over tokens of what is logged, and the number of tokens, (B, logged + 1); and () what the
        student's auxiliary losses add, by their coefficients, whatever the number of tokens."""
        options, fields, sparse = {**self.options, "reduction": reduction}, tuple(self.metrics.values()), self.sparse
        options.pop("tail", None)  # which teacher_arguments has

        def forward(
            student: nn.Module,
            *,
            batch: dict[str, Any],
            teacher: dict[str, Any],
            labels: Tensor,
            token_weight: Tensor | None,
            num_items: int | Tensor | None,
        ) -> tuple[Tensor, Tensor, Tensor]:
            output = run_backbone(student, **batch)
            given = {**output.as_student(), **teacher, "labels": labels, "token_weight": token_weight, "num_items": num_items}
            if sparse:
                loss = sparse_distillation_loss(**given, **options)
                valid, columns = labels != IGNORED, []
            else:
                loss, stats = distillation_loss_and_stats(**given, **options)
                valid, columns = stats.valid, [getattr(stats, name) for name in fields]
            columns += [valid * output.auxiliary[name].value.detach() for name in self.auxiliary]
            added = loss.new_zeros(()) + output.auxiliary_loss
            return loss, torch.stack([column.sum(-1).float() for column in (*columns, valid)], -1), added

        return forward

    def teacher_arguments(self, output: CachedTeacher) -> dict[str, Any]:
        """The arguments that a CachedTeacher is to the loss."""
        return output.as_sparse_teacher(self.options["tail"]) if self.sparse else output.as_teacher()
