"""The Triton backend against the float64 reference: on a GPU if there is one, else in Triton's interpreter under `triton_guard`."""

import dataclasses
import math

import pytest
import torch
from accuracy import (
    DIVERGENCES,
    assert_as_good_as_eager,
    check_loss,
    eager_loss,
    eager_terms,
    eager_with_gradients,
    everything,
    make_inputs,
    make_labels,
    make_token_weight,
    with_gradients,
)
from thinned import paired, some

from distill_kernels import backends, distillation_loss, distillation_loss_and_stats, divergences, plan, reference, token_logprobs
from distill_kernels.backends import triton as backend
from distill_kernels.call.problem import Problem

pytest.importorskip("triton_guard", reason="triton is not installed", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.usefixtures("guarded")
TOKENS, VOCABULARY = 21, 300
TWO = ["forward_kl", divergences.jensen_shannon(0.3)]  # one in one pass, and one in two
ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=["float32", "bfloat16", "float16"])
FAMILIES = [str(next(made for made in DIVERGENCES if made.name == name)) for name in dict.fromkeys(made.name for made in DIVERGENCES)]
# Gradients of logits are rounded to the 16-bit dtype of the inputs before their products, which eager does not do.
SLACK_16 = 2


def check(inputs, **options):
    slack = options.pop("slack", 1) * (SLACK_16 if inputs.student_hidden.dtype.itemsize == 2 else 1)
    return check_loss(inputs, backend="triton", device=DEVICE, slack=slack, **options)


