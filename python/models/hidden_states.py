"""The hidden states that a model's LM head is given, without running the head."""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Model -> names of inputs beside text that its body was seen to read.
_seen: "weakref.WeakKeyDictionary[nn.Module, set[Any]]" = weakref.WeakKeyDictionary()


def last_hidden_state(model: Any, **inputs: Any) -> Tensor:
    """(B, S, D): what the body returns."""
    hidden: Tensor = body_output(model, **inputs).last_hidden_state
    return hidden


def body_output(model: Any, **inputs: Any) -> Any:
    body = model.base_model
    if body is model:  # where base_model_prefix names no module of it; get_decoder would be the language model alone, without images
        body = getattr(model, "model", None)
    if body is None:
        raise NotImplementedError(f"{type(model).__name__} has no body apart from its LM head that base_model or model would name")
    return body(**{**inputs, "use_cache": False, "return_dict": True})


class _HeadReached(Exception):
    """Ends a forward."""


def head_input(model: Any, **inputs: Any) -> Tensor:
    """(B, S, D): what the LM head meets in the model's own forward, which ends there. For models that change states behind their body."""
    met: list[Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        met.append(arguments[0])
        raise _HeadReached

    hook = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        own_forward(model, **inputs)
    except _HeadReached:
        return met[0]
    finally:
        hook.remove()
    raise NotImplementedError(f"{type(model).__name__} does not call what get_output_embeddings names")


def own_forward(model: Any, **inputs: Any) -> Any:
    """What the forward of the model's class returns: that of the instance may be one that a trainer has put there, which calls this."""
    return type(model).forward(model, **{**inputs, "use_cache": False, "return_dict": True})


def check_images(model: Any, inputs: Mapping[str, Any]) -> None:
    """Once for each kind of batch with images or sounds: that the body reads them as the model's own forward does. A body that takes any
    keyword may ignore them in silence.

    Raises NotImplementedError where the LM head is given something else.
    """
    if torch.compiler.is_compiling():
        return
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    others = frozenset(name for name, value in tensors.items() if value.dim() > 1) - {"attention_mask", "inputs_embeds"}
    if not others or others in _seen.setdefault(model, set()):
        return
    with torch.no_grad(), evaluating(model):
        ways = (last_hidden_state, head_input)
        got, wanted = (nn.functional.normalize(way(model, **inputs).float(), dim=-1) for way in ways)
    # Of half of the tokens, for in 16 bits rounding may send some to other experts; and of their directions, for some are scaled on the
    # way to the head.
    error = float((got - wanted).norm(dim=-1).quantile(0.5))
    if error > 0.1:
        raise NotImplementedError(
            f"the body of {type(model).__name__} does not read {', '.join(sorted(others))} as the model's own forward does: hidden states "
            f"differ by {error:.2g} of their size; say by distill_kernels.register_architecture, hidden=, how it reads them"
        )
    _seen[model].add(others)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout, and with outputs that have names; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    named = model.config.return_dict
    model.eval()
    model.config.return_dict = True
    try:
        yield
    finally:
        model.config.return_dict = named
        for module in training:
            module.training = True
