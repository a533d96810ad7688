import importlib
import math

import pytest
import torch
from accuracy import DIVERGENCES, assert_close64, make_inputs, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_kernels import codegen, distillation_loss, divergences, reference
from distill_kernels.backends import native
from distill_kernels.backends import torch as torch_backend
from distill_kernels.divergences import alpha_beta, jensen_shannon, resolve, skew_forward_kl, skew_reverse_kl, symmetric_kl

ALL = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


def pair(rows=7, vocabulary=40, spread=2.0, seed=0):
    """Log-probabilities of two distributions (rows, vocabulary), float64."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64) * spread
    return p.log_softmax(-1), q.log_softmax(-1)


def total(divergence, log_p, log_q):
    return resolve(divergence)(log_p, log_q)[0].sum(-1)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def paper_jensen_shannon(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def paper_alpha_beta(p, q, alpha, beta):
    inner = p**alpha * q**beta - alpha / (alpha + beta) * p ** (alpha + beta) - beta / (alpha + beta) * q ** (alpha + beta)
    return -inner.sum(-1) / (alpha * beta)


# From the papers, on probabilities. `value` in log space serves the reference too, so it must be right by another way.
PAPERS = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "symmetric_kl": lambda p, q, weight: weight * kl(p, q) + (1 - weight) * kl(q, p),
    "jensen_shannon": paper_jensen_shannon,
    "skew_forward_kl": lambda p, q, alpha: kl(p, alpha * p + (1 - alpha) * q),
    "skew_reverse_kl": lambda p, q, alpha: kl(q, (1 - alpha) * p + alpha * q),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "alpha_beta": paper_alpha_beta,
    "squared_hellinger": lambda p, q: (p.sqrt() - q.sqrt()).square().sum(-1) / 2,
}
MORE = [alpha_beta(-0.5, 1.2), alpha_beta(2.0, -0.7), alpha_beta(1.0, 1.0), jensen_shannon(0.01), skew_forward_kl(0.99)]


@pytest.mark.parametrize("divergence", DIVERGENCES + MORE, ids=str)
@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])
def test_value_is_the_papers_formula(divergence, spread):
    log_p, log_q = pair(spread=spread)
    truth = PAPERS[divergence.name](log_p.exp(), log_q.exp(), *divergence.parameters)
    torch.testing.assert_close(total(divergence, log_p, log_q), truth, rtol=1e-10, atol=1e-12)


def test_every_built_in_divergence_has_a_formula_here():
    assert set(divergences.BUILT_IN) == set(PAPERS) == {divergence.name for divergence in DIVERGENCES}


@pytest.mark.parametrize("divergence", DIVERGENCES + MORE, ids=str)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 5.0]))
def test_slope_is_the_derivative_of_value(divergence, seed, spread):
    log_p, log_q = pair(rows=2, vocabulary=9, spread=spread, seed=seed)
    log_q.requires_grad_()
    value, slope = divergence(log_p, log_q)
    (truth,) = torch.autograd.grad(value.sum(), log_q)
    torch.testing.assert_close(slope.detach(), truth, rtol=1e-9, atol=1e-12)


@ALL
def test_divergence_is_zero_at_equality_and_positive_elsewhere(divergence):
    log_p, log_q = pair()
    assert total(divergence, log_p, log_p).abs().max() < 1e-14
    assert (total(divergence, log_p, log_q) > 1e-3).all()


@ALL
def test_logit_gradient_vanishes_at_equality(divergence):
    # With slope c·q the gradient slope − q·Σ slope is 0: that is what makes the student's optimum the teacher.
    log_p, _ = pair()
    _, slope = divergence(log_p, log_p)
    assert (slope - log_p.exp() * slope.sum(-1, keepdim=True)).abs().max() < 1e-14


@ALL
def test_divergence_is_finite_at_the_floor(divergence):
    # alpha_beta's powers and all else, where one of the two models is certain that a token is impossible.
    floor = divergences.LOG_PROBABILITY_FLOOR
    log_p = torch.tensor([0.0, floor, floor, -0.5], dtype=torch.float32)
    log_q = torch.tensor([0.0, floor, -0.5, floor], dtype=torch.float32)
    value, slope = divergence(log_p, log_q)
    assert value.isfinite().all() and slope.isfinite().all()
    assert value[0] == 0 and value[1] == 0


def test_jensen_shannon_at_one_half_is_symmetric_and_bounded():
    log_p, log_q = pair(spread=6.0)
    torch.testing.assert_close(total(jensen_shannon(0.5), log_p, log_q), total(jensen_shannon(0.5), log_q, log_p), rtol=1e-12, atol=0)
    assert (total(jensen_shannon(0.5), log_p, log_q) <= math.log(2)).all()


def test_jensen_shannon_mirrors_with_beta():
    log_p, log_q = pair()
    torch.testing.assert_close(total(jensen_shannon(0.2), log_p, log_q), total(jensen_shannon(0.8), log_q, log_p), rtol=1e-12, atol=0)


def test_jensen_shannon_over_beta_tends_to_forward_kl():
    log_p, log_q = pair(spread=1.0)
    torch.testing.assert_close(total(jensen_shannon(1e-6), log_p, log_q) / 1e-6, total("forward_kl", log_p, log_q), rtol=1e-4, atol=0)
    torch.testing.assert_close(total(jensen_shannon(1 - 1e-6), log_p, log_q) / 1e-6, total("reverse_kl", log_p, log_q), rtol=1e-4, atol=0)


@pytest.mark.parametrize("skew, limit", [(skew_forward_kl, "forward_kl"), (skew_reverse_kl, "reverse_kl")])
def test_skew_kl_tends_to_kl(skew, limit):
    log_p, log_q = pair(spread=1.0)
    torch.testing.assert_close(total(skew(1e-9), log_p, log_q), total(limit, log_p, log_q), rtol=1e-6, atol=0)
    torch.testing.assert_close(total(skew_forward_kl(0.3), log_p, log_q), total(skew_reverse_kl(0.3), log_q, log_p), rtol=1e-12, atol=0)


def test_symmetric_kl_joins_the_kls():
    log_p, log_q = pair()
    torch.testing.assert_close(total(symmetric_kl(1), log_p, log_q), total("forward_kl", log_p, log_q), rtol=1e-12, atol=0)
    torch.testing.assert_close(total(symmetric_kl(0), log_p, log_q), total("reverse_kl", log_p, log_q), rtol=1e-12, atol=0)
    torch.testing.assert_close(total(symmetric_kl(0.5), log_p, log_q), total(symmetric_kl(0.5), log_q, log_p), rtol=1e-12, atol=0)


def test_total_variation_and_hellinger_bound_each_other():
    log_p, log_q = pair(spread=6.0)
    variation, hellinger = total("total_variation", log_p, log_q), total("squared_hellinger", log_p, log_q)
    assert (variation <= 1).all() and (hellinger <= 1).all()
    assert (hellinger <= variation).all() and (variation <= (2 * hellinger).sqrt()).all()
    assert (variation <= (total("forward_kl", log_p, log_q) / 2).sqrt()).all(), "Pinsker"


def test_alpha_beta_has_its_special_cases():
    log_p, log_q = pair()
    torch.testing.assert_close(total(alpha_beta(0.5, 0.5), log_p, log_q), 4 * total("squared_hellinger", log_p, log_q), rtol=1e-10, atol=0)
    squares = (log_p.exp() - log_q.exp()).square().sum(-1) / 2
    torch.testing.assert_close(total(alpha_beta(1, 1), log_p, log_q), squares, rtol=1e-10, atol=0)


@pytest.mark.parametrize("near, limit", [(lambda e: alpha_beta(1.0, e), "forward_kl"), (lambda e: alpha_beta(e, 1.0), "reverse_kl")])
def test_alpha_beta_tends_to_kl(near, limit):
    # The error falls with the distance from the limit; extrapolated from 0.02 and 0.01 it is nearly gone.
    log_p, log_q = pair(spread=1.0)
    truth = total(limit, log_p, log_q)
    extrapolated = 2 * total(near(0.01), log_p, log_q) - total(near(0.02), log_p, log_q)
    torch.testing.assert_close(extrapolated, truth, rtol=1e-2, atol=0)


def test_student_entropy_is_the_entropy():
    _, log_q = pair()
    truth = torch.distributions.Categorical(logits=log_q).entropy()
    torch.testing.assert_close(total(divergences.STUDENT_ENTROPY, log_q, log_q), truth, rtol=1e-12, atol=0)


REFUSED = [
    (lambda: jensen_shannon(beta=0), ValueError, "beta.*strictly between 0 and 1.*forward_kl"),
    (lambda: jensen_shannon(beta=1), ValueError, "beta.*strictly between 0 and 1.*reverse_kl"),
    (lambda: jensen_shannon(beta=-0.1), ValueError, "beta.*got -0.1$"),
    (lambda: jensen_shannon(beta=1.5), ValueError, "beta.*got 1.5$"),
    (lambda: skew_forward_kl(alpha=0), ValueError, "skew_forward_kl.*forward_kl"),
    (lambda: skew_forward_kl(alpha=1), ValueError, "skew_forward_kl: alpha must lie strictly between 0 and 1, got 1$"),
    (lambda: skew_reverse_kl(alpha=0.0), ValueError, "skew_reverse_kl.*reverse_kl"),
    (lambda: skew_reverse_kl(alpha=1.0), ValueError, "skew_reverse_kl: alpha must lie strictly between 0 and 1, got 1$"),
    (lambda: symmetric_kl(weight=-0.01), ValueError, r"symmetric_kl: weight must lie in \[0, 1\], got -0.01"),
    (lambda: symmetric_kl(weight=1.01), ValueError, r"symmetric_kl: weight must lie in \[0, 1\], got 1.01"),
    (lambda: alpha_beta(0.0, 1.0), ValueError, r"\|alpha\| must be at least 0.01.*reverse_kl"),
    (lambda: alpha_beta(-0.009, 1.0), ValueError, r"\|alpha\|"),
    (lambda: alpha_beta(1.0, 0.0), ValueError, r"\|beta\| must be at least 0.01.*forward_kl"),
    (lambda: alpha_beta(0.5, -0.5), ValueError, r"\|alpha\+beta\| must be at least 0.01"),
    (lambda: jensen_shannon(beta=float("nan")), ValueError, "beta must be a finite number, got nan"),
    (lambda: alpha_beta(float("inf"), 1.0), ValueError, "alpha must be a finite number, got inf"),
    (lambda: symmetric_kl(weight=True), ValueError, "weight must be a finite number, got True"),
    (lambda: symmetric_kl(weight="0.5"), ValueError, "weight must be a finite number, got '0.5'"),
    (lambda: jensen_shannon(beta=torch.tensor(0.5)), ValueError, "beta must be a finite number"),
    (lambda: jensen_shannon(), TypeError, r"divergences.jensen_shannon\(beta=\.\.\.\)"),
    (lambda: jensen_shannon(alpha=0.5), TypeError, r"divergences.jensen_shannon\(beta=\.\.\.\)"),
    (lambda: alpha_beta(0.5), TypeError, r"divergences.alpha_beta\(alpha=\.\.\., beta=\.\.\.\).*'beta'"),
    (lambda: divergences.forward_kl(0.5), TypeError, "divergences.forward_kl"),
    (lambda: resolve("kl"), ValueError, "unknown divergence 'kl'; there are alpha_beta, forward_kl"),
    (lambda: resolve("jensen_shannon"), ValueError, r"pass divergence=distill_kernels.divergences.jensen_shannon\(beta=\.\.\.\)"),
    (lambda: resolve(alpha_beta), ValueError, r"alpha_beta\(alpha=\.\.\., beta=\.\.\.\)"),
    (lambda: resolve(None), TypeError, "divergence must be a name.*NoneType"),
    (lambda: resolve(0.5), TypeError, "divergence must be a name.*float"),
    (lambda: distillation_loss(*make_inputs("flat")[:4], divergence="student_entropy"), ValueError, "unknown divergence"),
]


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[message for _, _, message in REFUSED])
def test_wrong_parameter_is_refused_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_resolve_takes_name_family_or_divergence():
    assert resolve("forward_kl") == resolve(divergences.forward_kl) == divergences.forward_kl()
    divergence = jensen_shannon(beta=0.25)
    assert resolve(divergence) is divergence
    assert str(divergence) == "jensen_shannon(0.25)" and str(resolve("forward_kl")) == "forward_kl"
    assert jensen_shannon(0.25) == divergence and hash(jensen_shannon(0.25)) == hash(divergence)
    assert jensen_shannon(0.5) != divergence


@pytest.mark.parametrize("family", ["jensen_shannon", "alpha_beta"])
def test_parameters_at_the_edge_are_accepted(family):
    accepted = {"jensen_shannon": [(1e-6,), (1 - 1e-6,)], "alpha_beta": [(0.01, 1), (-0.01, 1), (1, -0.5), (2, 3)]}[family]
    for parameters in accepted:
        assert divergences.FAMILIES[family](*parameters).parameters == tuple(map(float, parameters))


@pytest.fixture
def registry():
    """`divergences.register`, with what is registered forgotten afterwards."""
    before = dict(divergences.FAMILIES)
    yield divergences.register
    divergences.FAMILIES.clear()
    divergences.FAMILIES.update(before)


def chi_squared(log_p, log_q):
    ratio = divergences.exp(log_q - log_p)
    return divergences.exp(log_q) * (ratio - 1), divergences.exp(log_q) * (2 * ratio - 1)


def test_registered_divergence_matches_reference(registry):
    family = registry(chi_squared)
    inputs = make_inputs("flat", dtype=torch.float64)
    truth = with_gradients(reference.distillation_loss, inputs, 1.7, divergence=family, temperature=2.0)
    for divergence in ("chi_squared", family, family()):
        for backend in ("torch", "auto"):
            got = with_gradients(distillation_loss, inputs, 1.7, divergence=divergence, temperature=2.0, backend=backend)
            for name in truth:
                assert_close64(name, got[name], truth[name])


def test_registered_divergence_with_parameters_matches_its_built_in_twin(registry):
    def check(share):
        if not 0 < share < 1:
            raise ValueError(f"share must be inside (0, 1), got {share}")

    @registry(check=check)
    def twin(log_p, log_q, share):
        return divergences.skew_forward_kl.body(log_p, log_q, share)

    with pytest.raises(ValueError, match="share must be inside"):
        twin(share=2.0)
    inputs = make_inputs("moderate")
    got = with_gradients(distillation_loss, inputs, 1.7, divergence=twin(share=0.2), backend="torch")
    wanted = with_gradients(distillation_loss, inputs, 1.7, divergence=skew_forward_kl(0.2), backend="torch")
    assert all(torch.equal(got[name], wanted[name]) for name in got)


def test_registered_divergence_is_left_to_torch(registry, monkeypatch):
    registry(chi_squared)
    tensors = make_inputs("flat")[:4]
    calls, kernel = [], torch_backend.row_kernel
    monkeypatch.setattr(torch_backend, "row_kernel", lambda *args: calls.append(1) or kernel(*args))
    distillation_loss(*tensors, divergence="chi_squared")
    assert calls, "auto is to choose the torch backend"
    if native._native is not None:
        with pytest.raises(NotImplementedError, match=r"'native' cannot run this.*chi_squared is not one of them"):
            distillation_loss(*tensors, divergence="chi_squared", backend="native")


def test_register_refuses_built_in_names_and_other_signatures(registry):
    def forward_kl(log_p, log_q):
        return log_p, log_q

    def backwards(log_q, log_p):
        return log_p, log_q

    with pytest.raises(ValueError, match="forward_kl is the name of a built-in divergence"):
        registry(forward_kl)
    with pytest.raises(ValueError, match="first two arguments of divergence backwards must be log_p and log_q"):
        registry(backwards)
    assert set(divergences.FAMILIES) == set(divergences.BUILT_IN)


def test_unregistered_divergence_is_refused_in_words():
    with pytest.raises(ValueError, match="mine"):
        distillation_loss(*make_inputs("flat")[:4], divergence=divergences.Divergence("mine", (), chi_squared), backend="torch")


@pytest.mark.parametrize("name", ["divergences.h", "divergence_list.h"])
def test_generated_code_is_fresh(name):
    assert (codegen.GENERATED / name).read_text() == codegen.generated_files()[name], "run python -m distill_kernels.codegen"


def test_generated_code_has_no_other_files():
    assert {path.name for path in codegen.GENERATED.iterdir()} == set(codegen.generated_files())


def test_compiled_divergences_are_the_built_in_ones():
    if native._native is None:
        pytest.skip("the compiled extension was not built")
    assert set(native._native.divergences) == {*divergences.BUILT_IN, divergences.STUDENT_ENTROPY.name}


def loops(log_p, log_q):
    for _ in range(3):
        log_p = log_p + log_q
    return log_p, log_q


def branches(log_p, log_q):
    if log_p is log_q:
        return log_p, log_q
    return log_q, log_p


def accumulates(log_p, log_q):
    log_p += log_q
    return log_p, log_q


def calls_unknown(log_p, log_q):
    return torch_sigmoid(log_p), log_q  # noqa: F821


def calls_attribute(log_p, log_q):
    return torch.exp(log_p), log_q


def calls_with_keyword(log_p, log_q):
    return divergences.exp(input=log_p), log_q


def powers(log_p, log_q):
    return log_p**2, log_q


def compares(log_p, log_q):
    return log_p > log_q, log_q


def names_text(log_p, log_q):
    return log_p * "2", log_q


def returns_nothing(log_p, log_q):
    value = log_p + log_q
    value  # noqa: B018


UNPRINTABLE = [
    (loops, "for _ in range"), (branches, "if log_p is log_q"), (accumulates, "log_p \\+= log_q"),
    (calls_unknown, "torch_sigmoid\\(log_p\\)"),
    (calls_attribute, "torch.exp"), (calls_with_keyword, "input=log_p"), (powers, "log_p \\*\\* 2"), (compares, "log_p > log_q"),
    (names_text, "'2'"), (returns_nothing, "returns_nothing"),
]  # fmt: skip


@pytest.mark.parametrize("body, message", UNPRINTABLE, ids=[body.__name__ for body, _ in UNPRINTABLE])
def test_codegen_refuses_what_it_cannot_print(body, message):
    with pytest.raises(SyntaxError, match=message):
        codegen.functor(body.__name__, body)


def straight(log_p, log_q, weight):
    """First line.

    Not this one.
    """
    p = divergence_free(log_p, log_q)  # noqa: F821
    return -p * 2, weight / p - 1.5


def test_codegen_prints_straight_line_code(monkeypatch):
    monkeypatch.setattr(codegen, "VOCABULARY", codegen.VOCABULARY | {"divergence_free"})
    printed = codegen.functor("straight", straight)
    assert "// First line.\n" in printed and "Not this one" not in printed
    assert "float weight;" in printed and "return {parameters[0]};" in printed
    assert "const auto p = divergence_free(log_p, log_q);" in printed
    assert "return {(-p) * 2.0f, (weight / p) - 1.5f};" in printed


def test_codegen_check_tells_fresh_from_stale(monkeypatch, tmp_path):
    module = importlib.import_module("distill_kernels.codegen")
    monkeypatch.setattr(module, "GENERATED", tmp_path / "generated")
    monkeypatch.setattr("sys.argv", ["codegen", "--check"])
    assert module.main() == 1
    monkeypatch.setattr("sys.argv", ["codegen"])
    assert module.main() == 0
    monkeypatch.setattr("sys.argv", ["codegen", "--check"])
    assert module.main() == 0
    (tmp_path / "generated" / "divergences.h").write_text("// edited\n")
    assert module.main() == 1


@pytest.mark.parametrize("divergence", [resolve("forward_kl"), resolve("reverse_kl"), divergences.STUDENT_ENTROPY], ids=str)
@pytest.mark.parametrize("excess_p, excess_q", [(0.0, 0.0), (3.0, -1.5), (-2.0, 7.0), (0.4, 0.4)])
def test_renormalised_sums_are_those_of_the_log_probabilities(divergence, excess_p, excess_q):
    assert divergence.one_pass
    log_p, log_q = pair()
    wanted = [part.sum(-1) for part in divergence(log_p, log_q)]
    early = [part.sum(-1) for part in divergence(log_p + excess_p, log_q + excess_q)]
    excess = (torch.tensor(x, dtype=torch.float64) for x in (excess_p, excess_q))
    got = divergence.body.renormalise(*early, *excess)
    for name, x, y in zip(("value", "slope"), got, wanted, strict=True):
        assert_close64(name, x, y)


def test_only_what_can_be_renormalised_is_summed_in_one_pass():
    assert [d.name for d in DIVERGENCES if d.one_pass] == ["forward_kl", "reverse_kl"]
