"""How architectures make logits of hidden states: which numbers of the configuration scale and cap them, and where the hidden states are.

A recipe is listed here, registered by a user, or found by running the model once on a few tokens (`measured_logits`). Whichever it is,
the model's own logits have the last word: a recipe that does not give them is refused.
"""

import logging
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill_kernels.api.models import auxiliary_losses
from distill_kernels.api.models.hidden_states import body_output, evaluating, head_input, last_hidden_state
from distill_kernels.api.models.lm_head import Head
from distill_kernels.api.models.measured_logits import Fit, LogitRecipe, best_fit, few_tokens

log = logging.getLogger(__name__)

HiddenStates = Callable[..., Tensor]  # (model, **inputs) -> what the LM head is given, (B, S, D)
HeadParts = Callable[[Any], tuple[Tensor, Tensor | None]]  # model -> weight (V, D), bias (V,) or None


@dataclass(frozen=True)
class Architecture:
    """recipe: of the logits; hidden and head, where the model's own ways to them do not do."""

    recipe: LogitRecipe = LogitRecipe()
    hidden: HiddenStates | None = None
    head: HeadParts | None = None


_PLAIN_ARCHITECTURES = (
    "apertus arcee bamba bloom codegen deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4 falcon gemma glm glm4 glm4_moe gpt2 "
    "gpt_bigcode gpt_neo gpt_neox gpt_oss gptj helium hunyuan_v1_dense jamba lfm2 llama ministral mistral mixtral mpt "
    "nemotron olmo olmo2 olmo3 olmoe opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 "
    "stablelm starcoder2"
)
# config.model_type -> what is known of it without running anything, for models that cannot be run: sharded, offloaded, being compiled.
_KNOWN: dict[str, Architecture] = {
    **dict.fromkeys(_PLAIN_ARCHITECTURES.split(), Architecture()),
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "nanochat", "vaultgemma"),
        Architecture(LogitRecipe(softcap="final_logit_softcapping")),
    ),
    **dict.fromkeys(("cohere", "cohere2"), Architecture(LogitRecipe(multiply_by="logit_scale"))),
    **dict.fromkeys(
        ("granite", "granitemoe", "granitemoehybrid", "granitemoeshared"), Architecture(LogitRecipe(divide_by="logits_scaling"))
    ),
    "falcon_h1": Architecture(LogitRecipe(multiply_by="lm_head_multiplier")),
    "hyperclovax": Architecture(LogitRecipe(multiply_by="logits_scaling")),
}
# Of models that were run. The second is for models that are being compiled, where nothing can be run.
_measured: "weakref.WeakKeyDictionary[nn.Module, Architecture]" = weakref.WeakKeyDictionary()
_measured_types: dict[str, Architecture] = {}

_ADVICE = (
    "say how it makes them by distill_kernels.register_architecture, or call distillation_loss with, for each of student and teacher, "
    "*_hidden = the hidden states that the LM head is given (B, S, D), *_weight = the LM head's weight (V, D), *_bias = its bias (V,) or "
    "None, *_logit_scale = the number that multiplies hidden @ weight.T + bias (1.0 if none) and *_softcap = cap where it ends in "
    "cap * tanh(logits / cap) (None if not)"
)


def register_architecture(
    model_type: str,
    *,
    multiply_by: float | str | None = None,
    divide_by: float | str | None = None,
    softcap: float | str | None = None,
    hidden: HiddenStates | None = None,
    head: HeadParts | None = None,
) -> None:
    """Say how models of an architecture make logits, where `run_backbone` does not find out by itself.

        logits = softcap(multiply_by / divide_by * (hidden(model, **inputs) @ weight.T + bias)),   weight, bias = head(model)

    Each model is compared with this on a few tokens, before it is first run: what does not give its logits is refused, with the figure.

    Args:
        model_type: as config.model_type has it. What was known of it before is replaced.
        multiply_by, divide_by, softcap: a number, or the name of the configuration's field that has it; None for none. A field that is
            None at a model is none, too.
        hidden: (model, **inputs) -> what the LM head multiplies, (B, S, D), with gradients; inputs are run_backbone's batch. None: the
            last_hidden_state of model.base_model.
        head: model -> (weight (V, D), bias (V,) or None), with gradients. None: the parameters of model.get_output_embeddings().

    Raises:
        TypeError: an argument is of another kind.

    Example:
        >>> def transformed(model, **inputs):
        ...     return model.cls.predictions.transform(model.bert(**inputs).last_hidden_state)
        >>> register_architecture("bert", hidden=transformed)
    """
    if not isinstance(model_type, str):
        raise TypeError(f"model_type is {type(model_type).__name__}, wanted the name that config.model_type has")
    for name, value in {"multiply_by": multiply_by, "divide_by": divide_by, "softcap": softcap}.items():
        if isinstance(value, bool) or not isinstance(value, float | int | str | None):
            raise TypeError(f"{name} is {type(value).__name__}, wanted a number, the name of a field of the configuration, or None")
    for name, function in {"hidden": hidden, "head": head}.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} is {type(function).__name__}, wanted a function or None")
    _KNOWN[model_type] = Architecture(LogitRecipe(multiply_by, divide_by, softcap), hidden, head)
    for model in [model for model in _measured if _type_of(model) == model_type]:
        del _measured[model]


