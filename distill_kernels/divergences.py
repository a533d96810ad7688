"""Every divergence between a teacher p and a student q, written once.

A divergence here is separable over the vocabulary, D(p‖q) = Σ_v value(log p_v, log q_v). Its body returns `value` and
`slope = ∂value/∂log q_v`, from which the gradient of the student's logits x follows for all of them alike:

    ∂D/∂x_v = slope_v − q_v · Σ_u slope_u

The same body runs on torch tensors as it stands, and `codegen.py` prints it as the C++ functor that the compiled kernels are
templates over. It is therefore straight-line code over `exp`, `log`, `maximum`, `minimum`, `sign`, arithmetic, and the small
functions marked `@shared_expression`. Arguments are finite: a backend raises every log-probability to at least
`LOG_PROBABILITY_FLOOR` first, and an entry that it had to raise counts as a constant (its slope is taken as 0).

    from distill_kernels import divergences

    divergences.jensen_shannon(beta=0.1)             # a Divergence, for distillation_loss(divergence=...)

    @divergences.register
    def chi_squared(log_p, log_q):                   # your own; it runs on the torch and Triton backends at once
        ratio = divergences.exp(log_q - log_p)
        return divergences.exp(log_q) * (ratio - 1), divergences.exp(log_q) * (2 * ratio - 1)
"""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import exp, log, maximum, minimum, sign  # noqa: F401 (all that a body may call)

# Two logits of magnitude 640 differ by less; exp() of it is 0 in every dtype, and p · floor stays finite in float32.
LOG_PROBABILITY_FLOOR = -1.0e4


@dataclass(frozen=True)
class Divergence:
    """A divergence with its parameters fixed; hashable, and printed as it is called."""

    name: str
    parameters: tuple[float, ...] = ()
    body: Any = field(compare=False, repr=False, default=None)  # a function; None where none of the name is registered

    def __call__(self, log_p: Any, log_q: Any) -> tuple[Any, Any]:
        """(value, slope), elementwise, of teacher and student log-probabilities of the same shape."""
        value, slope = self.body(log_p, log_q, *self.parameters)
        return value, slope

    @property
    def one_pass(self) -> bool:
        """Whether its sums can be taken before the log-sum-exps are known: see `renormalised_by`."""
        return hasattr(self.body, "renormalise")

    def __reduce__(self) -> tuple[Any, ...]:  # the body is found by name again: the module's attribute of that name is its family
        return from_parameters, (self.name, self.parameters)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{p:g}' for p in self.parameters)})" if self.parameters else self.name


class Family:
    """What `register` makes of a body: call it with the parameters to get a `Divergence`."""

    def __init__(self, body: Callable[..., Any], check: Callable[..., None] | None) -> None:
        self.body, self.check = body, check
        self.name = body.__name__
        self.parameter_names = tuple(inspect.signature(body).parameters)[2:]
        self.__doc__ = body.__doc__

    def __call__(self, *args: float, **kwargs: float) -> Divergence:
        signature = inspect.signature(self.body)
        try:
            bound = signature.bind(None, None, *args, **kwargs)
        except TypeError as error:
            wanted = ", ".join(f"{name}=..." for name in self.parameter_names)
            raise TypeError(f"divergences.{self.name}({wanted}): {error}") from None
        bound.apply_defaults()
        parameters = dict(list(bound.arguments.items())[2:])
        for name, value in parameters.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not -math.inf < value < math.inf:  # by comparison, which a compiler can trace
                raise ValueError(f"divergences.{self.name}: {name} must be a finite number, got {value!r}")
        if self.check is not None:
            self.check(**parameters)
        return Divergence(self.name, tuple(float(v) for v in parameters.values()), self.body)

    def __repr__(self) -> str:
        return f"<divergence {self.name}({', '.join(self.parameter_names)})>"


FAMILIES: dict[str, Family] = {}
SHARED_EXPRESSIONS: list[Callable] = []
BUILT_IN: tuple[str, ...] = ()  # what this file registers; filled in at its end


