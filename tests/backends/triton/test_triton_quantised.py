"""The quantised sweep of the Triton backend: its sums and scores against float64 of the same 8-bit rows, and what is made of them against
the torch backend's; in Triton's interpreter under `triton_guard`, or on a GPU."""

import dataclasses
import math

import pytest
import torch
from accuracy import (
    assert_as_good_as_eager,
    eager_loss,
    eager_with_gradients,
    everything,
    make_inputs,
    make_labels,
    moved,
    with_gradients,
)
from thinned import some

from distill_kernels import distillation_loss, distillation_loss_and_stats, divergences, plan, reference
from distill_kernels.backends import triton as backend
from distill_kernels.call import worthwhile
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem
from distill_kernels.estimators import sampling
from distill_kernels.estimators.correction import Correction
from distill_kernels.estimators.quantised import AGREEMENT
from distill_kernels.ops import whole_vocabulary

pytest.importorskip("triton_guard", reason="triton is not installed", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("guarded", "sampling_pays")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
TOKENS, VOCABULARY = 21, 200
SWEEP = {"column_fraction": 0.3, "seed": 3, "sweep_tolerance": None}  # else what is compared may be the exact chunk
EVERYTHING = {name: value for name, value in everything(TOKENS, VOCABULARY).items() if name != "label_smoothing"}
OPTIONS = {
    "plain": {},
    "everything": EVERYTHING,
    "reverse, everything": EVERYTHING | {"divergence": "reverse_kl"},
    "reverse": {"divergence": "reverse_kl"},
    "cold": {"temperature": 0.5},
    "cross entropy": {"labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 0.5},
    "masked": {"labels": make_labels(TOKENS, VOCABULARY)},
    "z-loss alone": {"z_loss_weight": 0.05, "kd_weight": 0.0},
}


def inputs_of(family, **options):
    return make_inputs(family, TOKENS, VOCABULARY, **options)


@pytest.fixture
def same_columns(monkeypatch):
    """Each second call draws what the one before it drew, whose scores are about the same: where a column's edge is near, rounding would
    have its neighbour drawn. Yields the scores."""
    scores, waiting, draw = [], [], sampling.draw

    def once(given, kept, uniform):
        scores.append(given)
        if waiting:
            return waiting.pop()
        waiting.append(draw(given, kept, uniform))
        return waiting[0]

    monkeypatch.setattr(sampling, "draw", once)
    return scores


@pytest.fixture
def swept(monkeypatch):
    """Every chunk that is swept, as it is after its sweep: [(chunk, its sums, its scores)]."""
    from distill_kernels.backends.triton.swept import SweptChunk

    found, sweep = [], SweptChunk.sweep

    def watched(self, pilot):
        scores = sweep(self, pilot)
        found.append((self, self.sums, scores))
        return scores

    monkeypatch.setattr(SweptChunk, "sweep", watched)
    return found


def assert_close(got, truth, bound, name):
    error = (got.double() - truth.double()).abs().max()
    assert error <= bound * truth.double().abs().max(), f"{name}: {error:.2g} off {truth.abs().max():.2g}"


def check(inputs, bound=1e-5, **options):
    """Loss and gradients are the torch backend's, to rounding, and both are estimates."""
    inputs, options = inputs.to(DEVICE), moved(options, DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Correction, "_exactly", lambda self: pytest.fail("the chunk was computed exactly"))
        truth, got = (with_gradients(distillation_loss, inputs, 1.7, backend=name, **SWEEP | options) for name in ("torch", "triton"))
    for name, value in truth.items():
        assert_close(got[name], value, 1e-5 if name == "loss" else bound, name)


SWEPT = [*((name, "int8") for name in OPTIONS), ("plain", "fp8"), ("everything", "fp8")]


KEPT = ["reverse, everything-int8", "masked-int8", "plain-fp8"]


@pytest.mark.parametrize("name, sweep", some({"-".join(pair): pair for pair in SWEPT}, KEPT))
def test_swept_loss_is_the_torch_backends(name, sweep, same_columns):
    check(inputs_of("moderate", bias=True), sweep=sweep, **OPTIONS[name])
    assert_close(same_columns[1], same_columns[0], 1e-5, "scores")


RAGGED = [(1, 200, 24, 40, "int8"), (2, 5, 3, 2, "fp8"), (17, 129, 65, 130, "int8"), (17, 129, 65, 130, "fp8"), (33, 64, 20, 9, "int8")]


@pytest.mark.parametrize("tokens, vocabulary, student_dim, teacher_dim, sweep", some(RAGGED, [str(RAGGED[1]), str(RAGGED[2])]))
def test_ragged_sizes_give_what_the_torch_backend_gives(tokens, vocabulary, student_dim, teacher_dim, sweep, same_columns):
    inputs = make_inputs("moderate", tokens, vocabulary, student_dim, teacher_dim, bias=True)
    options = {name: value for name, value in everything(tokens, vocabulary).items() if name != "label_smoothing"}
    check(inputs, sweep=sweep, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_give_what_the_torch_backend_gives(dtype, same_columns):
    # Gradients of logits are rounded to the inputs' dtype before their products.
    inputs = inputs_of("realistic", dtype=dtype, bias=True)
    check(inputs, bound=1.6e-2 if dtype is torch.bfloat16 else 2e-3, sweep="int8", **EVERYTHING)


def test_loss_of_the_student_alone_is_the_torch_backends(same_columns):
    inputs, labels = inputs_of("moderate").to(DEVICE), make_labels(TOKENS, VOCABULARY).to(DEVICE)
    results = []
    for name in ("torch", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs[:2]]
        options = {"kd_weight": 0.0, "ce_weight": 1.0, "z_loss_weight": 0.1, "sweep": "int8", "backend": name, **SWEEP}
        loss = distillation_loss(*leaves, None, None, labels, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for truth, got in zip(*results, strict=True):
        assert_close(got, truth, 1e-5, "loss or gradient")


@pytest.mark.parametrize("sweep, options", some({"plain": ("fp8", {}), "everything": ("int8", EVERYTHING)}, ["everything"]))
def test_stats_and_errors_are_the_torch_backends(options, sweep, same_columns):
    inputs, options = inputs_of("moderate").to(DEVICE), moved(options, DEVICE)
    (_, truth), (_, got) = (
        distillation_loss_and_stats(*inputs[:4], backend=name, sweep=sweep, **SWEEP, **options) for name in ("torch", "triton")
    )
    assert truth.recomputed == got.recomputed == 0
    for name, expected in vars(truth).items():
        if isinstance(expected, torch.Tensor):
            assert_close(getattr(got, name), expected, 1e-4, name)


SUMMED = {
    "plain": ("int8", {}), "everything": ("int8", EVERYTHING), "everything, fp8": ("fp8", EVERYTHING),
    "reverse": ("fp8", {"divergence": "reverse_kl", "temperature": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("sweep, options", some(SUMMED, ["everything", "reverse"]))
def test_sums_and_scores_are_those_of_the_8_bit_rows(options, sweep, swept):
    inputs, options = inputs_of("realistic", bias=True).to(DEVICE), moved(options, DEVICE)
    biases = {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
    distillation_loss_and_stats(*inputs[:4], **biases, backend="triton", sweep=sweep, **SWEEP, **options)
    ((kernels, sums, scores),) = swept
    problem, chunk = kernels.problem, kernels.chunk

    def logits(model):
        z = model.rows.double() @ model.head.double().T * model.row_scales[:, :1].double() * model.head_scales[:, 0].double()
        z = (z + model.bias.double()) * model.scale
        return z if model.softcap is None else model.softcap * torch.tanh(z / model.softcap)

    x, y = logits(kernels.student), logits(kernels.teacher)
    r_q, r_p, r_1, slope_total = kernels.relative_to.double().unsqueeze(-1)
    log_q, log_p, log_1 = x / problem.options.temperature - r_q, y / problem.options.temperature - r_p, x - r_1
    value, slope = problem.divergence(log_p, log_q)
    untempered = problem.cross_entropy or problem.z_loss
    below = torch.zeros_like(value)
    truths = log_q.exp(), log_p.exp(), value, slope, log_1.exp(), log_q.exp() * log_q, log_p.exp() * log_p, below
    for name, got, truth in zip(sums._fields, sums, truths, strict=True):
        if name == "untempered" and not untempered:
            continue
        # Masses are sums of positive terms; the others' terms are of logarithms and their differences.
        masses = name in ("student", "teacher", "untempered")
        parts = truth if masses else (log_q.exp() + log_p.exp()) * (1 + log_q.abs() + log_p.abs())
        assert ((got.squeeze(-1) - truth.sum(-1)).abs() <= 2e-5 * parts.sum(-1)).all(), name
    kd, ce, z_loss = chunk.coefficients.double().unsqueeze(-1).unbind(1)
    dz, mass = slope - log_q.exp() * slope_total, log_q.exp().clamp(max=1) + log_p.exp().clamp(max=1)
    scale = problem.options.student_logit_scale
    squares = (scale * kd / problem.options.temperature).square() * (dz.square().clamp(max=1) + AGREEMENT * mass.square())
    if untempered:
        squares = squares + (scale * (ce.abs() + 2 * (z_loss * r_1).abs()) * log_1.exp().clamp(max=1)).square()
        is_label = torch.arange(VOCABULARY, device=DEVICE) == chunk.labels[:, None]
        squares = squares + is_label * (scale * ce).square()
    torch.testing.assert_close(scores.double(), squares.sum(0).sqrt(), rtol=2e-4, atol=0)


def test_references_are_the_pilots_log_sum_exps(swept):
    from distill_kernels.estimators import quantised

    pilots, pilot = [], quantised.pilot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "pilot", lambda *arguments: pilots.append(pilot(*arguments)) or pilots[0])
        patch.setattr(quantised, "PILOT_FRACTION", 2)  # enough for several splits
        inputs = inputs_of("realistic").to(DEVICE)
        options = {"temperature": 2.0, "z_loss_weight": 0.1, "sweep": "int8", **SWEEP}
        distillation_loss(*inputs[:4], backend="triton", **options)
    kernels = swept[0][0]
    x, y = (kernels.swept(model, pilots[0]).double() for model in (kernels.student, kernels.teacher))
    log_q, log_p = x / 2 - (x / 2).logsumexp(-1, keepdim=True), y / 2 - (y / 2).logsumexp(-1, keepdim=True)
    slope = divergences.resolve("forward_kl")(log_p, log_q)[1].sum(-1)
    truths = (x / 2).logsumexp(-1), (y / 2).logsumexp(-1), x.logsumexp(-1), slope
    for got, truth in zip(kernels.relative_to, truths, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sweep, options", some({"plain": ("fp8", {}), "everything": ("int8", EVERYTHING)}, ["everything"]))
def test_all_columns_kept_leave_no_error(options, sweep, swept, monkeypatch):
    """Every swept value is then replaced by the exact one."""
    monkeypatch.setattr(worthwhile, "MOST_FRACTION", 1.0)
    inputs = inputs_of("moderate", bias=True)
    there = moved(options, DEVICE) | {"backend": "triton", "sweep": sweep, "column_fraction": 1.0, "sweep_tolerance": None}
    got = moved(with_gradients(distillation_loss, inputs.to(DEVICE), 1.7, **there), "cpu")
    truth = with_gradients(reference.distillation_loss, inputs.to(torch.float64), 1.7, **options)
    eager = eager_with_gradients(eager_loss, inputs, 1.7, **options)
    assert len(swept) == 1 and swept[0][0].problem.kept_columns == VOCABULARY
    for name in truth:
        assert_as_good_as_eager(name, got[name], eager[name], truth[name], gradient=name != "loss", slack=2)


def test_chunk_whose_error_is_beyond_the_tolerance_is_computed_exactly():
    inputs = inputs_of("realistic").to(DEVICE)
    options = {"sweep": "int8", "backend": "triton"} | SWEEP | {"sweep_tolerance": 1e-9}
    exact = distillation_loss(*inputs[:4], backend="triton")
    _, stats = distillation_loss_and_stats(*inputs[:4], **options)
    assert stats.recomputed == 1
    torch.testing.assert_close(stats.divergence.mean(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", ["student_bias", "teacher_bias"])
def test_entries_of_minus_infinity_give_what_the_torch_backend_gives(which, same_columns):
    inputs = inputs_of("moderate", bias=True)
    getattr(inputs, which)[5:50] = -math.inf
    check(inputs, sweep="int8")


UNCAPPED = EVERYTHING | {"student_softcap": None, "teacher_softcap": None}
BELOW = {
    "student": (-1e5, 12.0, {}, 1),
    "teacher": (12.0, -1e5, {"divergence": "reverse_kl"}, 1),
    "everything": (-1e5, 12.0, UNCAPPED, 1),
    "both": (-math.inf, -math.inf, {}, 0),
    "both, everything": (-math.inf, -math.inf, UNCAPPED, 0),
}


@pytest.mark.parametrize("student, teacher, options, recomputed", some(BELOW, ["teacher", "both, everything"]))
def test_entries_below_the_floor_are_computed_exactly_if_one_model_gives_them_mass(student, teacher, options, recomputed, monkeypatch):
    """With every column kept nothing else is uncertain, and gradients are exact where the sums are."""
    monkeypatch.setattr(worthwhile, "MOST_FRACTION", 1.0)
    inputs = inputs_of("moderate", bias=True)
    inputs.student_bias[5], inputs.teacher_bias[5] = student, teacher
    inputs, options, found = inputs.to(DEVICE), moved(options, DEVICE), []

    def loss_of(*arguments, **others):
        loss, stats = distillation_loss_and_stats(*arguments, **others)
        found.append(stats.recomputed)
        return loss

    swept = {"backend": "triton", "sweep": "int8", "column_fraction": 1.0}
    truth, got = (with_gradients(loss_of, inputs, 1.7, **how, **options) for how in ({"backend": "torch"}, swept))
    assert found[1] == recomputed
    for name, value in truth.items():
        assert value.isfinite().all()
        assert_close(got[name], value, 1e-5, name)


def test_masked_tokens_may_hold_anything_where_they_are_not_left_out(monkeypatch):
    from distill_kernels.estimators import quantised
    from distill_kernels.schedule import chunked

    for module in (chunked, whole_vocabulary):  # as where a graph is captured
        monkeypatch.setattr(module, "compacts", lambda problem: False)
    monkeypatch.setattr(quantised.Trust, "exceeds", lambda *arguments: False)
    inputs, labels = inputs_of("moderate").to(DEVICE), make_labels(TOKENS, VOCABULARY).to(DEVICE)
    dirty = inputs._replace(student_hidden=inputs.student_hidden.clone(), teacher_hidden=inputs.teacher_hidden.clone())
    dirty.student_hidden[labels == -100], dirty.teacher_hidden[labels == -100] = math.nan, math.inf
    options = {"labels": labels, "ce_weight": 0.2, "sweep": "int8", "backend": "triton", **SWEEP}
    clean, got = (with_gradients(distillation_loss, some, 1.7, **options) for some in (inputs, dirty))
    assert all(torch.equal(got[name], clean[name]) for name in clean)
    _, stats = distillation_loss_and_stats(*dirty[:4], **options)
    assert (stats.divergence[~stats.valid] == 0).all() and stats.divergence[stats.valid].isfinite().all()


def test_swept_loss_has_the_same_bits_again():
    inputs = inputs_of("realistic", bias=True).to(DEVICE)
    options = moved(EVERYTHING, DEVICE) | {"sweep": "int8", "backend": "triton", **SWEEP}
    first, second = (with_gradients(distillation_loss, inputs, 1.7, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_made_in_backward_are_those_made_in_forward():
    inputs = inputs_of("moderate").to(DEVICE)
    options = {"sweep": "int8", "backend": "triton", **SWEEP}
    now = with_gradients(distillation_loss, inputs, 1.7, reduction="sum", **options)
    later = with_gradients(distillation_loss, inputs, torch.full((TOKENS,), 1.7), reduction="none", **options)
    for name in ("d_student_hidden", "d_student_weight"):
        assert_close(later[name], now[name], 1e-5, name)


def test_several_chunks_give_what_the_torch_backend_gives(monkeypatch):
    monkeypatch.setattr(backend, "SAMPLED_TOKENS", 8)
    recorded, draw = {"torch": [], "triton": []}, sampling.draw
    inputs, results = inputs_of("moderate").to(DEVICE), []
    monkeypatch.setattr("distill_kernels.backends.torch.SAMPLED_TOKENS", 8)
    for name in recorded:

        def drawn(*arguments, name=name):
            here = recorded[name]
            here.append(draw(*arguments) if name == "torch" else recorded["torch"][len(here)])
            return here[-1]

        with monkeypatch.context() as patch:
            patch.setattr(sampling, "draw", drawn)
            results.append(with_gradients(distillation_loss, inputs, 1.7, backend=name, sweep="int8", **SWEEP))
    assert len(recorded["triton"]) == 3
    for name, value in results[0].items():
        assert_close(results[1][name], value, 1e-5, name)


def test_schedule_is_swept_and_keeps_to_its_workspace():
    asked = {"device": DEVICE, "backend": "triton", "sweep": "int8", "column_fraction": 0.08}
    made = plan(64, 5000, 32, 32, workspace_mib=16, **asked)
    assert made.schedule == "swept" and made.workspace_bytes <= 16 * 2**20 and made.chunks > 1
    assert plan(64, 5000, 32, 32, **asked).chunks == 1


@pytest.mark.skipif(not ON_GPU, reason="torch counts a GPU's memory only")
def test_peak_is_within_the_plan():
    inputs = make_inputs("moderate", 2048, 32000, 256, 512, dtype=torch.bfloat16).to(DEVICE)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    options = {"backend": "triton", "sweep": "int8", "column_fraction": 0.08, "workspace_mib": 256}
    made = plan(2048, 32000, 256, 512, dtype=torch.bfloat16, device=DEVICE, **options)
    for measured in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(distillation_loss(*inputs[:4], **options), leaves)
        assert not measured or torch.cuda.max_memory_allocated() - before <= made.peak_bytes


SIMPLE = Problem(
    tokens=4, vocabulary=100, student_dim=8, teacher_dim=8, student_dtype=torch.float32, teacher_dtype=torch.float32, device=DEVICE,
)  # fmt: skip


@pytest.mark.parametrize("sweep, capability, reason", [("int8", (8, 0), None), ("fp8", (8, 0), "8.9 or later"), ("fp8", (8, 9), None)])
def test_float8_is_refused_where_no_tensor_core_multiplies_it(sweep, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    swept = dataclasses.replace(SIMPLE, options=Options(sweep=sweep, column_fraction=0.3))
    found = backend.why_not(dataclasses.replace(swept, device=torch.device("cuda")))
    assert found is None if reason is None else reason in found
    assert backend.why_not(swept) is None or ON_GPU
