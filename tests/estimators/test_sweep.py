"""The quantised sweep: that each backend makes the estimate which `quantised` describes of the columns that were drawn, and when it falls
back. Its bias and errors over many draws are test_sweep_statistics.py's, 8-bit matrices and prepared heads test_quantised.py's."""

import math
from typing import NamedTuple

import pytest
import torch
from accuracy import BACKENDS, Inputs, make_inputs, make_labels, make_token_weight, relative, with_gradients
from torch.utils.checkpoint import checkpoint

from distill_kernels import backends, distillation_loss, distillation_loss_and_stats, plan, prepare_head, reference
from distill_kernels.backends import native
from distill_kernels.call import worthwhile
from distill_kernels.estimators import quantised

pytestmark = pytest.mark.covering(2)
TOKENS, VOCABULARY, FRACTION = 21, 700, 0.3
GRADIENTS = ("d_student_hidden", "d_student_weight")
on_all = pytest.mark.parametrize("backend", BACKENDS)
needs_native = pytest.mark.skipif(native._native is None, reason="the compiled extension was not built")
SWEPT = {"sweep": "int8", "column_fraction": FRACTION, "seed": 3}
NEVER = {**SWEPT, "sweep_tolerance": None}


def options_of(kind):
    labels = make_labels(TOKENS, VOCABULARY)
    return {
        "plain": {},
        "reverse": {"divergence": "reverse_kl"},
        "tempered": {"temperature": 2.0, "divergence": "reverse_kl"},
        "cross entropy": {"labels": labels, "ce_weight": 1.0, "kd_weight": 0.0},
        "everything": {
            "labels": labels, "temperature": 1.5, "kd_weight": 0.7, "ce_weight": 0.4, "z_loss_weight": 0.01, "student_logit_scale": 0.8,
            "teacher_logit_scale": 1.3, "student_softcap": 15.0, "teacher_softcap": 20.0, "token_weight": make_token_weight(TOKENS),
            "num_items": 13,
        },
    }[kind]  # fmt: skip


KINDS = ("plain", "reverse", "tempered", "cross entropy", "everything")


class Estimate(NamedTuple):
    """What the estimator makes of a draw, in float64."""

    loss: torch.Tensor  # (n,) each token's, unweighted
    dz: torch.Tensor  # (n, K) of bare products, unweighted by columns
    errors: torch.Tensor  # (n, 2)


