"""What other packages and papers call the distillation loss, as the options of distillation_loss that reproduce it.

Packages agree on the divergences and differ in everything around them: temperature², the weights, the normaliser, and whether the
teacher's entropy is left in the value. Each function of CONVENTIONS takes the parameters of one package, by its names and with its
defaults, and returns keyword arguments; its docstring says what was read, which value results, and what cannot be reproduced.
docs/conventions.md has the formulas side by side.
"""

import inspect
from collections.abc import Callable
from typing import Any

from distill_kernels import divergences
from distill_kernels.call import checks


def preset(name: str, **parameters: Any) -> dict[str, Any]:
    """Keyword arguments of `distillation_loss` that reproduce another package's loss, as a plain dict.

    name: "liger", "trl", "gkd", "torchtune", "distillm", "hinton", "distillkit" or "modelopt".
    parameters: of that package, by its names and with its defaults; `describe_preset(name)` lists them, and says where the value
        differs by a constant (gradients never do) and what the package normalises by.

    Returns a new dict, made of divergence, temperature, temperature_squared, kd_weight, ce_weight and sometimes ignore_index and
    reduction. What belongs to a batch stays with you: labels, num_items, biases, logit scales, softcaps.

    Raises ValueError for a name that is not known, or is known and cannot be reproduced, and for a value the package refuses or that
    distillation_loss cannot express; TypeError for a parameter the package does not have.

    Example
        >>> preset("liger", beta=1.0, weight_hard_loss=0.0)["divergence"]
        'reverse_kl'
        >>> hidden, head = torch.randn(8, 64, requires_grad=True), torch.randn(1000, 64)
        >>> loss = distillation_loss(hidden, head, torch.randn(8, 96), torch.randn(1000, 96), **preset("trl", beta=0.5))
    """
    convention = _convention(name)
    try:
        call = inspect.signature(convention).bind(**parameters)
    except TypeError as error:
        raise TypeError(f"preset {name!r} takes {_parameters(convention)}: {error}") from None
    return convention(**call.arguments)


def describe_preset(name: str) -> str:
    """Parameters of a preset, the package and version it was read from, its formula, and where its value differs from ours.

    Raises ValueError as `preset` does.

    Example
        >>> print(describe_preset("torchtune"))
    """
    convention = _convention(name)
    return f"preset({name!r}, ...) with {_parameters(convention)}\n\n{inspect.getdoc(convention)}"


def _parameters(convention: Callable[..., Any]) -> str:
    """As a caller writes them, with their defaults and without their types."""
    plain = [parameter.replace(annotation=parameter.empty) for parameter in inspect.signature(convention).parameters.values()]
    return str(inspect.Signature(plain))


def _convention(name: str) -> Callable[..., dict[str, Any]]:
    if name in CONVENTIONS:
        return CONVENTIONS[name]
    if name in OUT_OF_REACH:
        raise ValueError(f"preset {name!r} cannot be reproduced by distillation_loss: {OUT_OF_REACH[name]}")
    raise ValueError(f"there is no preset {name!r}; there are {', '.join(sorted(CONVENTIONS))}")


