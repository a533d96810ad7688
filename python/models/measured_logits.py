"""How a model makes logits, found out by running it once: which numbers of its configuration scale and cap hidden @ weight.T + bias.

What the LM head is given is multiplied on its way in, each token by another power of two, so that logits reach from 1 to 64: a cap that
small ones would not show, a scale that they would hide in rounding. The model is in evaluation mode for that long.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill_kernels.api.models.hidden_states import evaluating, own_forward
from distill_kernels.api.models.lm_head import Head

AMPLITUDES = (1.0, 4.0, 16.0, 64.0)  # the largest logit of each token, about
ENTRIES = 512  # of the vocabulary that are compared
_SCALES, _CAPS = re.compile(r"logit|lm_head|output_mult"), re.compile(r"soft_?cap")


@dataclass(frozen=True)
class LogitRecipe:
    """softcap(multiply_by / divide_by * (hidden @ weight.T + bias)): numbers, names of configuration fields, None for none."""

    multiply_by: float | str | None = None
    divide_by: float | str | None = None
    softcap: float | str | None = None

    def scale_and_softcap(self, config: Any) -> tuple[float, float | None]:
        logit_scale = _number(config, self.multiply_by) or 1.0
        logit_scale /= _number(config, self.divide_by) or 1.0
        return logit_scale, _number(config, self.softcap)

    def __str__(self) -> str:
        text = "hidden @ weight.T + bias"
        if self.multiply_by is not None:
            text = f"{self.multiply_by} * ({text})"
        if self.divide_by is not None:
            text = f"({text}) / {self.divide_by}"
        return text if self.softcap is None else f"{self.softcap} * tanh(({text}) / {self.softcap})"


@dataclass(frozen=True)
class Fit:
    """How near the best recipe comes to a model's logits: error and tolerance relative to the largest logit of each token."""

    recipe: LogitRecipe
    error: float
    tolerance: float
    tried: int
    tokens: int
    beside: tuple[float, ...]  # what the model's loss has beside cross entropy, if it shifts the labels and if it does not
    squared_logsumexp: float  # the mean of these logits'


def best_fit(model: Any, head: Head, hidden: Callable[..., Tensor], expected: LogitRecipe | None) -> Fit:
    """The recipe nearest to the model's logits; `expected` if it fits, too.

    hidden: (model, **inputs) -> what run_backbone takes for the LM head's input, (B, S, D).

    Raises NotImplementedError where the model cannot be run on token ids alone, or has logits of another shape.
    """
    input_ids = few_tokens(model)
    with torch.no_grad(), evaluating(model):
        states = hidden(model, input_ids=input_ids)
        if states.shape != (*input_ids.shape, head.weight.shape[1]):
            raise NotImplementedError(
                f"the hidden states of {input_ids.shape[1]} tokens in {type(model).__name__} have shape {tuple(states.shape)}, wanted "
                f"{(*input_ids.shape, head.weight.shape[1])}"
            )
        states, weight, bias = head.widened(states)
        entries = torch.linspace(0, len(weight) - 1, min(len(weight), ENTRIES), dtype=torch.float64).round().long()
        some = weight[entries.to(weight.device)].double().cpu()
        offset = 0.0 if bias is None else bias[entries.to(bias.device)].double().cpu()
        factors = _powers_of_two(states.double().cpu()[0] @ some.T)
        logits, loss = _logits_and_loss(model, input_ids, factors)
    if logits.shape != (*input_ids.shape, len(weight)):
        raise NotImplementedError(
            f"{type(model).__name__} makes logits of shape {tuple(logits.shape)} of {input_ids.shape[1]} tokens, wanted "
            f"{(*input_ids.shape, len(weight))}, one for each row of its LM head"
        )
    products = factors[:, None] * (states.double().cpu()[0] @ some.T)
    wanted = logits.double().cpu()[0, :, entries]
    tolerance = 8 * max(coarsest(states, weight, logits), 2.0**-17)  # sums over thousands of channels
    largest = wanted.abs().amax(1, keepdim=True).clamp(min=1e-30)
    tried: dict[LogitRecipe, float] = {}
    for recipe in ([expected] if expected is not None else []) + list(_recipes(model.config)):
        scale, cap = recipe.scale_and_softcap(model.config)
        got = scale * (products + offset)
        got = got if cap is None else cap * torch.tanh(got / cap)
        tried.setdefault(recipe, float(((got - wanted).abs() / largest).nan_to_num(nan=torch.inf).max()))
        if recipe == expected and tried[recipe] <= tolerance:
            break
    recipe = min(tried, key=lambda recipe: tried[recipe])  # the first of equals
    beside = () if loss is None else _beside_cross_entropy(logits, loss, input_ids)
    squared_logsumexp = float(logits.float().logsumexp(-1).square().mean())
    return Fit(recipe, tried[recipe], tolerance, len(tried), input_ids.shape[1], beside, squared_logsumexp)