def _type_of(model: Any) -> str:
    return str(getattr(model.config, "model_type", None))


def known_architecture(model: Any) -> Architecture | None:
    """What is known of a model before it is run."""
    return _KNOWN.get(_type_of(model))


def architecture_of(model: Any, head: Head) -> Architecture:
    """How a model makes its logits: found out by running it once on a few tokens, where that can be done.

    Raises NotImplementedError where nothing gives its logits, with the figure, or where nothing is known and nothing can be run.
    """
    model_type, known = _type_of(model), known_architecture(model)
    if torch.compiler.is_compiling():
        known = known or _measured_types.get(model_type)
        if known is None:
            raise NotImplementedError(
                f"model_type {model_type!r} is not listed, and nothing can be measured while it is compiled; call run_backbone once before"
            )
        return known
    if model not in _measured:
        if known is not None and (_absent(model) or _sharded(model)):
            return known
        if _absent(model) and not any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise NotImplementedError(f"model_type {model_type!r} is not listed, and cannot be run to be measured: its weights are on meta")
        _measured[model] = _measure(model, model_type, head, known)
    return _measured[model]


def _measure(model: Any, model_type: str, head: Head, known: Architecture | None) -> Architecture:
    ways: tuple[HiddenStates, ...] = (last_hidden_state, head_input) if known is None or known.hidden is None else (known.hidden,)
    reasons = []
    for way in ways:
        try:
            fit = best_fit(model, head, way, None if known is None else known.recipe)
        except NotImplementedError as error:
            reasons.append(str(error))
            continue
        if fit.error <= fit.tolerance:
            break
        reasons.append(
            f"with {way.__name__} the nearest of {fit.tried} ways, {fit.recipe}, is off by {fit.error:.1e} of the largest of "
            f"{fit.tokens} tokens' logits (rounding: {fit.tolerance:.0e})"
        )
    else:
        raise NotImplementedError(
            f"run_backbone does not know how model_type {model_type!r} makes logits: {'; '.join(reasons)}. Please {_ADVICE}"
        )
    _warn_of_losses_left_out(model, way, fit)
    found = Architecture(fit.recipe, way, None if known is None else known.head)
    if known is None:
        log.info("model_type %r makes logits as %s: measured, to %.0e of the largest of them", model_type, fit.recipe, fit.error)
        _measured_types[model_type] = found
    elif fit.recipe != known.recipe:
        log.warning("a model of type %r makes logits as %s, and not as %s, as others do", model_type, fit.recipe, known.recipe)
    return found


def _warn_of_losses_left_out(model: Any, way: HiddenStates, fit: Fit) -> None:
    """Words for what a model's own loss has beside cross entropy, where it is not among the auxiliary losses that are returned."""
    returned = 0.0
    if way is last_hidden_state and auxiliary_losses.names(model):
        with torch.no_grad(), evaluating(model):
            inputs = auxiliary_losses.request(model, {"input_ids": few_tokens(model)})
            losses = auxiliary_losses.read(model, body_output(model, **inputs), inputs)
        returned = sum(coefficient * float(value) for value, coefficient in losses.values())
    # No more than rounding, of either way to shift labels.
    if not fit.beside or min(abs(beside - returned) for beside in fit.beside) <= 1e-4 + 1e-3 * abs(returned):
        return
    kind = type(model).__name__
    if returned and min(map(abs, fit.beside)) <= 1e-4:
        warnings.warn(
            f"{kind} leaves out of its own loss what config.output_router_logits asks for, {returned:.3g} on {fit.tokens} tokens, which "
            "run_backbone returns; set it to False to train without it",
            stacklevel=2,
        )
        return
    left_out = fit.beside[0] - returned
    advice = "training on distillation_loss leaves it out"
    coefficient = getattr(model.config, "z_loss_coefficient", 0.0)
    if abs(left_out - coefficient * fit.squared_logsumexp) <= 1e-3 * abs(left_out):
        advice = f"it is z_loss_coefficient times the square of their log-sum-exp: pass z_loss_weight={coefficient:g} to have it"
    warnings.warn(
        f"the loss of {kind} has {left_out:.3g} beside the cross entropy of its logits, on {fit.tokens} tokens, that "
        f"run_backbone does not return; {advice}",
        stacklevel=2,
    )


def _absent(model: nn.Module) -> bool:
    """Its weights are nowhere, or they are fetched one by one when a forward gets to them, which takes its time."""
    return any(parameter.is_meta for parameter in model.parameters())


def _sharded(model: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__)