def register(body: Callable[..., Any] | None = None, *, check: Callable[..., None] | None = None) -> Any:
    """Decorator that makes `body(log_p, log_q, *parameters) -> (value, slope)` a divergence.

    `check(**parameters)`, if given, raises ValueError for parameters outside the body's domain. A registered divergence runs on
    the torch and Triton backends at once; the native one knows only those of this file, and says so.
    Raises ValueError for the name of a built-in divergence, or a body whose first arguments are not log_p and log_q.
    """
    if body is None:
        return lambda body: register(body, check=check)
    names = list(inspect.signature(body).parameters)
    if names[:2] != ["log_p", "log_q"]:
        raise ValueError(f"the first two arguments of divergence {body.__name__} must be log_p and log_q, got {names[:2]}")
    if body.__name__ in BUILT_IN:
        raise ValueError(f"{body.__name__} is the name of a built-in divergence; give yours another")
    FAMILIES[body.__name__] = Family(body, check)
    return FAMILIES[body.__name__]


def renormalised_by(renormalise: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorator of a body whose sums can be corrected afterwards, so that one pass over the logits does.

    `renormalise(value, slope, excess_p, excess_q)` turns Σ value and Σ slope taken at (log p + excess_p, log q + excess_q) into those at
    (log p, log q). A kernel may then sum with logits less a running maximum in place of log-probabilities.
    """

    def mark(body: Any) -> Any:
        body.renormalise = renormalise
        return body

    return mark


def resolve(divergence: Any) -> Divergence:
    """The `Divergence` meant by a name, a family without parameters, or a `Divergence`. Raises ValueError or TypeError in words."""
    if isinstance(divergence, Divergence):
        if _body(divergence.name) is not divergence.body:
            raise ValueError(f"{divergence} is not the divergence registered under that name now; make it from its family again")
        return divergence
    if isinstance(divergence, str):
        family = FAMILIES.get(divergence)
        if family is None:
            raise ValueError(f"unknown divergence {divergence!r}; there are {', '.join(sorted(FAMILIES))}")
    elif isinstance(divergence, Family):
        family = divergence
    else:
        raise TypeError(f"divergence must be a name or one of distill_kernels.divergences, got {type(divergence).__name__}")
    if family.parameter_names:
        wanted = ", ".join(f"{name}=..." for name in family.parameter_names)
        raise ValueError(f"{family.name} has parameters: pass divergence=distill_kernels.divergences.{family.name}({wanted})")
    return family()


def from_parameters(name: str, parameters: Iterable[float]) -> Divergence:
    """The Divergence of a name and parameters that `resolve` or a family has already checked."""
    return Divergence(name, tuple(parameters), _body(name))


def _body(name: str) -> Any:
    known = STUDENT_ENTROPY if name == STUDENT_ENTROPY.name else FAMILIES.get(name)
    return None if known is None else known.body


def shared_expression(function):
    """Marks a function that several bodies call, so that it is printed as C++ too."""
    SHARED_EXPRESSIONS.append(function)
    return function


def _between_zero_and_one(name, value, at_ends):
    if not 0 < value < 1:
        meant = f"; that limit is {at_ends[value]!r}" if value in at_ends else ""
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value:g}{meant}")


def _check_weight(weight):
    if not 0 <= weight <= 1:
        raise ValueError(f"symmetric_kl: weight must lie in [0, 1], got {weight:g}")


def _check_jensen_shannon(beta):
    # The value is not continuous at the ends: it goes to 0 with beta, where GKD, TRL and Liger switch to the full KL.
    _between_zero_and_one("jensen_shannon: beta", beta, {0: "forward_kl", 1: "reverse_kl"})


def _check_skew_forward(alpha):
    _between_zero_and_one("skew_forward_kl: alpha", alpha, {0: "forward_kl"})


def _check_skew_reverse(alpha):
    _between_zero_and_one("skew_reverse_kl: alpha", alpha, {0: "reverse_kl"})


def _check_alpha_beta(alpha, beta):
    limits = (
        ("alpha", alpha, "reverse_kl when beta=1"),
        ("beta", beta, "forward_kl when alpha=1"),
        ("alpha+beta", alpha + beta, "a log-ratio"),
    )
    for name, value, limit in limits:
        if abs(value) < 0.01:
            raise ValueError(
                f"alpha_beta: |{name}| must be at least 0.01 (float32 has no digits left at the limit, {limit}), got {value:g}"
            )


@shared_expression
def log_mixture(log_a, log_b, weight):
    """log(weight·a + (1 − weight)·b) from logarithms, without underflow; 0 < weight < 1."""
    high = maximum(log_a, log_b)
    return high + log(weight * exp(log_a - high) + (1 - weight) * exp(log_b - high))


def forward_kl_renormalised(value, slope, excess_p, excess_q):
    scale = exp(-excess_p)
    return scale * (value + slope * (excess_p - excess_q)), scale * slope


@register
@renormalised_by(forward_kl_renormalised)
def forward_kl(log_p, log_q):
    """KL(p‖q), the classic of Hinton, Vinyals and Dean (2015)."""
    p = exp(log_p)
    return p * (log_p - log_q), -p


def reverse_kl_renormalised(value, slope, excess_p, excess_q):
    scale = exp(-excess_q)
    mass = slope - value
    right = scale * (value + mass * (excess_p - excess_q))
    return right, right + scale * mass


@register
@renormalised_by(reverse_kl_renormalised)
def reverse_kl(log_p, log_q):
    """KL(q‖p), mode seeking: MiniLLM (Gu et al. 2024) and on-policy distillation."""
    q = exp(log_q)
    value = q * (log_q - log_p)
    return value, value + q


@register(check=_check_weight)
def symmetric_kl(log_p, log_q, weight):
    """weight·KL(p‖q) + (1 − weight)·KL(q‖p), as in torchtune."""
    p = exp(log_p)
    q = exp(log_q)
    backward = (1 - weight) * q * (log_q - log_p)
    return weight * p * (log_p - log_q) + backward, backward + (1 - weight) * q - weight * p


@register(check=_check_jensen_shannon)
def jensen_shannon(log_p, log_q, beta):
    """β·KL(p‖m) + (1 − β)·KL(q‖m), m = βp + (1 − β)q: the generalised JSD of GKD (Agarwal et al. 2024), Liger and TRL."""
    log_m = log_mixture(log_p, log_q, beta)
    student = (1 - beta) * exp(log_q) * (log_q - log_m)
    return beta * exp(log_p) * (log_p - log_m) + student, student


@register(check=_check_skew_forward)
def skew_forward_kl(log_p, log_q, alpha):
    """KL(p‖αp + (1 − α)q), DistiLLM (Ko et al. 2024)."""
    p = exp(log_p)
    log_m = log_mixture(log_p, log_q, alpha)
    return p * (log_p - log_m), -(1 - alpha) * p * exp(log_q - log_m)


@register(check=_check_skew_reverse)
def skew_reverse_kl(log_p, log_q, alpha):
    """KL(q‖(1 − α)p + αq), DistiLLM (Ko et al. 2024)."""
    q = exp(log_q)
    log_m = log_mixture(log_q, log_p, alpha)
    value = q * (log_q - log_m)
    return value, value + q * (1 - alpha * exp(log_q - log_m))


@register
def total_variation(log_p, log_q):
    """½·Σ|p − q|."""
    q = exp(log_q)
    gap = q - exp(log_p)
    side = sign(gap) + 0 * gap  # sign() makes a number of NaN, and a NaN has to arrive
    return 0.5 * gap * side, 0.5 * q * side


@register(check=_check_alpha_beta)
def alpha_beta(log_p, log_q, alpha, beta):
    """ABKD (Wang et al. 2025): −1/(αβ)·Σ[p^α q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)]."""
    total = alpha + beta
    mixed = exp(alpha * log_p + beta * log_q)
    student = exp(total * log_q)
    return (alpha / total * exp(total * log_p) + beta / total * student - mixed) / (alpha * beta), (student - mixed) / alpha


@register
def squared_hellinger(log_p, log_q):
    """½·Σ(√p − √q)²."""
    root_p = exp(0.5 * log_p)
    root_q = exp(0.5 * log_q)
    gap = root_q - root_p
    return 0.5 * gap * gap, 0.5 * root_q * gap


def student_entropy_renormalised(value, slope, excess_p, excess_q):
    scale = exp(-excess_q)
    mass = value - slope
    right = scale * (value + mass * excess_q)
    return right, right - scale * mass


@renormalised_by(student_entropy_renormalised)
def student_entropy(log_p, log_q):
    """H(q) = −Σ q·log q: a body of the same kind, but no divergence, for it has no teacher. It serves `token_logprobs`."""
    q = exp(log_q)
    return -q * log_q, -q * (log_q + 1)


STUDENT_ENTROPY = Divergence("student_entropy", (), student_entropy)
BUILT_IN = tuple(FAMILIES)
