"""Weights that accelerate keeps elsewhere than on their device: fetched through its hooks, and the LM head's once for all.

A module whose weights are offloaded has placeholders on `meta`, and a hook that brings the weights for the time of its forward.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# LM head -> its (weight, bias), fetched.
_fetched: "weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor | None]]" = weakref.WeakKeyDictionary()


def is_offloaded(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in model.parameters()) and any(_hook(module) is not None for module in model.modules())


def weight_and_bias(head: Any) -> tuple[Tensor, Tensor | None]:
    """(V, D) and (V,) or None of a linear layer: its own, or, of an offloaded one, copies on the device that it is run on."""
    if not head.weight.is_meta or _hook(head) is None:
        return head.weight, head.bias
    if head not in _fetched:
        with _brought(head):
            _fetched[head] = head.weight.detach().clone(), None if head.bias is None else head.bias.detach().clone()
    return _fetched[head]


def check_present(weight: Tensor, inputs: Iterable[Any]) -> None:
    """Raises TypeError where a model of placeholders, whose LM head's weight this is, is to be run on inputs that are none."""
    if weight.is_meta and not all(value.is_meta for value in inputs if isinstance(value, Tensor)):
        raise TypeError("the LM head's weight is on meta, a placeholder without values: load the model's weights first")


@contextlib.contextmanager
def present(model: nn.Module, name: str, tensor: Tensor) -> Iterator[Tensor]:
    """`tensor`, which model.state_dict() has by that name, with its values."""
    if not tensor.is_meta:
        yield tensor
        return
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if _hook(module) is None:
        raise TypeError(f"{name} is on meta, a placeholder without values: load the model's weights first")
    with _brought(module):
        yield getattr(module, leaf)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first parameter is, or is brought to."""
    first = next(model.parameters(), None)
    if first is not None and not first.is_meta:
        return first.device
    hooks = (_hook(module) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks if hook is not None)
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def _hook(module: Any) -> Any:
    return getattr(module, "_hf_hook", None)


def _brought(module: nn.Module) -> "contextlib.AbstractContextManager[None]":
    from accelerate.utils import align_module_device

    brought: contextlib.AbstractContextManager[None] = align_module_device(module)
    return brought
