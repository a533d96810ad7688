"""The matrix by which a causal language model of transformers multiplies its hidden states, an adapter on it included.

Neither transformers, peft nor deepspeed is imported: wrappers and adapters are known by the names of their classes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill_kernels.api.models.offloaded import weight_and_bias

_WRAP_OUTSIDE = (
    "wrap a module whose forward calls run_backbone and distillation_loss, because going past the wrapper skips its gradient hooks"
)
_WRAPPERS = {
    "DistributedDataParallel": _WRAP_OUTSIDE,
    "DataParallel": _WRAP_OUTSIDE,
    "DeepSpeedEngine": _WRAP_OUTSIDE,
    "FullyShardedDataParallel": "shard it by torch.distributed.fsdp.fully_shard, and call run_backbone inside of its forward",
    "OptimizedModule": "pass the model from before torch.compile and compile the function which calls run_backbone",
}
_SHARDED = "its LM head is whole only inside of the sharded model's forward, so call run_backbone and distillation_loss there"


class Adapter(NamedTuple):
    """LoRA: scaling · up(down(dropout(hidden)))."""

    dropout: nn.Module
    down: nn.Linear  # (r, D)
    up: nn.Linear  # (V, r)
    scaling: float


class Head(NamedTuple):
    """logits = hidden @ weight.T + bias, plus scaling · up(down(dropout(hidden))) of every adapter."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    adapters: tuple[Adapter, ...] = ()

    def widened(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(hidden (..., D), weight (V, D), bias), or with adapters those of width D + r that have the same logits.

            hidden @ Wᵀ + s · (hidden @ Aᵀ) @ Bᵀ == [hidden, s · hidden @ Aᵀ] @ [W, B]ᵀ

        W + s·B·A is not rounded to W's dtype, in which it would lose most of a small update, and dropout stays what it is. The copy of W
        and the gradient of [W, B] take memory: (V, D + r) each.
        """
        weight, bias = self.weight, self.bias
        hidden = hidden.to(weight.device)  # where a model is spread over several
        states, heads = [hidden], [weight]
        for dropout, down, up, scaling in self.adapters:
            states.append((scaling * down(dropout(hidden.to(down.weight.dtype)))).to(hidden.dtype))
            heads.append(up.weight.to(weight.dtype))
            if up.bias is not None:
                update = scaling * up.bias
                bias = update.to(weight.dtype) if bias is None else bias + update.to(bias.dtype)
        return (hidden, weight, bias) if len(heads) == 1 else (torch.cat(states, -1), torch.cat(heads, 1), bias)


def without_peft(model: Any) -> Any:
    """The transformers model in a PeftModel, with its adapters in place, or the model itself. TypeError where peft does more than that."""
    if not _has_base(model, "PeftModel"):
        return model
    for name, config in model.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning or kind in ("XLORA", "POLY") or getattr(config, "alora_invocation_tokens", None) is not None:
            raise TypeError(
                f"adapter {name!r} is of type {kind}, which changes more than the model's layers, wanted one that changes layers only, "
                "such as LoRA"
            )
    return model.get_base_model()


def head_of(model: Any) -> Head:
    """The LM head of a causal language model without wrappers. TypeError, in words, where it is not known what it multiplies by."""
    kind = type(model).__name__
    for base in type(model).__mro__:
        if base.__name__ in _WRAPPERS:
            raise TypeError(f"run_backbone got a model wrapped in {base.__name__}, wanted the model itself: {_WRAPPERS[base.__name__]}")
    is_causal = isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "get_output_embeddings")
    if not is_causal:
        raise TypeError(f"run_backbone got {kind}, wanted a causal language model of transformers")
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"run_backbone got {kind}, which has no LM head, wanted a causal language model such as LlamaForCausalLM")
    if _has_base(head, "ModulesToSaveWrapper"):
        used = head.active_adapters and not head.disable_adapters
        head = head.modules_to_save[head.active_adapters[0]] if used else head.original_module
    tokens: Any = None  # peft's layer of rows that are trained in the place of the head's own
    if _has_base(head, "TrainableTokensWrapper"):
        layer = head.token_adapter
        head = layer.base_layer
        tokens = None if layer.disable_adapters or layer.merged or not layer.active_adapters else layer
    elif _has_base(head, "BaseTunerLayer") and (head.disable_adapters or head.merged):
        head = head.get_base_layer()  # which has what is merged
    adapters: tuple[Adapter, ...] = ()
    if type(head).__module__.startswith("peft.tuners.lora.") and type(head).__name__ == "Linear":
        adapters = tuple(_lora_adapters(head))
        head = head.base_layer
    # Quantisers, parametrisations, FSDP and other adapters show a .weight that is not what their forward multiplies by, and all of them
    # change the class of the module or of its weight; one shard of a head can pass for a plain Parameter, so its shape is checked too.
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        advice = _SHARDED if _has_base(model, "FSDPModule") else "merge or remove its adapter, quantisation or sharding"
        raise TypeError(
            f"the LM head of {kind} is {type(head).__name__} with a weight of type {type(head.weight).__name__}, "
            f"wanted a plain torch.nn.Linear with a plain Parameter, or one with LoRA or trainable tokens: {advice}"
        )
    # A copy that peft makes of tied embeddings has the numbers of its features swapped, and the whole weight.
    if sorted(head.weight.shape) != sorted((head.out_features, head.in_features)):
        raise TypeError(
            f"the LM head of {kind} has a weight of shape {tuple(head.weight.shape)}, "
            f"wanted the whole {(head.out_features, head.in_features)} and not one shard of it"
        )
    if tokens is not None:  # a copy of the head, with those rows, which peft multiplies by without a bias
        return Head(tokens.get_merged_weights(tokens.active_adapters), None)
    return Head(*weight_and_bias(head), adapters)


def _has_base(module: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(module).__mro__)


def _lora_adapters(head: Any) -> Iterator[Adapter]:
    """The active adapters of a LoRA layer, where they are not merged into its weight."""
    if head.disable_adapters or head.merged:
        return
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        # Before it had variants, peft knew of DoRA only.
        if name in getattr(head, "lora_variant", ()) or getattr(head, "use_dora", {}).get(name):
            raise TypeError(f"adapter {name!r} of the LM head is a variant of LoRA (DoRA or another), wanted plain LoRA on the LM head")
        yield Adapter(head.lora_dropout[name], head.lora_A[name], head.lora_B[name], head.scaling[name])