def estimated(
    inputs, drawn, weights, *, sweep="int8", backend="torch", labels=None, divergence="forward_kl", temperature=1.0, kd_weight=1.0,
    ce_weight=0.0, z_loss_weight=0.0, student_logit_scale=1.0, teacher_logit_scale=1.0, student_softcap=None, teacher_softcap=None,
    token_weight=None, num_items=None,
):  # fmt: skip
    """The formulas of `quantised`, in probability space and with the logits in memory."""
    turned = quantised.quantise if backend == "torch" else backends.quantise

    def logits(prefix, scale, softcap):
        hidden, weight, bias = (getattr(inputs, f"{prefix}_{name}") for name in ("hidden", "weight", "bias"))
        both = [hidden.double() @ weight.double().T]
        (a, a_scales), (b, b_scales) = turned(hidden, sweep), backends.quantise(weight, sweep)
        both.append((a.double() * a_scales[:, :1].double()) @ (b.double() * b_scales[:, :1].double()).T)
        both = [scale * (z if bias is None else z + bias.double()) for z in both]
        return [z if softcap is None else softcap * torch.tanh(z / softcap) for z in both]

    x, swept_x = logits("student", student_logit_scale, student_softcap)
    y, swept_y = logits("teacher", teacher_logit_scale, teacher_softcap)
    weights = weights.double()
    top_x, top_y = swept_x.max(-1, keepdim=True).values, swept_y.max(-1, keepdim=True).values

    def corrected(of):
        """Σ of a function of logits (x, y), and what each kept column changes."""
        change = of(x, y)[:, drawn] - of(swept_x, swept_y)[:, drawn]
        return of(swept_x, swept_y).sum(-1, keepdim=True) + (change * weights).sum(-1, keepdim=True), change

    q_sum, q_change = corrected(lambda x, y: ((x - top_x) / temperature).exp())
    p_sum, p_change = corrected(lambda x, y: ((y - top_y) / temperature).exp())
    one_sum, one_change = corrected(lambda x, y: (x - top_x).exp())
    log_q = (x - top_x) / temperature - q_sum.log()
    log_p = (y - top_y) / temperature - p_sum.log()
    lse = top_x + one_sum.log()
    swap = divergence == "reverse_kl"
    (a_sum, a_change), (b_sum, b_change) = ((q_sum, q_change), (p_sum, p_change))[:: 1 if swap else -1]

    def cross(x, y):
        a, b = ((x - top_x) / temperature, (y - top_y) / temperature)[:: 1 if swap else -1]
        return a.exp() * (a - b)

    c_sum, c_change = corrected(cross)
    kd = c_sum / a_sum - a_sum.log() + b_sum.log()
    kd_change = (c_change - (c_sum / a_sum + 1) * a_change) / a_sum + b_change / b_sum
    p, q = log_p.exp(), log_q.exp()
    dz = (q * (log_q - log_p - kd) if swap else q - p) * kd_weight * temperature
    loss = kd_weight * temperature**2 * kd + z_loss_weight * lse.square()
    pull = 2 * z_loss_weight * lse
    valid = torch.ones(len(x), dtype=torch.float64)
    if labels is not None:
        valid = (labels >= 0).double()
        label = labels.clamp(min=0)[:, None]
        if ce_weight:
            loss = loss + ce_weight * (lse - x.gather(1, label))
            pull = pull + ce_weight
            dz = dz.scatter_add(1, label, torch.full_like(lse, -ce_weight))
    dz = dz + pull * (x - lse).exp()
    if student_softcap is not None:
        dz = dz * (1 - (x / student_softcap).square())
    factor = valid if token_weight is None else valid * token_weight.double()
    factor = factor / (valid.sum() if num_items is None else num_items)
    variance = [(weights * (weights - 1) * change.square()).sum(-1) for change in (kd_change, one_change / one_sum)]
    untempered = ce_weight or z_loss_weight
    errors = torch.stack([variance[0].sqrt(), variance[1].sqrt() * bool(untempered)], -1)
    return Estimate(loss.squeeze(1) * factor, dz[:, drawn] * student_logit_scale * factor[:, None], errors * (factor != 0)[:, None])


def assert_estimated(got, inputs, draws, bound=3e-5, **options):  # the loss is a difference of sums some hundred times larger
    ((drawn, weights, *_),) = draws
    want = estimated(inputs, drawn, weights, **options)
    assert relative(got["loss"], want.loss.sum()) <= bound
    dz = want.dz * weights.double()
    d_weight = torch.zeros_like(inputs.student_weight, dtype=torch.float64)
    d_weight[drawn] = dz.T @ inputs.student_hidden.double()
    assert relative(got["d_student_hidden"], dz @ inputs.student_weight.double()[drawn]) <= 2 * bound
    assert relative(got["d_student_weight"], d_weight) <= 2 * bound
    if inputs.student_bias is not None:
        d_bias = torch.zeros_like(inputs.student_bias, dtype=torch.float64)
        d_bias[drawn] = dz.sum(0)
        assert relative(got["d_student_bias"], d_bias) <= 2 * bound
    return want


@on_all
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["moderate", "realistic"])
def test_loss_and_gradients_are_the_estimate_of_the_draw(sampling_pays, draws, family, kind, bias, backend):
    inputs, options = make_inputs(family, TOKENS, VOCABULARY, bias=bias), options_of(kind)
    if "labels" in options:  # masked tokens are of no chunk, and the estimate has all rows: leave none out
        options["labels"] = make_labels(TOKENS, VOCABULARY, masked=0)
    if "token_weight" in options:
        options["token_weight"] = options["token_weight"].abs() + 0.1
    got = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **NEVER, **options)
    assert_estimated(got, inputs, draws, backend=backend, **options)


