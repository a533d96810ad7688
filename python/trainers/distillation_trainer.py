"""The Trainer of transformers, with the distillation loss in place of the model's own."""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distill_kernels.api.cache.reading import TeacherCache
from distill_kernels.api.losses.prepared_heads import PreparedHead, prepare_head
from distill_kernels.api.models.backbone import auxiliary_names, check_model, check_packing, run_backbone, vocabulary_size
from distill_kernels.api.models.labels import placeholder_ids
from distill_kernels.api.models.lm_head import without_peft
from distill_kernels.api.models.offloaded import is_offloaded
from distill_kernels.api.trainers import batches
from distill_kernels.api.trainers.batches import IGNORED, Reader
from distill_kernels.api.trainers.given_models import check_tokenizers, loaded
from distill_kernels.api.trainers.trainer_loss import NO_TEACHER, Reduction, TrainerLoss

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(f'DistillationTrainer needs transformers and accelerate ({error}): pip install "distill_kernels[trainer]"') from error

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput


_OF_THE_HEAD = ("teacher_weight", "teacher_bias")


class DistillationTrainer(Trainer):
    """Trains a causal language model of transformers to match a teacher's next-token distributions.

    It is a `transformers.Trainer` in all but the loss, which is `distill_kernels.distillation_loss` on the hidden states of both models:
    neither model's logits are made. The loss is computed inside of the forward of whatever wraps the student (DistributedDataParallel,
    fully_shard, torch.compile); checkpoints hold the student alone, as `from_pretrained` takes them.

    Every next token is learned from, but where `labels` (not shifted) are -100, at padding by `attention_mask`, where the next token is one
    that an image is put in place of (config.image_token_id and the like), and where `position_ids` begin another packed document; batches
    need no `labels`. `completion_mask` and `assistant_masks` are 1 at tokens to learn from, and `token_weight` multiplies a token's loss:
    (B, S), not shifted. Each model gets what its own forward takes of a batch.

    A step's loss is the mean over these tokens, whatever their weights, of all its batches (gradient accumulation), and of all processes if
    `average_tokens_across_devices`; that of an evaluation is the mean over its tokens, however they are split into batches. Logged beside
    the loss, as means over tokens: kd (nats, without temperature² and weight), ce (nats), top1_agreement, student_entropy and
    teacher_entropy (nats); in evaluation with the prefix eval_.

    What the student's own forward adds to its cross entropy, by which routers of experts are kept busy (config.output_router_logits), is
    added with the model's coefficient, as the mean over the batches of a step and over processes, and logged without it: router_aux_loss.

    Args:
        model: the student; a PeftModel is taken, too (LoRA on the LM head is exact, and takes memory for a copy of the head). A local
            folder is loaded, in float32.
        args: transformers.TrainingArguments. label_smoothing_factor smooths the cross entropy; use_liger_kernel is refused.
        teacher_model: a causal language model with the same vocabulary. It is put into evaluation mode, its parameters get
            requires_grad=False, and it is moved to the training device, unless it has a device map; its dtype stays what it is. A local
            folder is loaded, in the dtype that its weights have.
        teacher_cache: a TeacherCache, in place of teacher_model; rows of all data sets, evaluation's included, must be in it. They are
            found by their token ids, or brought by its own data set and collator: without a data_collator, its is used. If it is one of
            top-k log-probabilities, the loss is `sparse_distillation_loss`, whose `tail` is required then, and no metrics are logged.
        teacher_stand_in_id: a token that teacher_model reads in the place of those that it does not have, where the student's tokenizer has
            more (with vocab_mismatch="truncate"); by default such a token ends the training in words.
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

    def __init__(
        self,
        model: "PreTrainedModel | nn.Module | str | Path | None" = None,
        args: "TrainingArguments | None" = None,
        *,
        teacher_model: "nn.Module | str | Path | None" = None,
        teacher_cache: TeacherCache | None = None,
        teacher_stand_in_id: int | None = None,
        **options: Any,
    ) -> None:
        known = inspect.signature(Trainer.__init__).parameters
        trainer = {name: value for name, value in options.items() if name in known}
        options = {name: value for name, value in options.items() if name not in known}
        if teacher_model is not None and teacher_cache is not None:
            raise TypeError("teacher_model and teacher_cache were both passed; wanted one teacher")
        has_teacher = teacher_model is not None or teacher_cache is not None
        if not has_teacher and options.get("kd_weight", 1.0) != 0:
            raise TypeError("teacher_model and teacher_cache are missing; without a teacher pass kd_weight=0 and a ce_weight")
        if teacher_cache is not None and trainer.get("data_collator") is None:
            trainer["data_collator"] = teacher_cache.collate
        smoothing = 0.0 if args is None else args.label_smoothing_factor
        self.loss = TrainerLoss(options, label_smoothing=smoothing, has_teacher=has_teacher, cache=teacher_cache)
        if args is not None and getattr(args, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel replaces the student's forward and loss, but here the loss is made of hidden states; set it to False"
            )
        if trainer.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func takes logits, which are not made here; options of distillation_loss say what the loss is")
        self.teacher_cache, self._stand_in = teacher_cache, teacher_stand_in_id
        model, teacher_model = loaded("model", model, torch.float32), loaded("teacher_model", teacher_model, "auto")
        super().__init__(model=model, args=args, **trainer)
        check_parallelism(self)
        self.model_accepts_loss_kwargs = True  # so that Trainer knows that the loss is normalised by num_items_in_batch
        self.teacher_model = None if teacher_model is None else self._frozen(teacher_model)
        self._check_models()
        self._readers = [Reader(known_model) for known_model in (self._student, self.teacher_model) if known_model is not None]
        for dataset in (self.train_dataset, self.eval_dataset):
            batches.check_columns(getattr(dataset, "column_names", None) or ())
        self._teacher_here: dict[str, Any] | None = None  # the head of a teacher elsewhere
        self._teacher_head: PreparedHead | None = None  # quantised, of a loss with `sweep`
        self._trained, self._evaluated, self._evaluated_loss = _TokenMeans(), _TokenMeans(), _TokenMeans()

    @property
    def _student(self) -> nn.Module:
        """self.model, which Trainer may be made without, but not used."""
        student: nn.Module | None = self.model
        if student is None:
            raise TypeError("model is missing: pass the student")
        return student

    def _frozen(self, teacher: nn.Module) -> nn.Module:
        trained = {id(parameter) for parameter in self._student.parameters() if parameter.requires_grad}
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError("teacher_model shares parameters that are trained with the student; pass a model of its own")
        if getattr(teacher, "hf_device_map", None) is None and not is_offloaded(teacher):
            teacher.to(self.args.device)
        return teacher.requires_grad_(False).eval()

    def _check_models(self) -> None:
        """That the library knows how both make logits, by running them on a few tokens, and that their vocabularies agree."""
        for model in (self._student, self.teacher_model):
            if model is not None:
                check_model(model)
        self.loss.auxiliary = auxiliary_names(self._student)
        self._placeholders = placeholder_ids(self._student)
        student, teacher = vocabulary_size(self._student), None
        if self.teacher_model is not None:
            teacher = vocabulary_size(self.teacher_model)
        elif self.teacher_cache is not None:
            teacher = self.teacher_cache.plan.vocabulary
        if teacher is not None and teacher != student and self.loss.options.get("vocab_mismatch", "error") == "error":
            how = "a list of the teacher's tokens can only be compared by a student that has them all"
            if not self.loss.sparse:
                how = f"if the first {min(student, teacher)} entries mean the same tokens, "
                how += 'pass vocab_mismatch="truncate" to compare those, renormalised'
            raise ValueError(f"the student's LM head has {student} rows but the teacher's has {teacher}; {how}")
        self._teacher_embeddings = self._fewer_embeddings()
        shared = None if teacher is None else min(student, teacher)
        check_tokenizers(self._student, self.processing_class, self.teacher_model or self.teacher_cache, shared)

    def _fewer_embeddings(self) -> int | None:
        """How many tokens the teacher can read, if the student can read more."""
        if self.teacher_model is None:
            return None
        student, teacher = (without_peft(model).get_input_embeddings().weight.shape[0] for model in (self._student, self.teacher_model))
        if self._stand_in is not None and not 0 <= self._stand_in < teacher:
            raise ValueError(f"teacher_stand_in_id is {self._stand_in}, wanted a token that the teacher has: 0 to {teacher - 1}")
        return teacher if teacher < student else None

    def _set_signature_columns_if_needed(self) -> None:
        """Trainer drops columns that the student's forward does not take, unless they are named here: the teacher's, a cache's and the
        loss's. And those that look like the loss's and are not read, so that they are seen and refused."""
        super()._set_signature_columns_if_needed()
        named: Any = self._signature_columns  # a list now, which Trainer's own annotations do not say
        others = [*self._cached_columns(), *batches.OF_THE_LOSS, *batches.NOT_READ, *(name for one in self._readers for name in one.names)]
        named.extend(name for name in dict.fromkeys(others) if name not in named)

    def _cached_columns(self) -> list[str]:
        """What a batch may bring of a cache."""
        if self.teacher_cache is None:
            return []
        return ["row", *(f"teacher_{name}" for name in self.teacher_cache.plan.token_columns())]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int | Tensor | None]:
        """The next batches, and the number of tokens that they are learned from: of all processes, if these are averaged over."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        count = torch.stack([(batches.targets(batch, self._placeholders) != IGNORED).sum().to(device) for batch in samples]).sum()
        if self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count, reduction="sum")
        return samples, count.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, () float32; with return_outputs a dict without logits beside it."""
        loss, rows, added = self._loss_and_rows(model, inputs, num_items_in_batch, "mean")
        if self._student.training:
            self._trained.add(rows)
        if num_items_in_batch is not None:
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # for gradients are averaged over processes
            added = added / getattr(self, "current_gradient_accumulation_steps", 1)
        loss = loss + added
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(loss, logits, labels) of a batch. Logits, which only compute_metrics and predict() ask for, take a forward of their own."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            losses, rows, added = self._loss_and_rows(model, inputs, None, "none")
        counts = (batches.targets(inputs, self._placeholders) != IGNORED).sum(-1, keepdim=True)
        sums = torch.cat((losses.sum(-1, keepdim=True) + added * counts, counts), -1)
        # Which leaves out the rows that made the last batch even over processes.
        self._evaluated_loss.add(self.gather_function(sums))
        self._evaluated.add(self.gather_function(rows))
        loss = sums[:, 0].sum() / sums[:, -1].sum().clamp(min=1)
        if prediction_loss_only:
            return loss, None, None
        _, logits, _ = super().prediction_step(model, self._readers[0].inputs(inputs), False, ignore_keys)
        return loss, logits, inputs.get("labels")

    def evaluation_loop(
        self,
        dataloader: "DataLoader[Any]",
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> "EvalLoopOutput":
        """Trainer's, with the loss and the metrics as means over all tokens instead of over batches."""
        for sums in (self._evaluated, self._evaluated_loss):
            sums.take()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        taken = (*self._evaluated_loss.take(), *self._evaluated.take())
        means = dict(zip(("loss", *self.loss.logged), taken, strict=False))
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's; the loss of training steps is joined by the metrics of the same steps."""
        if "loss" in logs:
            logs = {**logs, **dict(zip(self.loss.logged, self._trained.take(self.accelerator), strict=False))}
        super().log(logs, start_time)

    def _loss_and_rows(
        self, model: nn.Module, inputs: dict[str, Any], num_items: int | Tensor | None, reduction: Reduction
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What TrainerLoss.forwards return, by the forward of `model`."""
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        batches.check_read(inputs, self._readers, self._cached_columns())
        batch = self._readers[0].inputs(inputs)
        with self.accelerator.autocast():
            if self.args.torch_compile:
                check_packing(student, **batch)  # which the compiled forward cannot
            teacher = self._teacher_output(inputs)
            with forward_replaced(student, self.loss.forwards[reduction]):
                of_tokens = {"labels": batches.targets(inputs, self._placeholders), "token_weight": batches.weights(inputs)}
                made: tuple[Tensor, Tensor, Tensor] = model(batch=batch, teacher=teacher, **of_tokens, num_items=num_items)
                return made

    def _where_the_loss_runs(self, output: dict[str, Any]) -> dict[str, Any]:
        """A teacher's output on the training device; of a teacher that is on another, or on several, the head's copy is made once."""
        device = self.args.device
        if output["teacher_weight"].device == device:
            return output
        if self._teacher_here is None:
            self._teacher_here = {name: output[name] if output[name] is None else output[name].to(device) for name in _OF_THE_HEAD}
        return {**output, **self._teacher_here, "teacher_hidden": output["teacher_hidden"].to(device)}

    @torch.no_grad()
    def _teacher_output(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self.teacher_model is not None:
            batch = self._readers[1].inputs(inputs)
            if self._teacher_embeddings is not None:
                batch["input_ids"] = batches.readable(batch["input_ids"], self._teacher_embeddings, self._stand_in)
            output = self._where_the_loss_runs(run_backbone(self.teacher_model, **batch).as_teacher())
        elif self.teacher_cache is not None:
            output = self.loss.teacher_arguments(self.teacher_cache.teacher_output(inputs))
        else:
            return NO_TEACHER
        if self.loss.options.get("sweep") is not None:
            if self._teacher_head is None:
                self._teacher_head = prepare_head(output["teacher_weight"])
            output["teacher_weight"] = self._teacher_head
        return output


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
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


class _TokenMeans:
    """Sums over tokens, kept on the device, so that a step does not wait for it; their means are what is logged."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """rows (B, columns), the last column a number of tokens."""
        rows = rows.detach()
        # A float32 could not count one token more beyond 2²⁴; Apple's GPUs have nothing wider.
        sums = rows.sum(0, dtype=torch.float32 if rows.device.type == "mps" else torch.float64)
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, accelerator: "Accelerator | None" = None) -> list[float]:
        """Means, since the last call, of all columns but the last, over all processes if an accelerator is given; [] if there were none."""
        sums, self.sums = self.sums, None
        if sums is None:
            return []
        if accelerator is not None:
            sums = accelerator.reduce(sums, reduction="sum")
        means: list[float] = (sums[:-1] / sums[-1].clamp(min=1)).tolist()
        return means


def check_parallelism(trainer: Trainer) -> None:
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
