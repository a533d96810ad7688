"""The losses of TRL's distillation trainers, from hidden states: mix-ins that replace the loss of a trainer and nothing else.

Data, sampling, the teacher, the normaliser and the logs remain TRL's. There is no import of trl here until a trainer is made, and
nothing of trl is changed: a trainer computes its loss here if its class statement says so.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distill_kernels.api.losses.distillation import DistillationLoss, distillation_loss, distillation_loss_and_stats
from distill_kernels.api.losses.presets import preset
from distill_kernels.api.models.backbone import BackboneOutput, run_backbone
from distill_kernels.api.models.labels import next_token_labels
from distill_kernels.api.trainers.given_models import check_tokenizers

if TYPE_CHECKING:
    from accelerate import Accelerator


class _TRLMixin:
    """What both have in common: the checks before training, and the loss of a batch inside of the student's wrapper."""

    # What the trainer behind the mix-in brings.
    accelerator: "Accelerator"
    teacher_model: nn.Module  # or None, which is refused
    beta: float
    model: nn.Module
    _metrics: dict[str, dict[str, list[float]]]

    loss_options: ClassVar[dict[str, Any]] = {}
    _trainer = ""  # the class of trl whose method is replaced
    _replaced = ""  # the method's name
    _parameters: tuple[str, ...] = ()  # and its parameters, by which a trl that computes its loss elsewhere is told

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A trainer in front would never call what is behind it, and would train on its own loss without a word.
        for base in cls.__mro__[: cls.__mro__.index(_TRLMixin)]:
            if "_trainer" in vars(base):
                break
            if (base.__name__, base.__module__.partition(".")[0]) == (cls._trainer, "trl"):
                raise TypeError(f"{cls.__name__} has {base.__name__} before the mix-in, wanted the mix-in first")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._check_class()
        super().__init__(*args, **kwargs)
        if self.teacher_model is None:
            raise ValueError(f"{type(self).__name__} got no teacher_model, wanted one: its hidden states are what the loss is made of")
        if getattr(self, "_is_vlm", False):
            raise ValueError(f"{type(self).__name__} got a processor of images, wanted a tokenizer: the loss is of text models only")
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, name, None) is not None:
                raise ValueError(f"{type(self).__name__} got {name}, which needs logits: there are none to pass to it")
        student, teacher = (self.accelerator.unwrap_model(model) for model in (self.model, self.teacher_model))
        check_tokenizers(student, getattr(self, "processing_class", None), teacher, None)

    def _check_class(self) -> None:
        kind, mixin = type(self), next(base for base in type(self).__mro__ if "_trainer" in vars(base))
        behind = kind.__mro__[kind.__mro__.index(mixin) + 1 :]
        owner = next((base for base in behind if self._replaced in vars(base)), None)
        if owner is None or (owner.__name__, owner.__module__.partition(".")[0]) != (self._trainer, "trl"):
            raise TypeError(
                f"{mixin.__name__} replaces {self._replaced} of trl's {self._trainer}, but found that of {owner and owner.__qualname__}; "
                f"wanted class {kind.__name__}({mixin.__name__}, {self._trainer}), or a subclass of it that leaves {self._replaced} alone"
            )
        parameters = tuple(inspect.signature(vars(owner)[self._replaced]).parameters)
        if parameters != self._parameters:
            raise TypeError(
                f"{mixin.__name__} knows trl 1.16, whose {self._trainer}.{self._replaced} takes {', '.join(self._parameters)}; "
                f"that of the trl installed takes {', '.join(parameters)}"
            )
        for name, reason in (
            ("reduction", "the trainer needs a mean"),
            ("process_group", "the trainer's ranks have rows of their own, and whole heads"),
            ("sequence_parallel", "the trainer's ranks have whole rows"),
        ):
            if name in self.loss_options:
                raise ValueError(f"{kind.__name__}.loss_options got {name}, but {reason}")
        DistillationLoss(**self.loss_options)  # names and values

    def _arguments(
        self, student: nn.Module, labels: Tensor, num_items: int | Tensor | None, convention: dict[str, Any], **batch: Tensor
    ) -> tuple[dict[str, Any], Tensor | float]:
        """Of distillation_loss, for a batch, and what the student's auxiliary losses add; to be made inside of the forward of what wraps
        the student."""
        learned = run_backbone(student, **batch)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        self.teacher_model.eval()
        with torch.no_grad():
            taught = _redirection()(self.teacher_model, teacher, run_backbone, teacher, **batch)
        arguments = {
            **learned.as_student(),
            **taught.as_teacher(),
            "labels": labels,
            "num_items": num_items.to(labels.device) if isinstance(num_items, Tensor) else num_items,
            **convention,
            **self.loss_options,
        }
        return arguments, self._added(learned)

    def _added(self, learned: BackboneOutput) -> Tensor | float:
        """The student's auxiliary losses by their coefficients, as a mean over the batches of a step, and into the log."""
        mode = "train" if self.model.training else "eval"
        steps = getattr(self, "current_gradient_accumulation_steps", 1) if self.model.training else 1
        added: Tensor | float = 0.0
        for name, (value, coefficient) in learned.auxiliary.items():
            self._metrics[mode][name].append(value.item())
            # A trainer with arguments of its own for it has them over the model's.
            added = added + getattr(self, f"{name}_coef", coefficient) * value / steps
        return added