@on_all
@pytest.mark.parametrize("kind", ["plain", "tempered", "everything"])
def test_errors_in_the_stats_are_those_of_the_draw(sampling_pays, draws, kind, backend):
    inputs, options = make_inputs("moderate", TOKENS, VOCABULARY), options_of(kind)
    if "labels" in options:
        options["labels"], options["token_weight"] = make_labels(TOKENS, VOCABULARY, masked=0), make_token_weight(TOKENS).abs() + 0.1
    _, stats = distillation_loss_and_stats(*inputs[:4], backend=backend, **NEVER, **options)
    ((drawn, weights, *_),) = draws
    want = estimated(inputs, drawn, weights, backend=backend, **options).errors
    torch.testing.assert_close(stats.divergence_error.double(), want[:, 0], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(stats.logsumexp_error.double(), want[:, 1], rtol=1e-3, atol=1e-7)
    assert stats.recomputed.item() == 0 and stats.gradient_error is None


@on_all
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_swept_gradient(sampling_pays, draws, kind, backend):
    """The norm of dz's columns as the sweep sees them, with the pilot's sums in place of all."""
    inputs, options = make_inputs("moderate", TOKENS, VOCABULARY), options_of(kind)
    if "labels" in options:
        options["labels"], options["token_weight"] = make_labels(TOKENS, VOCABULARY, masked=0), None
    options = {name: value for name, value in options.items() if value is not None}
    with_gradients(distillation_loss, inputs, 1.0, backend=backend, reduction="sum", **NEVER, **{**options, "num_items": None})
    scores = draws[0][3].double()
    every = torch.arange(VOCABULARY)
    options.pop("num_items", None)
    exact = estimated(inputs, every, torch.ones(VOCABULARY), **options)
    norms = (exact.dz * TOKENS).norm(dim=0)  # of the mean
    # A score has 0.1·(p + q)² beside the gradient's square, and the pilot knows a part of the mass: the same columns are large.
    assert torch.corrcoef(torch.stack([scores.log(), norms.log()]))[0, 1] > 0.6
    assert (scores > 0.2 * norms).all()


def test_every_backend_keeps_the_same_columns_of_a_sweep(sampling_pays, draws):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)
    for backend in ("torch", "native") if native._native else ("torch",):
        with_gradients(distillation_loss, inputs, 1.0, backend=backend, **NEVER)
    first, *others = draws
    for other in others:
        assert torch.equal(first[0], other[0])
        torch.testing.assert_close(other[3], first[3], rtol=1e-3, atol=1e-6)


@on_all
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs(sampling_pays, draws, dtype, backend):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY, dtype=dtype)
    got = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **NEVER)
    ((drawn, weights, *_),) = draws
    want = estimated(inputs, drawn, weights, backend=backend)
    dz = want.dz * weights.double()
    assert got["d_student_hidden"].dtype is dtype
    assert relative(got["loss"], want.loss.sum()) <= 1e-4
    assert relative(got["d_student_hidden"], dz @ inputs.student_weight.double()[drawn]) <= 2e-2


def test_float8_sweep_is_the_estimate_of_the_draw(sampling_pays, draws):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)
    got = with_gradients(distillation_loss, inputs, 1.0, **{**NEVER, "sweep": "fp8"})  # on CPU torch's, whatever else there is
    assert_estimated(got, inputs, draws, bound=1e-4, sweep="fp8")  # its products round


@on_all
def test_masked_tokens_draw_and_get_nothing(sampling_pays, backend):
    inputs, options = make_inputs("realistic", TOKENS, VOCABULARY), options_of("everything")
    counts = (options["labels"] >= 0) & (options["token_weight"] != 0)
    got = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **NEVER, **options)
    fewer = Inputs(inputs.student_hidden[counts], inputs.student_weight, inputs.teacher_hidden[counts], inputs.teacher_weight)
    per_token = {name: options[name][counts] for name in ("labels", "token_weight")}
    want = with_gradients(distillation_loss, fewer, 1.0, backend=backend, **NEVER, **{**options, **per_token})
    assert relative(got["loss"], want["loss"]) <= 1e-6
    assert not got["d_student_hidden"][~counts].any() and relative(got["d_student_hidden"][counts], want["d_student_hidden"]) <= 1e-5
    inputs.student_hidden[~counts], inputs.teacher_hidden[~counts] = float("nan"), float("nan")
    poisoned = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **NEVER, **options)
    assert all(torch.equal(poisoned[name], got[name]) for name in got)


