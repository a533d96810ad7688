"""Options as one object, and the text by which custom ops get a problem."""

import dataclasses
import enum
import typing

import numpy as np
import pytest
import torch

import distill_kernels
from distill_kernels import DistillationLoss, distillation_loss, divergences, sparse_distillation_loss
from distill_kernels.call.options import DEFAULTS, Options
from distill_kernels.call.problem import Problem, Tensors, as_text, from_text, text_with


def tensors():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in ((12, 8), (50, 8), (12, 6), (50, 6))]


CALL = tensors()
TENSORS = Tensors(CALL[0], CALL[1], None, CALL[2], CALL[3], None, None, torch.ones(12, 3))

OPTIONS = {
    "defaults": {},
    "numbers": {"temperature": 1 / 3, "student_logit_scale": -0.5, "teacher_softcap": 1e-7, "label_smoothing": 0.1},
    "parameters": {"divergence": divergences.alpha_beta(0.2, 0.7)},
    "columns": {"column_fraction": 0.08, "sweep": "int8", "sweep_tolerance": None, "workspace_mib": 7},
    "tolerance": {"column_fraction": "auto", "gradient_tolerance": 0.03, "backend": "torch"},
    "lists": {"tail": "renormalise", "temperature": 2.0, "teacher_temperature": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("asked", [{}, {"kd": False, "z_loss": True, "d_bias": True, "deferred": True, "group": "0", "compact": True}])
def test_problem_is_read_back_from_its_text(options, asked):
    problem = Problem.of(TENSORS, Options(**options), listed=3, **asked)
    if not problem.kd:
        problem = dataclasses.replace(problem, options=dataclasses.replace(problem.options, divergence=DEFAULTS.divergence))
    text, numbers = as_text(problem)
    assert numbers is None and from_text(text, None, TENSORS, listed=3) == problem
    changed = from_text(text_with(text, stats=True, backend="native"), None, TENSORS, listed=3)
    assert changed == dataclasses.replace(problem, stats=True, options=dataclasses.replace(problem.options, backend="native"))


def test_numbers_of_a_text_are_filled_in_by_their_places():
    text = "'temperature': 'number 1', 'divergence': ('jensen_shannon', ('number 0', ))"
    made = from_text(text, torch.tensor([0.25, 3.0], dtype=torch.float64), TENSORS)
    assert made.options.temperature == 3.0 and made.divergence == divergences.jensen_shannon(beta=0.25)


class Backend(str, enum.Enum):
    TORCH = "torch"


class Two(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize(
    "given, plain",
    [
        ({"backend": np.str_("torch")}, {"backend": "torch"}),
        ({"backend": Backend.TORCH}, {"backend": "torch"}),
        ({"temperature": np.float64(1.5)}, {"temperature": 1.5}),
        ({"temperature": Two.TWO, "workspace_mib": Two.TWO}, {"temperature": 2.0, "workspace_mib": 2}),
    ],
    ids=lambda given: " ".join(given),
)
def test_values_that_are_not_pythons_own_are_as_good(given, plain):
    assert repr(Options(**given)) == repr(Options(**plain))
    assert torch.equal(distillation_loss(*CALL, **given), distillation_loss(*CALL, **plain))


def test_tail_may_be_a_string_of_numpy():
    logprobs, ids = torch.randn(12, 50).log_softmax(-1).topk(4)
    a, b = (sparse_distillation_loss(*CALL[:2], ids, logprobs, tail=tail) for tail in (np.str_("bucket"), "bucket"))
    assert torch.equal(a, b)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(divergences, "FAMILIES", dict(divergences.FAMILIES))


def register(factor, name="mine"):
    def body(log_p, log_q):
        return factor * divergences.exp(log_q), factor * divergences.exp(log_q)

    body.__name__ = name
    divergences.register(body)


def test_a_divergence_registered_anew_is_the_one_that_runs(registry):
    """Its value is its factor, for Σ q = 1."""
    for factor in (1.0, 5.0):
        register(factor)
        loss_fn = DistillationLoss(divergence="mine")
        for loss in (distillation_loss(*CALL, divergence="mine"), loss_fn(*CALL)):
            torch.testing.assert_close(loss, torch.tensor(factor))
    register(7.0)
    with pytest.raises(ValueError, match="mine is not the divergence registered under that name now"):
        loss_fn(*CALL)


def test_names_of_divergences_are_never_taken_for_numbers(registry):
    for name in ("number 0", "it's", 'a "b"', "{c}", "d\\n"):
        register(3.0, name)
        torch.testing.assert_close(distillation_loss(*CALL, divergence=name), torch.tensor(3.0))


def test_scheduled_number_is_on_the_cpu_whatever_the_default_device():
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: distillation_loss(*CALL, temperature=s), backend="aot_eager", fullgraph=True)
    for step in (1.5, 2.5, 3.5):
        want = distillation_loss(*CALL, temperature=step)
        with torch.device("meta"):
            torch.testing.assert_close(compiled(step), want)
    torch._dynamo.reset()


@pytest.mark.parametrize("name, values", [("temperature", (1, 2, 3, 4)), ("temperature", (300, 301, 302)), ("workspace_mib", (1, 2, 3))])
def test_scheduled_integers_are_those_of_the_call(name, values):
    """Of those above 200 the compiler's guards exclude all numbers that a varying one is told by: they are constants, compiled anew."""

    def loss(value, below=values[0] - 1):
        return distillation_loss(*CALL, **{name: value if value > below else 1})

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for value in values:
        torch.testing.assert_close(compiled(value), distillation_loss(*CALL, **{name: value}))
    torch._dynamo.reset()


def test_module_takes_other_options_in_place_of_its_own():
    loss_fn = DistillationLoss(temperature=2.0, divergence="reverse_kl")
    assert "temperature=2.0" in repr(loss_fn) and "kd_weight" not in repr(loss_fn)
    loss_fn.options = dataclasses.replace(loss_fn.options, temperature=1.5)
    assert torch.equal(loss_fn(*CALL), distillation_loss(*CALL, temperature=1.5, divergence="reverse_kl"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss_fn.options.temperature = 3.0


@pytest.mark.parametrize("name", ["distillation_loss", "distillation_loss_and_stats", "sparse_distillation_loss", "token_logprobs", "plan"])
def test_annotations_can_be_read_where_no_optional_package_is_needed(name):
    assert "return" in typing.get_type_hints(getattr(distill_kernels, name))