def liger(
    *,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """LigerFusedLinearJSDLoss of liger_kernel 0.8.5. LigerFusedLinearJSD is the same with weight_hard_loss=0, weight_soft_loss=1.

        weight_soft_loss · D(p‖q)  +  weight_hard_loss · CE        over the number of valid tokens, at least 1

    D is forward KL for beta=0, reverse KL for beta=1, the generalised Jensen-Shannon divergence between; both models are tempered,
    the cross entropy is not, and there is no temperature².

    Value: the same. Not reproduced: a teacher with more entries than the student is compared with student logits of 0 there;
    vocab_mismatch="truncate" leaves them out. `compiled` and `chunk_size` say how it computes, not what.
    """
    return {
        "divergence": _jensen_shannon_or_its_ends(beta),
        "temperature": temperature,
        "temperature_squared": False,
        "kd_weight": weight_soft_loss,
        "ce_weight": weight_hard_loss,
        "ignore_index": ignore_index,
    }


def trl(*, beta: float = 1.0, temperature: float = 1.0) -> dict[str, Any]:
    """DistillationTrainer of trl 1.16, and the ChunkedDivergenceFunction under it.

        D(p‖q)        over num_items_in_batch where the trainer knows it, else over the number of valid tokens

    D as for "liger", without hard labels and without temperature². Its temperature is also the one that the student samples at.

    Value: the same; pass its num_items_in_batch as num_items.
    """
    return {
        "divergence": _jensen_shannon_or_its_ends(beta),
        "temperature": temperature,
        "temperature_squared": False,
        "kd_weight": 1.0,
        "ce_weight": 0.0,
    }


def gkd(*, beta: float = 0.5, temperature: float = 1.0, reduction: str = "batchmean") -> dict[str, Any]:
    """generalized_jsd_loss of trl 1.16's experimental GKDTrainer, after Agarwal et al. (2024).

        D(p‖q)        over num_items_in_batch if given, else "batchmean": over the number of valid tokens, or "sum"

    D as for "liger". The trainer never passes its temperature on: what it trains on is temperature=1, whatever GKDConfig.temperature,
    at which it samples, says.

    Value: the same, if there are labels; pass num_items_in_batch as num_items. Without labels its "batchmean" divides by the number
    of sequences: num_items=that number. "mean" divides by valid tokens times vocabulary, and "none" is a matrix: both refused.
    """
    if reduction not in ("batchmean", "sum"):
        raise ValueError(
            f"preset 'gkd': reduction must be 'batchmean' or 'sum', got {reduction!r}; 'mean' is 'batchmean' divided by the vocabulary"
        )
    return trl(beta=beta, temperature=temperature) | {"reduction": "mean" if reduction == "batchmean" else "sum"}


def torchtune(
    *,
    kd_loss: str = "ForwardKLWithChunkedOutputLoss",
    kd_ratio: float = 0.5,
    sym_kd_ratio: float | None = None,
    ignore_index: int = -100,
) -> dict[str, Any]:
    """The knowledge-distillation recipes of torchtune 0.6.1: kd_loss is the class's name, with or without its module, kd_ratio the mix.

        (1 − kd_ratio) · CE  +  kd_ratio · L        over the number of valid tokens; kd_ratio=1 is the loss class alone

    L of ForwardKL*: −Σ p·log q.  ReverseKL*: KL(q‖p).  SymmetricKL*: sym_kd_ratio (0.5) of the first and the rest of the second. There
    is no temperature.

    Value: the forward term is a cross entropy, so the package's loss is ours plus kd_ratio · (1, 0 or sym_kd_ratio) · mean H(p), a
    constant; `DistillationStats.teacher_entropy` is H(p). Gradients are the same. With every token masked its losses are detached
    zeros or NaN; ours is an attached 0.
    """
    weights = {"ForwardKL": 1.0, "ReverseKL": 0.0, "SymmetricKL": 0.5 if sym_kd_ratio is None else sym_kd_ratio}
    kind = str(kd_loss).rpartition(".")[2].removesuffix("WithChunkedOutputLoss").removesuffix("Loss")
    if kind not in weights:
        raise ValueError(f"preset 'torchtune': kd_loss must be a ForwardKL*, ReverseKL* or SymmetricKL* class's name, got {kd_loss!r}")
    if sym_kd_ratio is not None and kind != "SymmetricKL":
        raise ValueError(f"preset 'torchtune': sym_kd_ratio is a parameter of SymmetricKL*, but kd_loss is {kd_loss!r}")
    checks.finite_number("kd_ratio", kd_ratio, least=0, most=1)
    checks.finite_number("sym_kd_ratio", weights[kind], least=0, most=1)
    names = {"ForwardKL": "forward_kl", "ReverseKL": "reverse_kl"}
    return {
        "divergence": names[kind] if kind in names else divergences.symmetric_kl(weight=weights[kind]),
        "temperature": 1.0,
        "temperature_squared": False,
        "kd_weight": kd_ratio,
        "ce_weight": 1.0 - kd_ratio,
        "ignore_index": ignore_index,
    }


def distillm(*, type: str, kd_ratio: float, skew_alpha: float = 0.1) -> dict[str, Any]:
    """finetune.py of DistiLLM (Ko et al. 2024; repository of 2024): --type, --kd-ratio and --skew-alpha.

        (1 − kd_ratio) · CE  +  kd_ratio · L        over the number of valid tokens

    L by what type contains, in this order: "sfkl" −Σ p·log(αp + (1−α)q), "srkl" KL(q‖(1−α)p + αq), "jsd" 0.1·KL(p‖m) + 0.9·KL(q‖m)
    with m = 0.1p + 0.9q, "tvd" ½Σ|p − q|, "fkl" or all of it "kd" −Σ p·log q, "rkl" KL(q‖p). α is skew_alpha. No temperature. What
    else a type says ("adaptive-", student-generated text) concerns the data.

    Value: for "sfkl", "fkl" and "kd" the package's loss is ours plus kd_ratio · mean H(p), a constant: its forward terms are cross
    entropies. Gradients are the same. With every token masked it is NaN.
    """
    kinds = {
        "sfkl": lambda: divergences.skew_forward_kl(alpha=skew_alpha),
        "srkl": lambda: divergences.skew_reverse_kl(alpha=skew_alpha),
        "jsd": lambda: divergences.jensen_shannon(beta=0.1),
        "tvd": lambda: "total_variation",
        "fkl": lambda: "forward_kl",
        "rkl": lambda: "reverse_kl",
    }
    found = [kind for kind in kinds if kind in str(type)] or (["fkl"] if type == "kd" else [])
    if not found:
        raise ValueError(f"preset 'distillm': type must be 'kd' or contain one of {', '.join(kinds)}, got {type!r}")
    checks.finite_number("kd_ratio", kd_ratio, least=0, most=1)
    return {
        "divergence": kinds[found[0]](),
        "temperature": 1.0,
        "temperature_squared": False,
        "kd_weight": kd_ratio,
        "ce_weight": 1.0 - kd_ratio,
    }


def hinton(*, temperature: float, hard_weight: float) -> dict[str, Any]:
    """Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2: both parameters are the user's.

        (1 − hard_weight) · temperature² · CE(p, q)  +  hard_weight · CE(label)

    a weighted average of two cross entropies, the soft one with both models tempered and multiplied by temperature², so that the two
    keep their relative size when the temperature changes; the paper found a considerably lower hard_weight best.

    Value: the paper's is ours plus (1 − hard_weight) · temperature² · mean H(p), a constant, for CE(p, q) = KL(p‖q) + H(p). Gradients
    are the same.
    """
    checks.finite_number("hard_weight", hard_weight, least=0, most=1)
    return {
        "divergence": "forward_kl",
        "temperature": temperature,
        "temperature_squared": True,
        "kd_weight": 1.0 - hard_weight,
        "ce_weight": hard_weight,
    }


def distillkit(*, loss_functions: list[dict[str, Any]]) -> dict[str, Any]:
    """The loss_functions list of a DistillKit configuration (arcee-ai/DistillKit of 2025) with a dense teacher, as it stands in YAML.

        Σ weight · L / Σ weight;   "kl": temperature² · KL(p‖q),  "jsd": temperature² · ½(KL(p‖m) + KL(q‖m)),  "cross_entropy": CE

    Each entry is {"function": ..., "weight": ..., "temperature": ...}. One of "kl" and "jsd", and "cross_entropy" at most once: there is
    one divergence to a call. Other functions are refused; so are the keys of sparse teachers.

    Value: the same for the same tokens, but the package takes the divergence at position t where labels[t] is not ignored, unshifted,
    and the last position with it; the cross entropy is shifted. Ours counts both where there is a next token to learn. With the
    divergence alone, unshifted labels reproduce its choice, for labels then only mask.
    """
    weights, temperature, divergence = {}, 1.0, None
    for entry in loss_functions:
        allowed = {"function", "weight"} | ({"temperature"} if entry.get("function") in ("kl", "jsd") else set())
        if entry.get("function") not in ("kl", "jsd", "cross_entropy") or set(entry) - allowed:
            raise ValueError(
                "preset 'distillkit': a loss function must be kl or jsd with weight and temperature, or cross_entropy with weight, "
                f"got {entry!r}"
            )
        kind = "cross_entropy" if entry["function"] == "cross_entropy" else "divergence"
        if kind in weights:
            raise ValueError(f"preset 'distillkit': {entry['function']} is a second {kind}; distillation_loss takes one of each, add two")
        checks.finite_number("weight", entry.get("weight"), least=0)
        weights[kind] = entry["weight"]
        if kind == "divergence":
            checks.finite_number("temperature", entry.get("temperature"), above=0)
            temperature = entry["temperature"]
            divergence = "forward_kl" if entry["function"] == "kl" else divergences.jensen_shannon(beta=0.5)
    if not weights or not sum(weights.values()):
        raise ValueError(f"preset 'distillkit': loss_functions must hold an entry of a weight above 0, got {loss_functions!r}")
    return {
        "divergence": "forward_kl" if divergence is None else divergence,
        "temperature": temperature,
        "temperature_squared": True,
        "kd_weight": weights.get("divergence", 0.0) / sum(weights.values()),
        "ce_weight": weights.get("cross_entropy", 0.0) / sum(weights.values()),
    }


def modelopt(*, temperature: float = 1.0) -> dict[str, Any]:
    """KDTrainer of nvidia-modelopt 0.47 on logits, which is LogitsDistillationLoss(temperature, reduction="none") and a mean.

        temperature² · KL(p‖q)        over the number of valid tokens, at least 1; no hard labels

    Value: the same. With use_liger_kernel that trainer computes Liger's loss, without temperature²:
    preset("liger", beta=liger_jsd_beta, temperature=..., weight_hard_loss=0.0, weight_soft_loss=1.0). LogitsDistillationLoss with its own
    default, reduction="mean", divides by tokens times vocabulary.
    """
    return {
        "divergence": "forward_kl",
        "temperature": temperature,
        "temperature_squared": True,
        "kd_weight": 1.0,
        "ce_weight": 0.0,
    }


def _jensen_shannon_or_its_ends(beta: float) -> str | divergences.Divergence:
    """The family that GKD, Liger and TRL share: the value jumps from 0 to a full KL at both ends of beta."""
    checks.finite_number("beta", beta, least=0, most=1)
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta) or divergences.jensen_shannon(beta=beta)


CONVENTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    convention.__name__: convention for convention in (distillkit, distillm, gkd, hinton, liger, modelopt, torchtune, trl)
}
OUT_OF_REACH = {
    "akl": "its weights of forward and reverse KL come from a sort of the teacher's probabilities, token by token",
    "axolotl": "its teacher is a list of the most probable tokens, which is what sparse_distillation_loss takes; it multiplies the "
    "value by temperature², but not the gradient (axolotl 0.19)",
    "minillm": "its reverse KL is estimated from sampled tokens, by policy gradient; token_logprobs gives what that needs, and "
    'divergence="reverse_kl" the exact divergence of each token',
    "taid": "its target mixes the student's own logits into the teacher's",
    "uld": "it compares sorted probabilities of two vocabularies",
}