def per_token(tokens=TOKENS):
    return torch.randn(tokens, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("divergence, dtype", paired(DIVERGENCES, ALL_DTYPES, kept=FAMILIES))
def test_divergence_with_every_option_matches_reference(divergence, dtype):
    check(make_inputs("realistic", bias=True, dtype=dtype), divergence=divergence, **everything(TOKENS, VOCABULARY))


@pytest.mark.parametrize("divergence", some(DIVERGENCES, 7))
def test_divergence_alone_matches_reference(divergence):
    check(make_inputs("grid"), divergence=divergence, reduction="none", upstream=per_token())


OPTIONS = {
    "temperature": {"temperature": 2.0},
    "temperature_not_squared": {"temperature": 0.5, "temperature_squared": False},
    "cross_entropy": {"labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 0.5},
    "cross_entropy_only": {"labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 1.0, "kd_weight": 0.0},
    "tempered_cross_entropy": {"labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 0.5, "temperature": 3.0},
    "label_smoothing": {"labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 0.5, "label_smoothing": 0.2},
    "z_loss": {"z_loss_weight": 0.05},
    "z_loss_only": {"z_loss_weight": 0.05, "kd_weight": 0.0},
    "scales": {"student_logit_scale": 0.6, "teacher_logit_scale": 1.7},
    "softcaps": {"student_softcap": 5.0, "teacher_softcap": 8.0},
    "mask": {"labels": make_labels(TOKENS, VOCABULARY)},
    "token_weight": {"token_weight": make_token_weight(TOKENS)},
    "num_items": {"num_items": 1000},
    "sum": {"reduction": "sum"},
}


@pytest.mark.parametrize("options, divergence", paired(OPTIONS, TWO))
def test_option_matches_reference(options, divergence):
    check(make_inputs("moderate"), divergence=divergence, **options)
    if not options.keys() & {"reduction", "num_items"}:
        check(make_inputs("moderate", bias=True), divergence=divergence, reduction="none", upstream=per_token(), **options)


@pytest.mark.parametrize("family, divergence", paired(["flat", "moderate", "peaked", "huge", "realistic", "grid"], TWO))
def test_input_family_matches_reference(family, divergence):
    labels = make_labels(TOKENS, VOCABULARY)
    check(make_inputs(family), divergence=divergence, labels=labels, ce_weight=0.5, reduction="none", upstream=per_token())


@pytest.mark.parametrize("divergence", some(["forward_kl", "reverse_kl", divergences.jensen_shannon(0.3)], 2))
def test_equal_teacher_gives_rounding_error_only(divergence):
    inputs = make_inputs("equal", bias=True).to(DEVICE)
    got = with_gradients(distillation_loss, inputs, 1.7, backend="triton", divergence=divergence, temperature=2.0)
    turned = inputs._replace(teacher_weight=inputs.teacher_weight.roll(1, 0))
    scale = with_gradients(distillation_loss, turned, 1.7, backend="triton", divergence=divergence, temperature=2.0)
    for name, value in got.items():
        assert value.abs().max() <= 2e-6 * scale[name].abs().max(), name


RAGGED = [(1, 1, 1, 1), (1, 300, 24, 40), (2, 5, 3, 2), (17, 33, 31, 1), (7, 1000, 16, 48), (40, 64, 20, 9), (33, 129, 17, 33)]


@pytest.mark.parametrize("sizes, divergence", paired(RAGGED, TWO))
def test_ragged_sizes_match_reference(sizes, divergence):
    tokens, vocabulary, student_dim, teacher_dim = sizes
    inputs = make_inputs("grid", tokens, vocabulary, student_dim, teacher_dim, bias=True)
    options = everything(tokens, vocabulary)
    check(inputs, divergence=divergence, slack=4, **options)
    check(inputs, divergence=divergence, slack=4, **options | {"num_items": None, "reduction": "none", "upstream": per_token(tokens)})


# Products of a chunk are torch's. What the kernels make of chunks is in two dtypes, by a divergence of either kind.
@pytest.mark.parametrize("dtype, divergence", paired(ALL_DTYPES, TWO, kept=["float32", "bfloat16"]))
def test_several_chunks_match_reference(dtype, divergence):
    tokens, vocabulary = 50, 3000
    inputs = make_inputs("moderate", tokens, vocabulary, 16, 24, dtype=dtype, bias=True)
    chunks = plan(tokens, vocabulary, 16, 24, dtype=dtype, device=DEVICE, backend="triton", workspace_mib=1).chunks
    assert chunks > 1
    check(inputs, divergence=divergence, workspace_mib=1, labels=make_labels(tokens, vocabulary), ce_weight=0.3)


def test_student_and_teacher_of_different_dtypes_match_reference():
    inputs = make_inputs("moderate")
    narrow = inputs._replace(teacher_hidden=inputs.teacher_hidden.bfloat16(), teacher_weight=inputs.teacher_weight.bfloat16())
    check(narrow)
    check(narrow, reduction="none", upstream=per_token())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_inputs_are_as_good(reduction):
    """And on CPU of the same bits. On a GPU strides have a say in which of cuBLAS's kernels multiplies, and in whether TMA reads."""
    inputs = make_inputs("moderate")
    there = inputs.to(DEVICE)

    def spread(matrix):
        wide = matrix.new_full((2 * matrix.shape[0], matrix.shape[1] + 5), math.nan)
        wide[::2, 3:-2] = matrix
        return wide[::2, 3:-2]

    def turned(matrix):
        return matrix.T.contiguous().T

    plain = distillation_loss(*there[:4], backend="triton", reduction=reduction)
    truth = reference.distillation_loss(*inputs.to(torch.float64)[:4], reduction=reduction)
    eager = [loss.cpu() for loss in eager_with_gradients(eager_loss, there, 1.0, reduction=reduction)["loss"]]
    for arranged in (spread, turned):
        loss = distillation_loss(*map(arranged, there[:4]), backend="triton", reduction=reduction)
        assert_as_good_as_eager("loss", loss.cpu(), eager, truth)
        assert ON_GPU or torch.equal(loss, plain)


@pytest.mark.parametrize("which, divergence", paired(["student_bias", "teacher_bias"], TWO))
def test_entries_of_minus_infinity_match_reference(which, divergence):
    inputs = make_inputs("moderate", bias=True)
    getattr(inputs, which)[5:50] = -math.inf
    got = {}
    for reduction in ("mean", "none"):
        options = {"divergence": divergence, "reduction": reduction, "labels": make_labels(TOKENS, VOCABULARY)}
        upstream = torch.full((TOKENS,), 1.0) if reduction == "none" else 1.0
        got = with_gradients(distillation_loss, inputs.to(DEVICE), upstream, backend="triton", **_there(options))
        truth = with_gradients(reference.distillation_loss, inputs.to(torch.float64), upstream, **options)
        for name in truth:
            torch.testing.assert_close(got[name].cpu().double(), truth[name], rtol=2e-5, atol=2e-6 * truth[name].abs().max().item())


def _there(options):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", divergences.jensen_shannon(0.3)], ids=str)
@pytest.mark.parametrize("vocabulary", some([VOCABULARY, 40], ["300"]))
def test_entries_below_the_floor_match_reference(vocabulary, divergence):
    # A temperature so low that the spread of logits passes the floor of -10,000; most tokens have such entries, the first has none.
    inputs = make_inputs("huge", vocabulary=vocabulary)
    inputs.student_hidden[0] *= 1e-3
    inputs.teacher_hidden[0] *= 1e-3
    options = {"temperature": 0.05, "temperature_squared": False, "labels": make_labels(TOKENS, vocabulary), "ce_weight": 0.1}
    check(inputs, divergence=divergence, label_smoothing=0.1, **options)
    check(inputs, divergence=divergence, reduction="none", upstream=per_token(), **options)


@pytest.mark.parametrize("family", some(["moderate", "realistic"], ["realistic"]))
@pytest.mark.parametrize("options, divergence", paired({"plain": {}, "everything": everything(TOKENS, VOCABULARY)}, TWO))
def test_stats_match_reference(divergence, options, family):
    inputs = make_inputs(family)
    options = {"divergence": divergence, **options}
    _, stats = distillation_loss_and_stats(*inputs.to(DEVICE)[:4], backend="triton", **_there(options))
    names = ("divergence", "temperature", "labels", "label_smoothing", "student_logit_scale", "teacher_logit_scale", "student_softcap",
             "teacher_softcap")  # fmt: skip
    terms = {name: options[name] for name in names if name in options}
    _, truth = reference.distillation_terms(*inputs.to(torch.float64)[:4], **terms)
    _, eager = eager_terms(*inputs[:4], **terms)
    valid = stats.valid.cpu()
    for name, value in truth.items():
        got = getattr(stats, name).cpu()
        assert (got[~valid] == 0).all(), name
        assert_as_good_as_eager(name, got[valid], eager[name][valid], value[valid], slack=2)


@DTYPES
def test_token_logprobs_match_reference(dtype):
    inputs = make_inputs("moderate", dtype=dtype, bias=True)
    ids = make_labels(TOKENS, VOCABULARY)
    options = {"temperature": 1.5, "softcap": 20.0, "logit_scale": 1.3}
    results = []
    for function, device, to in ((token_logprobs, DEVICE, dtype), (reference.token_logprobs, "cpu", torch.float64)):
        hidden, weight, bias = (x.detach().to(device, to).clone().requires_grad_() for x in (inputs[0], inputs[1], inputs[4]))
        extra = {"backend": "triton"} if function is token_logprobs else {}
        made = torch.stack(function(hidden, weight, ids.to(device), bias=bias, **options, **extra))
        (made * torch.linspace(-1, 2, made.numel(), device=device).view_as(made)).sum().backward()
        results.append([x.detach().cpu().double() for x in (made, hidden.grad, weight.grad, bias.grad)])
    for got, truth in zip(*results, strict=True):
        allowed = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert (got - truth).abs().max() <= allowed * truth.abs().max()


def test_masked_tokens_may_hold_anything(monkeypatch):
    inputs = make_inputs("moderate").to(DEVICE)
    labels = make_labels(TOKENS, VOCABULARY).to(DEVICE)
    masked = labels == -100
    dirty = inputs._replace(student_hidden=inputs.student_hidden.clone(), teacher_hidden=inputs.teacher_hidden.clone())
    dirty.student_hidden[masked], dirty.teacher_hidden[masked] = math.nan, math.inf
    for reduction, upstream in (("mean", 1.7), ("none", per_token())):
        options = {"labels": labels, "ce_weight": 0.2, "reduction": reduction, "backend": "triton"}
        clean = with_gradients(distillation_loss, inputs, upstream, **options)
        got = with_gradients(distillation_loss, dirty, upstream, **options)
        for name in clean:
            assert torch.equal(clean[name], got[name]), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_tokens_masked_give_zeros(reduction):
    inputs = make_inputs("moderate").to(DEVICE)
    labels = torch.full((TOKENS,), -100, device=DEVICE)
    upstream = torch.ones(TOKENS) if reduction == "none" else 1.0
    got = with_gradients(distillation_loss, inputs, upstream, labels=labels, ce_weight=1.0, reduction=reduction, backend="triton")
    assert all((value == 0).all() for value in got.values())


def test_nan_arrives():
    for name in ("student_hidden", "teacher_hidden"):
        inputs = make_inputs("moderate").to(DEVICE)
        getattr(inputs, name)[3] = math.nan
        for divergence in ("forward_kl", "total_variation"):
            loss = distillation_loss(*inputs[:4], divergence=divergence, reduction="none", backend="triton")
            assert loss[3].isnan() and loss.isnan().sum() == 1


def test_float16_gradients_of_tiny_coefficients_do_not_underflow():
    inputs = make_inputs("moderate", dtype=torch.float16)
    upstream = 2.0**14  # a loss scaler's
    got = with_gradients(distillation_loss, inputs.to(DEVICE), upstream, num_items=10**6, backend="triton")
    truth = with_gradients(reference.distillation_loss, inputs.to(torch.float64), upstream, num_items=10**6)
    for name in ("d_student_hidden", "d_student_weight"):
        error = (got[name].cpu().double() - truth[name]).norm() / truth[name].norm()
        assert error < 2e-3, f"{name}: {error:.2g}"


ONLY = {"kd_weight": 0.0, "labels": make_labels(TOKENS, VOCABULARY)}
EXTREMES = {
    "small scale": ({"student_logit_scale": 1e-7}, 1e4, 0),
    "large scale": ({"student_logit_scale": 2.0**18}, 1.7, 9),
    "cold": ({"temperature": 1e-3}, 170.0, 0),
    "warm": ({"temperature": 100.0}, 1.7, 0),
    "hot": ({"temperature": 1e5}, 1.7, 0),
    "hot, not squared": ({"temperature": 1e5, "temperature_squared": False}, 1e9, 0),
    "hot, large teacher scale": ({"temperature": 1e4, "teacher_logit_scale": 1e4}, 1e-2, 0),
    "z-loss, small scale": (ONLY | {"z_loss_weight": 0.1, "student_logit_scale": 1e-7}, 1e4, 0),
    "cross entropy, small scale": (ONLY | {"ce_weight": 1.0, "student_logit_scale": 1e-7}, 1e4, 0),
    "cross entropy, large scale": (ONLY | {"ce_weight": 1.0, "student_logit_scale": 2.0**18}, 1.7, 9),
}


@pytest.mark.parametrize("extreme, divergence", paired(EXTREMES, ["forward_kl", "reverse_kl"]))
def test_float16_gradients_of_extreme_scales_and_temperatures_match_reference(extreme, divergence):
    """`upstream`, a loss scaler's, and inputs `shrunk` by powers of two keep the gradients themselves in the range of float16."""
    options, upstream, shrunk = extreme
    inputs = make_inputs("moderate", dtype=torch.float16)
    inputs = inputs._replace(student_hidden=inputs.student_hidden / 2**shrunk, student_weight=inputs.student_weight / 2**shrunk)
    check(inputs, upstream=upstream, divergence=divergence, **options)


@pytest.mark.parametrize("options, upstream, shrunk", some(EXTREMES, ["small scale", "large scale", "hot"]))
def test_kept_float16_columns_of_extreme_scales_and_temperatures_give_the_same(options, upstream, shrunk, sampling_pays):
    inputs = make_inputs("moderate", dtype=torch.float16).to(DEVICE)
    inputs = inputs._replace(student_hidden=inputs.student_hidden / 2**shrunk, student_weight=inputs.student_weight / 2**shrunk)
    options = {**_there(options), "column_fraction": 0.08, "seed": 3, "backend": "triton"}
    total = with_gradients(distillation_loss, inputs, upstream, reduction="sum", **options)
    kept = with_gradients(distillation_loss, inputs, torch.full((TOKENS,), upstream), reduction="none", **options)
    for name in ("d_student_hidden", "d_student_weight"):
        assert total[name].isfinite().all() and total[name].any()
        torch.testing.assert_close(kept[name], total[name], rtol=2e-3, atol=2e-3 * total[name].abs().max().item())


@pytest.mark.parametrize("dtype", some(ALL_DTYPES, ["bfloat16"]))
def test_same_inputs_give_the_same_bits(dtype):
    inputs = make_inputs("realistic", dtype=dtype, bias=True).to(DEVICE)
    options = {**_there(everything(TOKENS, VOCABULARY)), "backend": "triton"}
    first, second = (with_gradients(distillation_loss, inputs, 1.7, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_schedule_is_the_plans_and_keeps_to_its_workspace():
    keeps = plan(64, 5000, 32, 32, device=DEVICE, backend="triton", workspace_mib=1)
    sweeps = plan(64, 5000, 32, 32, device=DEVICE, backend="triton", workspace_mib=1, reduction="none")
    assert keeps.schedule == "chunked" and keeps.workspace_bytes <= 2**20 and keeps.chunks > 1
    frozen = plan(64, 5000, 32, 32, device=DEVICE, backend="triton", hidden_gradient=False, weight_gradient=False)
    assert frozen.schedule == "tile-fused" and frozen.chunks == 1 and sweeps.schedule == "chunked"


SIMPLE = Problem(
    tokens=4, vocabulary=100, student_dim=8, teacher_dim=8, student_dtype=torch.float32, teacher_dtype=torch.float32, device=DEVICE
)  # fmt: skip


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"student_dtype": torch.float64}, "float64 inputs want float64"),
        ({"vocabulary": 2**24 + 1}, "at most 16777216 entries"),
        ({"device": torch.device("meta")}, "runs on GPU tensors, these are on meta"),
    ],
)
def test_reason_why_not_is_given_in_words(change, reason):
    assert backend.why_not(SIMPLE) is None
    assert reason in backend.why_not(dataclasses.replace(SIMPLE, **change))


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_reason_why_not_names_the_missing_gpu(monkeypatch):
    assert "torch finds no GPU" in backend.why_not(dataclasses.replace(SIMPLE, device=torch.device("cuda")))
    monkeypatch.setattr(backend, "_interprets", lambda: False)
    assert "TRITON_INTERPRET=1" in backend.why_not(SIMPLE)
    assert backends.name_of(backends.choose(SIMPLE)) in ("native", "torch")


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(divergences, "FAMILIES", dict(divergences.FAMILIES))


SHARPNESS = 2.0


def test_registered_divergence_matches_reference(registry):
    @divergences.register
    def squared_error(log_p, log_q, power):
        q = divergences.exp(log_q)
        gap = q - divergences.exp(log_p)
        return power * SHARPNESS * gap * gap, 2 * power * SHARPNESS * q * gap

    inputs = make_inputs("moderate")
    options = {"divergence": squared_error(power=1.5), "temperature": 2.0}
    got = with_gradients(distillation_loss, inputs.to(DEVICE), 1.7, backend="triton", **options)
    truth = with_gradients(reference.distillation_loss, inputs.to(torch.float64), 1.7, **options)
    for name in truth:
        torch.testing.assert_close(got[name].cpu().double(), truth[name], rtol=1e-4, atol=1e-5 * truth[name].abs().max().item())


def test_registered_divergence_that_triton_cannot_compile_is_refused_in_words(registry):
    @divergences.register
    def with_torch(log_p, log_q):
        return torch.special.expit(log_q), log_q

    with pytest.raises(NotImplementedError, match=r"with_torch uses .*torch.*; here a divergence may use exp, log"):
        distillation_loss(*make_inputs("flat").to(DEVICE)[:4], divergence="with_torch", backend="triton")
    namespace = {"divergences": divergences}
    exec("def sourceless(log_p, log_q):\n    return log_q, log_q", namespace)
    divergences.register(namespace["sourceless"])
    with pytest.raises(NotImplementedError, match="sourceless has no source file"):
        distillation_loss(*make_inputs("flat").to(DEVICE)[:4], divergence="sourceless", backend="triton")


def test_loss_under_torch_compile_equals_eager():
    inputs = make_inputs("moderate").to(DEVICE)
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled, inputs, 1.7, backend="triton")
    truth = with_gradients(distillation_loss, inputs, 1.7, backend="triton")
    assert all(torch.equal(got[name], truth[name]) for name in truth)