def _recipes(config: Any) -> Iterator[LogitRecipe]:
    """Plain, and every product of a scale and a cap that the configuration has a number for by its name."""
    numbers = _numbers(config)
    scales = [name for name in numbers if _SCALES.search(name) and not _CAPS.search(name)]
    caps = [None, *(name for name in numbers if _CAPS.search(name))]
    for cap in caps:
        yield LogitRecipe(softcap=cap)
        for name in scales:
            yield LogitRecipe(multiply_by=name, softcap=cap)
            yield LogitRecipe(divide_by=name, softcap=cap)


def _numbers(config: Any) -> dict[str, float]:
    """Fields of the configuration, and of its language model's, that are named as a scale or a cap is, and can be one."""
    both = (config.get_text_config(), config)
    names = sorted({name for one in both for name in (*vars(one), *dir(type(one))) if _SCALES.search(name) or _CAPS.search(name)})
    numbers = {name: getattr(one, name, None) for one in both for name in names if hasattr(one, name)}
    return {name: value for name, value in numbers.items() if isinstance(value, float | int) and not isinstance(value, bool) and value > 0}


def _number(config: Any, value: float | str | None) -> float | None:
    if not isinstance(value, str):
        return value
    found = getattr(config, value, None)
    found = getattr(config.get_text_config(), value, None) if found is None else found
    return None if found is None else float(found)


def few_tokens(model: Any) -> Tensor:
    """(1, 4): ids of ordinary tokens, none of which a configuration gives a meaning of its own, such as an image's."""
    embeddings = model.get_input_embeddings()
    config = model.config
    fields = {**vars(config.get_text_config()), **vars(config)}
    special = {value for name, value in fields.items() if name.endswith(("token_id", "token_index")) and isinstance(value, int)}
    vocabulary = min(getattr(config.get_text_config(), "vocab_size", embeddings.weight.shape[0]), embeddings.weight.shape[0])
    step = max(1, vocabulary // (2 * len(AMPLITUDES)))
    ordinary: Iterable[int] = (index for start in range(step) for index in range(start, vocabulary, step) if index not in special)
    chosen = [index for index, _ in zip(ordinary, AMPLITUDES, strict=False)]
    device = embeddings.weight.device
    return torch.tensor([chosen], device=None if device.type == "meta" else device)


def _powers_of_two(products: Tensor) -> Tensor:
    """(S,): by what to multiply each token's hidden state, exactly in any dtype, so that its largest logit is as AMPLITUDES has it."""
    largest = products.abs().amax(1).clamp(min=2.0**-12)  # a float16 has no room for much more
    return (torch.tensor(AMPLITUDES[: len(largest)], dtype=torch.float64) / largest).log2().round().exp2()


def _labels(input_ids: Tensor) -> Tensor:
    """One: of the first token's logits, the smallest, or, in models that do not shift labels, of the second's."""
    return torch.where(torch.arange(input_ids.shape[1], device=input_ids.device) == 1, input_ids, -100)


def _beside_cross_entropy(logits: Tensor, loss: Tensor, input_ids: Tensor) -> tuple[float, ...]:
    both = (nn.functional.cross_entropy(logits[0, place].float(), input_ids[0, 1].to(logits.device)) for place in (0, 1))
    return tuple(float(loss - cross_entropy) for cross_entropy in both)


def _logits_and_loss(model: Any, input_ids: Tensor, factors: Tensor) -> tuple[Tensor, Tensor | None]:
    """(1, S, V), the model's own, of hidden states that are multiplied on their way into the LM head, and its loss."""
    module, met = model.get_output_embeddings(), []

    def multiply(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states = arguments[0]
        met.append(states.shape)
        if states.shape[:2] != input_ids.shape:
            return arguments
        return (states * factors.to(states.device, states.dtype)[:, None], *arguments[1:])

    hook = module.register_forward_pre_hook(multiply)
    try:
        takes_labels = "labels" in inspect.signature(type(model).forward).parameters
        outputs = own_forward(model, input_ids=input_ids, **({"labels": _labels(input_ids)} if takes_labels else {}))
    finally:
        hook.remove()
    if len(met) != 1:
        raise NotImplementedError(f"{type(model).__name__} runs its LM head {len(met)} times for one batch, wanted once")
    return outputs.logits, getattr(outputs, "loss", None)


def coarsest(*tensors: Tensor) -> float:
    """The relative rounding of what is computed of these tensors, autocast and TF32 included."""
    found = [torch.finfo(tensor.dtype).eps for tensor in tensors]
    for device in {tensor.device.type for tensor in tensors}:
        if torch.is_autocast_enabled(device):
            found.append(torch.finfo(torch.get_autocast_dtype(device)).eps)
        if device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            found.append(2.0**-10)
    return max(found)