@on_all
@pytest.mark.parametrize("kind", KINDS)
def test_chunk_beyond_the_tolerance_is_computed_exactly(sampling_pays, kind, backend):
    inputs, options = make_inputs("moderate", 400, VOCABULARY), options_of(kind)
    for name in ("labels", "token_weight"):
        if name in options:
            options[name] = options[name].repeat(20)[:400]
    exact = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **options)
    kept = {}

    def call(*args, **kwargs):
        loss, kept["stats"] = distillation_loss_and_stats(*args, **kwargs)
        return loss

    got = with_gradients(call, inputs, 1.0, backend=backend, **{**SWEPT, "sweep_tolerance": 1e-9}, **options)
    assert relative(got["loss"], exact["loss"]) <= 1e-6
    assert kept["stats"].recomputed.item() >= 2 and not kept["stats"].divergence_error.any() and not kept["stats"].logsumexp_error.any()
    _, exact_stats = distillation_loss_and_stats(*inputs[:4], backend=backend, **options)
    for name in ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "tail_mass", "top1_agreement"):
        torch.testing.assert_close(getattr(kept["stats"], name), getattr(exact_stats, name), rtol=1e-4, atol=1e-4)
    # Its gradients still go over a few columns, with probabilities from the sweep.
    assert 1e-4 < relative(got["d_student_weight"], exact["d_student_weight"]) < 2


def test_tolerance_is_of_what_counts(sampling_pays):
    """A divergence that is in the stats only may err."""
    inputs, options = make_inputs("moderate", TOKENS, VOCABULARY), options_of("cross entropy")
    for backend in ("torch", "native") if native._native else ("torch",):
        _, stats = distillation_loss_and_stats(*inputs[:4], backend=backend, **{**SWEPT, "sweep_tolerance": 0.004}, **options)
        assert stats.divergence_error.square().mean().sqrt() > 0.004 > stats.logsumexp_error.max() and stats.recomputed == 0


ADVERSARIES = ("one huge channel", "far above the pilot", "clamped", "clamped where the teacher is")


