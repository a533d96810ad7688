"""Terms of a model's own loss beside the cross entropy of its logits: what routers of mixtures of experts are asked to balance.

transformers computes them in a model's forward behind its LM head. Here the same function of the model's own module is called with what
the body returns, so that the head need not be run.
"""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

ROUTERS = "router_aux_loss"


class AuxiliaryLoss(NamedTuple):
    """coefficient · value is what a model adds to its cross entropy. value: () float32, with its gradient."""

    value: Tensor
    coefficient: float


def names(model: Any) -> tuple[str, ...]:
    """Of the auxiliary losses that a model computes as it is configured."""
    return (ROUTERS,) if _asked(model, {}) and _balancing(model) is not None else ()


def request(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a model's body with which it returns what its auxiliary losses are made of."""
    return {**inputs, "output_router_logits": True} if _asked(model, inputs) and _balancing(model) is not None else dict(inputs)


def read(model: Any, output: Any, inputs: Mapping[str, Any]) -> dict[str, AuxiliaryLoss]:
    """The auxiliary losses of a body's output, made from `inputs` as `request` returns them."""
    balancing = _balancing(model)
    if balancing is None or not _asked(model, inputs):
        return {}
    experts, chosen = _number(model, "num_experts", "num_local_experts"), _number(model, "num_experts_per_tok")
    given = {
        "num_experts": experts,
        "num_keys": math.isqrt(int(experts)),  # of experts in a grid, found by two keys
        "top_k": chosen,
        "attention_mask": inputs.get("attention_mask"),
    }
    others = list(inspect.signature(balancing).parameters)[1:]  # the first are the routers' logits, by various names
    value = balancing(output.router_logits, **{name: given[name] for name in others if name in given})
    if not isinstance(value, Tensor):
        return {}  # 0, where no layer has a router
    return {ROUTERS: AuxiliaryLoss(value, _number(model, "router_aux_loss_coef", "aux_loss_coef"))}


def _asked(model: Any, inputs: Mapping[str, Any]) -> bool:
    asked = inputs.get("output_router_logits")
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False) if asked is None else asked)


def _balancing(model: Any) -> Callable[..., Tensor] | None:
    """The function by which the model's own forward makes its routers' loss."""
    for base in type(model).__mro__:
        found = getattr(sys.modules.get(base.__module__), "load_balancing_loss_func", None)
        if found is not None:
            function: Callable[..., Tensor] = found
            return function
    return None


def _number(model: Any, *names: str) -> float:
    """Of the model, as its forward reads it, or of its configuration."""
    for holder in (model, model.config.get_text_config()):
        for name in names:
            value = getattr(holder, name, None)
            if value is not None:
                number: float = value
                return number
    raise AttributeError(f"{type(model).__name__} has no {' or '.join(names)}, of which its routers' loss is made")
