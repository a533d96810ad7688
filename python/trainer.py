"""The Trainer of transformers, with the distillation loss in place of the model's own."""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distill_kernels.api.heads import prepare_head
from distill_kernels.api.losses import DistillationLoss, distillation_loss_and_stats
from distill_kernels.api.models import next_token_labels, run_backbone, vocabulary_size

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(f'DistillationTrainer needs transformers and accelerate ({error}): pip install "distill_kernels[trainer]"') from error

# What is logged, means over the tokens that are learned from: name -> the field of DistillationStats that it is made of.
METRICS = {
    "kd": "divergence",
    "ce": "cross_entropy",
    "top1_agreement": "top1_agreement",
    "student_entropy": "student_entropy",
    "teacher_entropy": "teacher_entropy",
}
_OF_A_TEACHER = ("kd", "top1_agreement", "teacher_entropy")

_READ_FROM_THE_MODELS = ("student_logit_scale", "student_softcap", "teacher_logit_scale", "teacher_softcap")
_SET_BY_THE_TRAINER = ("reduction", "ignore_index")
_TARGETS = ("labels", "shift_labels")
_IGNORED = -100


class DistillationTrainer(Trainer):
    """Trains a causal language model of transformers to match a teacher's next-token distributions.

    It is a `transformers.Trainer` in all but the loss, which is `distill_kernels.distillation_loss` on the hidden states of both models:
    neither model's logits are made. The loss is computed inside of the forward of whatever wraps the student (DistributedDataParallel,
    fully_shard, torch.compile); checkpoints hold the student alone, as `from_pretrained` takes them.

    Every next token is learned from, but where `labels` (not shifted) are -100, at padding by `attention_mask`, and where `position_ids`
    begin another packed document; batches need no `labels`. A step's loss is the mean over these tokens of all its batches (gradient
    accumulation), and of all processes if `average_tokens_across_devices`; that of an evaluation is the mean over its tokens, however they
    are split into batches. Logged beside the loss, as means over tokens: kd (nats, without temperature² and weight), ce (nats),
    top1_agreement, student_entropy and teacher_entropy (nats); in evaluation with the prefix eval_.

    Args:
        model: the student; a PeftModel is taken, too (LoRA on the LM head is exact, and takes memory for a copy of the head).
        args: transformers.TrainingArguments. label_smoothing_factor smooths the cross entropy; use_liger_kernel is refused.
        teacher_model: a causal language model with the same vocabulary. It is put into evaluation mode, its parameters get
            requires_grad=False, and it is moved to the training device, unless it has a device map; its dtype stays what it is.
        options: those of `distillation_loss` (divergence, temperature, kd_weight, ce_weight, column_fraction, ...; kd_weight=0 needs no
            teacher) and those of transformers.Trainer (train_dataset, data_collator, callbacks, ...). Logit scales and softcaps are read
            from the models.

    Raises:
        TypeError, ValueError, NotImplementedError: before training, for an option that there is not, or that cannot be honoured here.

    Example:
        >>> trainer = DistillationTrainer(
        ...     model=student, teacher_model=teacher, args=TrainingArguments("out"), train_dataset=dataset, temperature=2.0, ce_weight=0.1
        ... )
        >>> trainer.train()
    """

    def __init__(self, model=None, args=None, *, teacher_model: nn.Module | None = None, **options):
        loss, trainer = _split(options)
        if loss.get("kd_weight", 1.0) != 0 and teacher_model is None:
            raise TypeError("teacher_model is missing; without a teacher pass kd_weight=0 and a ce_weight")
        if args is not None and getattr(args, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel replaces the student's forward and loss, but the loss is computed here from hidden states; set it to False"
            )
        if trainer.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func takes logits, which are not made here; options of distillation_loss say what the loss is")
        super().__init__(model=model, args=args, **trainer)
        _check_parallelism(self)
        if self.args.label_smoothing_factor != 0:
            _smooth(loss, self.args.label_smoothing_factor)
        self.loss_options = loss
        self.model_accepts_loss_kwargs = True  # so that Trainer knows that the loss is normalised by num_items_in_batch
        self.teacher_model = None if teacher_model is None else self._frozen(teacher_model)
        self._teacher_head = None  # quantised, of a loss with `sweep`
        self._forwards = {reduction: _loss_as_forward(loss, reduction) for reduction in ("mean", "none")}
        self._trained, self._evaluated = _TokenMeans(), _TokenMeans()

    def _frozen(self, teacher: nn.Module) -> nn.Module:
        trained = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError("teacher_model shares parameters that are trained with the student; pass a model of its own")
        rows = vocabulary_size(self.model), vocabulary_size(teacher)
        if rows[0] != rows[1] and self.loss_options.get("vocab_mismatch", "error") == "error":
            raise ValueError(
                f"the student's LM head has {rows[0]} rows but the teacher's has {rows[1]}; if the first {min(rows)} entries mean the "
                'same tokens, pass vocab_mismatch="truncate" to compare those, renormalised'
            )
        if getattr(teacher, "hf_device_map", None) is None:
            teacher.to(self.args.device)
        return teacher.requires_grad_(False).eval()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The next batches, and the number of tokens that they are learned from: of all processes, if these are averaged over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        count = torch.stack([(_targets(batch) != _IGNORED).sum().to(device) for batch in batches]).sum()
        if self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count, reduction="sum")
        return batches, count.clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch, () float32; with return_outputs a dict without logits beside it."""
        loss, rows = self._loss_and_rows(model, inputs, num_items_in_batch, "mean")
        if self.model.training:
            self._trained.add(rows)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # for gradients are averaged over processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(loss, logits, labels) of a batch. Logits, which only compute_metrics and predict() ask for, take a forward of their own."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            losses, rows = self._loss_and_rows(model, inputs, None, "none")
        rows = torch.cat((losses.sum(-1, keepdim=True), rows), -1)
        self._evaluated.add(self.gather_function(rows))  # which leaves out the rows that made the last batch even over processes
        loss = rows[:, 0].sum() / rows[:, -1].sum().clamp(min=1)
        if prediction_loss_only:
            return loss, None, None
        plain = {name: value for name, value in inputs.items() if name not in _TARGETS}
        _, logits, _ = super().prediction_step(model, plain, False, ignore_keys)
        return loss, logits, inputs.get("labels")

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        """Trainer's, with the loss and the metrics as means over all tokens instead of over batches."""
        self._evaluated.take()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._named(self._evaluated.take(), ("loss", *METRICS))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs, start_time=None):
        """Trainer's; the loss of training steps is joined by the metrics of the same steps."""
        if "loss" in logs:
            logs = {**logs, **self._named(self._trained.take(self.accelerator), METRICS)}
        super().log(logs, start_time)

    def _loss_and_rows(self, model, inputs, num_items, reduction) -> tuple[Tensor, Tensor]:
        """The loss, () or of each token (B, S), and sums over tokens of METRICS and their number, (B, 6): by the forward of `model`."""
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        batch = {name: value for name, value in inputs.items() if name not in _TARGETS}
        with self.accelerator.autocast():
            teacher = self._teacher_output(batch)
            with forward_replaced(student, self._forwards[reduction]):
                return model(batch=batch, teacher=teacher, labels=_targets(inputs), num_items=num_items)

    @torch.no_grad()
    def _teacher_output(self, batch) -> dict[str, Any]:
        if self.teacher_model is None:
            return {"teacher_hidden": None, "teacher_weight": None}
        output = run_backbone(self.teacher_model, **batch).as_teacher()
        if self.loss_options.get("sweep") is not None:
            if self._teacher_head is None:
                self._teacher_head = prepare_head(output["teacher_weight"])
            output["teacher_weight"] = self._teacher_head
        return output

    def _named(self, means: list[float], names) -> dict[str, float]:
        has_teacher = self.teacher_model is not None
        return {name: mean for name, mean in zip(names, means, strict=False) if has_teacher or name not in _OF_A_TEACHER}


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Whatever wraps the module calls `forward`, with the module as its self, in place of the module's own.

    So everything that a wrapper does around a forward is done around this one: the hooks by which DistributedDataParallel sums gradients,
    the gathering of sharded parameters, compilation. The module itself, with the names of its parameters, stays what it is.
    """
    # An instance may have a forward of its own already: accelerate's, which casts.
    own = module.__dict__.get("forward")
    module.forward = types.MethodType(forward, module)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _loss_as_forward(options: dict[str, Any], reduction: str) -> Callable:
    """A forward of the student that returns its loss. It is made once, for a compiler takes another function to be another model."""

    def forward(student, *, batch, teacher, labels, num_items):
        learned = run_backbone(student, **batch)
        loss, stats = distillation_loss_and_stats(
            **learned.as_student(), **teacher, labels=labels, num_items=num_items, reduction=reduction, **options
        )
        columns = [*(getattr(stats, name) for name in METRICS.values()), stats.valid]
        return loss, torch.stack([column.sum(-1).float() for column in columns], -1)

    return forward


class _TokenMeans:
    """Sums over tokens, kept on the device, so that a step does not wait for it; their means are what is logged."""

    def __init__(self):
        self.sums = None

    def add(self, rows: Tensor):
        """rows (B, columns), the last column a number of tokens."""
        rows = rows.detach()
        # A float32 could not count one token more beyond 2²⁴; Apple's GPUs have nothing wider.
        sums = rows.sum(0, dtype=torch.float32 if rows.device.type == "mps" else torch.float64)
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, accelerator=None) -> list[float]:
        """Means of all columns but the last since the last call, over all processes if an accelerator is given; none if nothing was added."""
        sums, self.sums = self.sums, None
        if sums is None:
            return []
        if accelerator is not None:
            sums = accelerator.reduce(sums, reduction="sum")
        return (sums[:-1] / sums[-1].clamp(min=1)).tolist()


def _targets(batch) -> Tensor:
    """Labels (B, S) of the next tokens, -100 where there is none to learn from."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    if batch.get("input_ids") is None:
        raise ValueError(f"the batch has no input_ids (batch, sequence), only {', '.join(batch)}")
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if labels is not None and mask is not None and mask.dim() != 2:
        mask = None  # it says who attends to whom, and the labels alone where there is a target
    return next_token_labels(
        batch["input_ids"], labels=labels, attention_mask=mask, position_ids=batch.get("position_ids"), ignore_index=_IGNORED
    )


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the loss, checked, and those of Trainer)."""
    known = inspect.signature(Trainer.__init__).parameters
    trainer = {name: value for name, value in options.items() if name in known}
    loss = {name: value for name, value in options.items() if name not in known}
    for names, reason in (
        (_READ_FROM_THE_MODELS, "is read from the models"),
        (_SET_BY_THE_TRAINER, "is set by the Trainer: means over tokens, labels of -100 left out"),
    ):
        for name in names:
            if name in loss:
                raise TypeError(f"{name} {reason}; it is no option of DistillationTrainer")
    try:
        DistillationLoss(**loss)
    except TypeError as error:
        raise TypeError(f"options of DistillationTrainer that are not of transformers.Trainer are the loss's: {error}") from error
    return loss, trainer


def _smooth(loss: dict[str, Any], factor: float):
    """label_smoothing_factor of TrainingArguments as an option of the loss."""
    if loss.get("label_smoothing", factor) != factor:
        raise ValueError(f"label_smoothing is {loss['label_smoothing']} but args.label_smoothing_factor is {factor}; pass one of them")
    if loss.get("ce_weight", 0.0) == 0:
        raise ValueError(f"args.label_smoothing_factor is {factor}, of the cross entropy, but ce_weight is 0; pass a ce_weight")
    loss["label_smoothing"] = factor
    DistillationLoss(**loss)


def _check_parallelism(trainer: Trainer):
    """Raises where the student's forward is split in a way in which the loss would be wrong."""
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(
            f"torch.nn.DataParallel over {trainer.args.n_gpu} devices is not supported; start one process for each with torchrun or "
            "accelerate launch, or show the process one device"
        )
    split = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if split is not None and (getattr(split, name, 1) or 1) > 1:
            raise NotImplementedError(
                f"parallelism_config has {name}={getattr(split, name)}, but the loss needs whole rows and a whole head"
            )
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise NotImplementedError("DeepSpeed ZeRO-3 keeps the LM head in shards that the loss cannot read; use stage 2, or FSDP2")
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
        raise NotImplementedError("FSDP of version 1 is not supported; set fsdp_version to 2")