@on_all
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_what_the_estimate_cannot_be_trusted_with_is_computed_exactly(sampling_pays, adversary, backend):
    inputs = make_inputs("moderate", TOKENS, VOCABULARY, bias=True)
    if adversary == "one huge channel":  # the other 23 round to nothing
        inputs.student_hidden[:, 3] = 3e4
        inputs.student_weight[:, 3] = 0.0
    if adversary == "far above the pilot":
        inputs.teacher_hidden[0], inputs.teacher_weight[77] = 20.0, 20.0
    if adversary == "clamped":
        inputs.student_bias[5] = -3e4
    if adversary == "clamped where the teacher is":
        inputs.student_bias[5], inputs.teacher_bias[5] = -3e4, 12.0
    biases = {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
    truth = reference.distillation_loss(*inputs[:4], **biases)
    loss, stats = distillation_loss_and_stats(*inputs[:4], **biases, backend=backend, **SWEPT)
    assert loss.isfinite() and abs(loss.double() - truth) <= 0.03 + 1e-4 * truth.abs()
    if adversary in ("one huge channel", "clamped where the teacher is"):
        assert stats.recomputed == 1 and abs(loss.double() - truth) <= 1e-3 * truth
        # Not for its standard errors, which are finite: they are not to be trusted.
        _, lenient = distillation_loss_and_stats(*inputs[:4], **biases, backend=backend, **{**SWEPT, "sweep_tolerance": 1e6})
        assert lenient.recomputed == 1


@on_all
@pytest.mark.parametrize("vocabulary", [1, 2, 65, 700])
def test_ties_and_next_to_no_vocabulary(sampling_pays, vocabulary, backend):
    """Hidden states of zero: every column's score is the same, every logit is exact in 8 bits, and the loss is 0."""
    inputs = make_inputs("moderate", TOKENS, vocabulary)
    inputs.student_hidden[:] = inputs.teacher_hidden[:] = 0
    options = {**SWEPT, "labels": make_labels(TOKENS, vocabulary, masked=0), "ce_weight": 1.0, "backend": backend}
    got = with_gradients(distillation_loss, inputs, 1.0, **options)
    assert got["loss"] == pytest.approx(math.log(vocabulary), abs=1e-6)
    assert got["d_student_hidden"].isfinite().all() and not got["d_student_weight"].any()


@on_all
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_entries_that_both_models_lack_cost_nothing(sampling_pays, divergence, backend):
    """Heads that are padded, and a bias of −∞ there."""
    inputs = make_inputs("moderate", TOKENS, VOCABULARY, bias=True)
    inputs.student_bias[-50:] = inputs.teacher_bias[-50:] = -math.inf
    biases = {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
    truth = reference.distillation_loss(*inputs[:4], **biases, divergence=divergence)
    for options in (NEVER, SWEPT):
        loss, stats = distillation_loss_and_stats(*inputs[:4], **biases, divergence=divergence, backend=backend, **options)
        assert abs(loss.double() - truth) <= 4 * stats.divergence_error.mean() and stats.recomputed == 0


@on_all
def test_an_input_that_is_not_finite_shows(sampling_pays, backend):
    inputs = make_inputs("moderate", TOKENS, VOCABULARY)
    inputs.student_hidden[2, 3] = float("nan")
    for options in (SWEPT, NEVER):
        got = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **options)
        assert got["loss"].isnan() and got["d_student_hidden"][2].isnan().all() and got["d_student_weight"].isnan().any()


@on_all
def test_equal_models_have_no_divergence(sampling_pays, backend):
    """The same logits, quantised alike: what is swept is 0, and so is what corrects it."""
    inputs = make_inputs("equal", TOKENS, VOCABULARY, 24, 24)
    loss, stats = distillation_loss_and_stats(*inputs[:4], backend=backend, **SWEPT)
    assert loss.abs() <= 1e-6 and stats.recomputed == 0 and stats.divergence_error.max() <= 1e-6


@on_all
@pytest.mark.parametrize("sampled", [False, True], ids=["anew", "kept"])
def test_per_token_losses(sampling_pays, backend, sampled):
    # The gradient of a bias cannot be made of what is kept.
    inputs, upstream = make_inputs("realistic", TOKENS, VOCABULARY, bias=not sampled), make_token_weight(TOKENS)
    options = {"backend": backend}
    total = with_gradients(distillation_loss, inputs, 1.0, reduction="sum", token_weight=upstream, **options, **NEVER)
    per_token = with_gradients(distillation_loss, inputs, upstream, reduction="none", **options, **NEVER)
    if sampled:  # the draw of a sum weights its tokens
        plain = with_gradients(distillation_loss, inputs, 1.0, reduction="sum", **options, **NEVER)
        assert relative(per_token["loss"].sum(), plain["loss"]) <= 1e-6
    else:
        assert relative((per_token["loss"] * upstream).sum(), total["loss"]) <= 0.1
    exact = with_gradients(distillation_loss, inputs, upstream, reduction="none", backend=backend)
    for name in GRADIENTS:
        assert relative(per_token[name], exact[name]) < 0.5


@on_all
def test_evaluation_makes_no_gradient(sampling_pays, backend):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)
    trained = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **NEVER)
    with torch.no_grad():
        assert torch.equal(distillation_loss(*inputs[:4], backend=backend, **NEVER), trained["loss"])


@on_all
@pytest.mark.parametrize("frozen", ["student_hidden", "student_weight"])
def test_a_frozen_side_leaves_the_other_gradient_as_it_is(sampling_pays, backend, frozen):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)
    both = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **NEVER)
    leaves = {name: getattr(inputs, name).clone().requires_grad_(name != frozen) for name in ("student_hidden", "student_weight")}
    distillation_loss(*leaves.values(), *inputs[2:4], backend=backend, **NEVER).backward()
    (other,) = set(leaves) - {frozen}
    assert leaves[frozen].grad is None and relative(leaves[other].grad, both[f"d_{other}"]) <= 1e-6


