"""The hidden states that a model's LM head is given, without running the head."""

from typing import Any

from torch import Tensor, nn


def last_hidden_state(model: Any, **inputs: Any) -> Tensor:
    """(B, S, D): what the body returns."""
    hidden: Tensor = body_output(model, **inputs).last_hidden_state
    return hidden


def body_output(model: Any, **inputs: Any) -> Any:
    body = model.base_model
    if body is model:
        raise NotImplementedError(f"{type(model).__name__} has no body apart from its LM head that base_model would name")
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