class TRLGKDMixin(_TRLMixin):
    """The loss of trl's experimental GKDTrainer (1.16) from hidden states: put it before the trainer.

        from distill_kernels import TRLGKDMixin
        from trl.experimental.gkd import GKDTrainer

        class Trainer(TRLGKDMixin, GKDTrainer):
            loss_options = {"column_fraction": 0.08}  # or without

    What is computed is `preset("gkd", beta=trainer.beta)` over num_items_in_batch, as there, on the student's own samples (lmbda), the
    teacher's (seq_kd) or the data's text. A mixture of experts' load-balancing loss, which GKDConfig asks for by router_aux_loss_coef and
    GKDTrainer leaves out, is added as SFTTrainer does, and logged as router_aux_loss. No logits are held: there is nothing to pass to
    compute_metrics, which is refused.

    loss_options: options of `distillation_loss`, over what the trainer's own say; checked when a trainer is made.

    Raises
        TypeError: the class is not put together as above, or trl is another than this knows; or, in the first step, what
            `run_backbone` raises. ValueError: compute_metrics, or an option that is refused.

    Source: Agarwal et al. (2024), arXiv:2306.13649, eq. 1. docs/trl.md has an example that runs.
    """

    _trainer = "GKDTrainer"
    _replaced = "compute_loss"
    _parameters = ("self", "model", "inputs", "return_outputs", "num_items_in_batch")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        student = self.accelerator.unwrap_model(model)
        labels = next_token_labels(inputs["input_ids"], labels=inputs["labels"])
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        # Redirected, the forward is not the one that accelerate put autocast around.
        with self.accelerator.autocast():
            loss: Tensor = _redirection()(model, student, self._divergence, student, labels, num_items_in_batch, **batch)
        # transformers takes the outputs of an evaluation for logits, less the loss.
        return (loss, {"loss": loss}) if return_outputs else loss

    def _divergence(self, student: nn.Module, labels: Tensor, num_items: int | Tensor | None, **batch: Tensor) -> Tensor:
        arguments, added = self._arguments(student, labels, num_items, preset("gkd", beta=self.beta), **batch)
        return distillation_loss(**arguments) + added


class TRLDistillationMixin(_TRLMixin):
    """The loss of trl's DistillationTrainer (1.16) from hidden states: put it before the trainer.

        from distill_kernels import TRLDistillationMixin
        from trl import DistillationTrainer

        class Trainer(TRLDistillationMixin, DistillationTrainer):
            loss_options = {"column_fraction": 0.08, "sweep": "int8"}  # or without

    What is computed is `preset("trl", beta=trainer.beta, temperature=trainer.temperature)` over the trainer's own count of sampled tokens;
    its log has the student's entropy as before. A student with config.output_router_logits gets its routers' loss added, as a mean over
    the batches of a step. What trl refuses, such as LoRA on the LM head, it still refuses.

    loss_options, Raises: as in `TRLGKDMixin`; images are refused, too.
    """

    temperature: float

    _trainer = "DistillationTrainer"
    _replaced = "_compute_loss"
    _parameters = ("self", "unwrapped_student", "inputs", "num_items_in_batch")

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        prompt_ids, completion_ids = inputs["prompt_ids"], inputs["completion_ids"]
        chosen = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        input_ids = torch.cat([prompt_ids, completion_ids], 1)
        labels = torch.cat([torch.full_like(prompt_ids, -100), torch.where(chosen != 0, completion_ids, -100)], 1)
        arguments, added = self._arguments(
            unwrapped_student,
            next_token_labels(input_ids, labels=labels),
            num_items_in_batch,
            preset("trl", beta=self.beta, temperature=self.temperature),
            input_ids=input_ids,
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        )
        loss, stats = distillation_loss_and_stats(**arguments)
        return loss + added, stats.student_entropy.sum(), stats.valid.sum()


def _redirection() -> Callable[..., Any]:
    """trl's way of calling a method inside of the forward of what wraps a model, which keeps DDP's and FSDP's hooks in force."""
    from trl.models.utils import _ForwardRedirection

    redirection: Callable[..., Any] = _ForwardRedirection()
    return redirection