@on_all
def test_same_seed_same_bits_and_torch_generator(sampling_pays, backend):
    inputs = make_inputs("realistic", 400, VOCABULARY)

    def run(**options):
        return with_gradients(distillation_loss, inputs, 1.0, backend=backend, **{**NEVER, **options})

    once, again, other = run(), run(), run(seed=4)
    assert all(torch.equal(once[name], again[name]) for name in once) and not torch.equal(once["loss"], other["loss"])
    torch.manual_seed(5)
    drawn = run(seed=None)
    torch.manual_seed(5)
    assert torch.equal(run(seed=None)["loss"], drawn["loss"]) and not torch.equal(run(seed=None)["loss"], drawn["loss"])


@needs_native
def test_native_gives_the_same_bits_on_any_number_of_threads(sampling_pays):
    inputs = make_inputs("realistic", 150, 9000, 100, 70)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(distillation_loss, inputs, 1.0, backend="native", **{**NEVER, "column_fraction": 0.1}))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], result[name]) for result in results for name in result)


@needs_native
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_kernels_of_every_instruction_set(sampling_pays, draws, monkeypatch, dtype, isa):
    """Several slices, blocks and panels, all of them ragged."""
    monkeypatch.setattr(native, "INSTRUCTION_SET", isa)
    inputs = make_inputs("realistic", 97, 9001, 100, 70, dtype=dtype)
    got = with_gradients(distillation_loss, inputs, 1.0, backend="native", **{**NEVER, "column_fraction": 0.1})
    ((drawn, weights, *_),) = draws
    want = estimated(inputs, drawn, weights, backend="native")
    assert relative(got["loss"], want.loss.sum()) <= {torch.float32: 1e-5}.get(dtype, 1e-4)
    dz = want.dz * weights.double()
    bound = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative(got["d_student_hidden"], dz @ inputs.student_weight.double()[drawn]) <= bound


@on_all
def test_where_sampling_does_not_pay_the_exact_loss_runs(backend):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)  # of a few tokens and entries
    exact = with_gradients(distillation_loss, inputs, 1.0, backend=backend)
    got = with_gradients(distillation_loss, inputs, 1.0, backend=backend, **SWEPT)
    assert all(torch.equal(got[name], exact[name]) for name in exact)
    _, stats = distillation_loss_and_stats(*inputs[:4], backend=backend, **SWEPT)
    assert stats.divergence_error is None and stats.recomputed is None


@on_all
def test_checkpointed_and_compiled(sampling_pays, backend):
    inputs = make_inputs("realistic", TOKENS, VOCABULARY)
    teacher = prepare_head(inputs.teacher_weight)

    def loss(hidden):
        return distillation_loss(hidden, inputs.student_weight, inputs.teacher_hidden, teacher, backend=backend, **NEVER)

    results = []
    for function in (
        loss,
        lambda hidden: checkpoint(loss, hidden, use_reentrant=False),
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
    ):
        hidden = inputs.student_hidden.clone().requires_grad_()
        value = function(hidden)
        value.backward()
        results.append((value.detach(), hidden.grad))
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])


@on_all
def test_plan_counts_the_sweep(backend, monkeypatch):
    monkeypatch.setattr(worthwhile, "LEAST_VOCABULARY", 1)
    made = plan(512, 129280, 576, 576, column_fraction=0.08, sweep="int8", backend=backend)
    assert made.schedule == "swept" and made.quantised_bytes == 2 * 129280 * (576 + 12)
    assert "quantised" in str(made) and "int8 sweep" in made.reason
    exact = plan(512, 129280, 576, 576, column_fraction=0.08, backend=backend)
    assert exact.quantised_bytes == 0 and made.workspace_bytes < exact.workspace_bytes
    if backend == "native":
        assert made.workspace_bytes <= 48 * 2**20
