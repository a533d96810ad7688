"""Hidden states and LM heads of Hugging Face causal language models, in the form distillation_loss takes. transformers is not imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from distill_kernels.api.models import auxiliary_losses, packed_documents
from distill_kernels.api.models.architectures import architecture_of, known_architecture
from distill_kernels.api.models.auxiliary_losses import AuxiliaryLoss
from distill_kernels.api.models.hidden_states import body_output, check_images, last_hidden_state
from distill_kernels.api.models.lm_head import Head, head_of, without_peft
from distill_kernels.api.models.offloaded import check_present

# Trainer and collators put these into a batch for the model's own loss, which is never computed here.
_LOSS_ARGUMENTS = frozenset({"labels", "shift_labels", "num_items_in_batch"})


@dataclass(frozen=True, eq=False)
class BackboneOutput:
    """What a causal language model multiplies to get its logits: softcap(logit_scale * (hidden @ weight.T + bias)).

    hidden (B, S, D) comes after the final norm; weight (V, D) and bias (V,) or None are the LM head's own parameters; logit_scale
    is a float and softcap the cap of cap * tanh(logits / cap), or None.

    auxiliary has what the model adds to its cross entropy, by name: `router_aux_loss`, by which a mixture of experts with
    config.output_router_logits keeps its experts equally busy. It is not part of distillation_loss; add auxiliary_loss to that.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    auxiliary: Mapping[str, AuxiliaryLoss] = field(default_factory=dict)

    @property
    def auxiliary_loss(self) -> Tensor | float:
        """The sum of coefficient * value, () float32; 0.0 where there is nothing to add."""
        return sum((coefficient * value for value, coefficient in self.auxiliary.values()), 0.0)

    def as_logits(self) -> dict[str, Any]:
        """The keyword arguments of token_logprobs."""
        return {name: getattr(self, name) for name in ("hidden", "weight", "bias", "logit_scale", "softcap")}

    def as_student(self) -> dict[str, Any]:
        """The student's keyword arguments of distillation_loss; gradients flow into hidden, weight and bias."""
        return {f"student_{name}": value for name, value in self.as_logits().items()}

    def as_teacher(self) -> dict[str, Any]:
        """The teacher's keyword arguments of distillation_loss; its tensors are detached and still share memory with the model."""
        return {f"teacher_{name}": value.detach() if isinstance(value, Tensor) else value for name, value in self.as_logits().items()}


def run_backbone(model: nn.Module, **batch: Any) -> BackboneOutput:
    """Run a transformers causal language model up to its final norm and return what its logits are made of.

        softcap(logit_scale * (hidden @ weight.T + bias)) == model(**batch).logits

    No logits and no loss are computed: `labels` in the batch is ignored, and no key-value cache is kept. Architectures differ in
    logit_scale, bias and softcap. So a model's first batch is preceded by a run on four tokens, in which its own logits are compared with
    these; docs/models.md has the table of architectures.

    Args:
        model: a causal language model of transformers, unwrapped, with a plain torch.nn.Linear LM head (tied embeddings are fine); or a
            PeftModel of one, whose adapters may be anywhere, and on the LM head LoRA: see `lm_head.Head.widened` for what that costs.
        batch: the model's inputs, such as input_ids (B, S) int64, attention_mask (B, S) and position_ids (B, S).

    Returns:
        BackboneOutput with hidden (B, S, D) and weight (V, D), whose dtypes are the model's; D + r for LoRA of rank r on the LM head.

    Raises:
        TypeError: the model is wrapped (DDP, FSDP, torch.compile), is no causal language model, or its head is not plain. Of a model
            sharded by torch.distributed.fsdp.fully_shard the head is whole inside of the model's own forward only.
        ValueError: the batch asks for logits_to_keep; or it has packed documents that the model does not keep apart, which is found out
            once, by some of them alone.
        NotImplementedError: the model makes its logits in no way that is known, see `register_architecture`; the message says how far
            off the nearest one is.

    Example:
        >>> with torch.no_grad():
        ...     target = run_backbone(teacher, **batch)
        >>> labels = next_token_labels(batch["input_ids"], attention_mask=batch["attention_mask"])
        >>> loss = distillation_loss(**run_backbone(student, **batch).as_student(), **target.as_teacher(), labels=labels)
    """
    parts = _parts(model)
    check_present(parts.head.weight, batch.values())
    if "logits_to_keep" in batch:
        raise ValueError("the batch has logits_to_keep, but run_backbone returns every position; drop it and slice hidden instead")
    inputs = {name: value for name, value in batch.items() if name not in _LOSS_ARGUMENTS}
    architecture = architecture_of(parts.model, parts.head)
    packed_documents.check(parts.model, architecture.hidden or last_hidden_state, inputs)
    auxiliary: Mapping[str, AuxiliaryLoss] = {}
    if architecture.hidden in (None, last_hidden_state):
        check_images(parts.model, inputs)
        inputs = auxiliary_losses.request(parts.model, inputs)
        output = body_output(parts.model, **inputs)
        states, auxiliary = output.last_hidden_state, auxiliary_losses.read(parts.model, output, inputs)
    else:
        states = architecture.hidden(parts.model, **inputs)
    scale_and_softcap = architecture.recipe.scale_and_softcap(parts.model.config)
    return BackboneOutput(*parts.head.widened(states), *scale_and_softcap, auxiliary)


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the LM head, which may be more than the tokenizer has tokens; nothing is run. Raises TypeError as run_backbone does."""
    return _parts(model).head.weight.shape[0]


def auxiliary_names(model: nn.Module) -> tuple[str, ...]:
    """The keys of BackboneOutput.auxiliary, as the model is configured."""
    return auxiliary_losses.names(without_peft(model))


def check_model(model: nn.Module) -> None:
    """Raises what run_backbone would: runs the model on a few tokens, once, to see how it makes logits."""
    architecture_of(*_parts(model))


def check_packing(model: nn.Module, **batch: Any) -> None:
    """Raises what run_backbone would for packed documents that the model does not keep apart; for a batch of a model that is compiled."""
    parts = _parts(model)
    inputs = {name: value for name, value in batch.items() if name not in _LOSS_ARGUMENTS}
    packed_documents.check(parts.model, architecture_of(*parts).hidden or last_hidden_state, inputs)


class _Parts(NamedTuple):
    model: Any  # without peft
    head: Head


def _parts(model: nn.Module) -> _Parts:
    bare = without_peft(model)
    known = known_architecture(bare) if hasattr(bare, "config") else None
    return _Parts(bare, head_of(bare) if known is None or known.head is None else Head(*known.head(bare)))
