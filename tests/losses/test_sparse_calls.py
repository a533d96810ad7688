"""Calls of sparse_distillation_loss and selected_logprobs: what is refused, masked, compiled, accumulated; and log-probabilities."""

import math
import warnings

import pytest
import torch
from accuracy import BACKENDS, assert_as_good_as_eager, make_labels, make_token_weight
from document_blocks import run_python_blocks
from sparse_cases import TAILS, TOKENS, VOCABULARY, everything, make_case, results_of

import distill_kernels
from distill_kernels import backends, plan, reference, selected_logprobs, sparse_distillation_loss, token_logprobs
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem, Tensors, as_text
from distill_kernels.ops import listed_entries

pytestmark = pytest.mark.covering(2)
BOTH = pytest.mark.parametrize("backend", BACKENDS)
EACH = pytest.mark.parametrize("tail", TAILS)
CASE = make_case("moderate", bias=True)
FULL = make_case("moderate", ragged=False)
LABELS = make_labels(TOKENS, VOCABULARY)


def loss_of(case=FULL, **options):
    return sparse_distillation_loss(*case[:2], *case[3:], **{"tail": "bucket"} | options)


# Log-probabilities


def logprobs_with_gradients(function, case, dtype, **options):
    hidden, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in case[:3])
    logprobs, rest = function(hidden, weight, case.ids, bias=bias, **options)
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(made.shape, generator=generator, dtype=torch.float64).to(made.dtype) for made in (logprobs, rest)]
    return [logprobs.detach(), rest.detach(), *torch.autograd.grad([logprobs, rest], [hidden, weight, bias], upstream)]


def eager_logprobs(hidden, weight, token_ids, *, bias, logit_scale=1.0, softcap=None, temperature=1.0):
    z = (hidden @ weight.T + bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_q = (z / temperature).log_softmax(-1)
    there = token_ids >= 0
    at = token_ids.clamp(min=0)
    listed = torch.zeros_like(log_q).scatter_add(-1, at, there.float()) > 0
    rest = torch.where(listed, -1e6, log_q).logsumexp(-1)
    return torch.where(there, log_q.gather(-1, at), 0), torch.where(there.any(-1), rest, 0)


@BOTH
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "softcap": 9.0, "logit_scale": 0.7}], ids=["plain", "everything"])
@pytest.mark.parametrize("family", ["moderate", "peaked", "huge", "realistic"])
def test_selected_logprobs_match_reference(family, options, backend):
    case = make_case(family, 70, 700, bias=True, top=False)
    truth = logprobs_with_gradients(reference.selected_logprobs, case, torch.float64, **options)
    eager = logprobs_with_gradients(eager_logprobs, case, torch.float32, **options)
    got = logprobs_with_gradients(selected_logprobs, case, torch.float32, backend=backend, **options)
    for name, *values in zip(("logprobs", "rest", "d_hidden", "d_weight", "d_bias"), got, eager, truth, strict=True):
        # One order of eager's sums, not the best of four.
        assert_as_good_as_eager(name, *values, gradient=name.startswith("d_"), slack=2)


@BOTH
def test_one_id_is_what_token_logprobs_gives(backend):
    hidden, weight, ids = FULL.hidden, FULL.weight, FULL.ids[:, :1]
    one, _ = token_logprobs(hidden, weight, ids[:, 0], temperature=1.5, backend=backend)
    several, rest = selected_logprobs(hidden, weight, ids, temperature=1.5, backend=backend)
    torch.testing.assert_close(several[:, 0], one)
    torch.testing.assert_close(rest, torch.log1p(-one.exp()), rtol=1e-4, atol=1e-5)


@BOTH
def test_rest_keeps_its_digits_where_next_to_nothing_is_left(backend):
    ids = torch.arange(3).expand(2, 3).contiguous()
    hidden = torch.zeros(2, 500)
    hidden[:, :3] = torch.tensor([40.0, 41.0, 39.5])
    _, rest = selected_logprobs(hidden, torch.eye(500), ids, backend=backend)
    want = math.log(497) - torch.tensor([40.0, 41.0, 39.5], dtype=torch.float64).exp().add(0).sum().add(497).log()
    torch.testing.assert_close(rest.double(), want.expand(2), rtol=1e-6, atol=0)
    assert rest[0] < -34


@BOTH
def test_list_of_everything_leaves_a_rest_of_the_floor(backend):
    _, rest = selected_logprobs(torch.randn(2, 5), torch.randn(7, 5), torch.arange(7).expand(2, 7).contiguous(), backend=backend)
    assert (rest == distill_kernels.divergences.LOG_PROBABILITY_FLOOR).all()


@BOTH
@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_all_logits_may_be_far_from_zero(shift, backend):
    """There is nothing else that the largest could be taken from, where everything is listed."""
    bias = torch.full((7,), shift)
    hidden, weight, ids = torch.randn(2, 5), torch.randn(7, 5), torch.arange(7).expand(2, 7).contiguous()
    for listed in (ids, ids[:, :3]):
        logprobs, _ = selected_logprobs(hidden, weight, listed, bias=bias, backend=backend)
        want = (hidden @ weight.T).log_softmax(-1)[:, : listed.shape[1]]
        torch.testing.assert_close(logprobs, want, rtol=0, atol=1e-4)  # float32 has 3e-5 at 500


@BOTH
def test_log_probability_below_the_floor_is_a_constant(backend):
    hidden, bias = torch.randn(2, 5, requires_grad=True), torch.zeros(7)
    weight, ids = torch.randn(7, 5), torch.tensor([[0, 1], [2, 1]])
    bias[1] = -2e4
    logprobs, rest = selected_logprobs(hidden, weight, ids, bias=bias, backend=backend)
    assert (logprobs[:, 1] == distill_kernels.divergences.LOG_PROBABILITY_FLOOR).all() and (logprobs[:, 0] > -100).all()
    assert not torch.autograd.grad(logprobs[:, 1].sum(), hidden, retain_graph=True)[0].any()
    assert torch.autograd.grad(logprobs[:, 0].sum(), hidden, retain_graph=True)[0].any(-1).all()
    bias = torch.tensor([0.0, 0.0, 0.0, -2e4, -2e4, -2e4, -2e4])
    logprobs, rest = selected_logprobs(hidden, weight, torch.tensor([[0, 1, 2]] * 2), bias=bias, backend=backend)
    assert (rest == distill_kernels.divergences.LOG_PROBABILITY_FLOOR).all()
    assert not torch.autograd.grad(rest.sum(), hidden)[0].any()


@BOTH
def test_only_one_output_may_be_used(backend):
    hidden = CASE.hidden.clone().requires_grad_()
    logprobs, rest = selected_logprobs(hidden, CASE.weight, CASE.ids, backend=backend)
    first = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0]
    second = torch.autograd.grad(rest.sum(), hidden, retain_graph=True)[0]
    both = torch.autograd.grad(logprobs.sum() + rest.sum(), hidden)[0]
    torch.testing.assert_close(first + second, both, rtol=1e-4, atol=1e-5)


# Masks


@BOTH
@EACH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_tokens_may_hold_anything(reduction, tail, backend):
    options = {"tail": tail, "labels": LABELS, "ce_weight": 0.3, "reduction": reduction, "backend": backend}
    clean = results_of(sparse_distillation_loss, CASE, 1.7, **options)
    masked = LABELS < 0
    dirty = CASE._replace(
        hidden=CASE.hidden.masked_fill(masked[:, None], math.nan),
        ids=CASE.ids.masked_fill(masked[:, None], 10**6),
        logprobs=CASE.logprobs.masked_fill(masked[:, None], math.nan),
    )
    got = results_of(sparse_distillation_loss, dirty, 1.7, **options)
    assert all(torch.equal(got[name], clean[name]) for name in clean)
    assert not clean["d_hidden"][masked].any() and clean["d_hidden"][~masked].any(-1).all()


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_masked_is_zero_attached_to_the_graph(reduction, backend):
    got = results_of(
        sparse_distillation_loss, CASE, 1.7, tail="bucket", labels=torch.full_like(LABELS, -100), reduction=reduction, backend=backend
    )
    assert all((value == 0).all() for value in got.values())
    nothing = make_case("moderate", bias=True)._replace(ids=torch.full_like(CASE.ids, -1))
    got = results_of(sparse_distillation_loss, nothing, 1.7, tail="renormalise", reduction=reduction, backend=backend)
    assert all((value == 0).all() for value in got.values())


@BOTH
def test_no_tokens_are_no_loss(backend):
    empty = FULL._replace(hidden=FULL.hidden[:0], ids=FULL.ids[:0], logprobs=FULL.logprobs[:0])
    got = results_of(sparse_distillation_loss, empty, 1.7, tail="ignore", reduction="sum", backend=backend)
    assert got["loss"] == 0 and not got["d_weight"].any()
    logprobs, rest = selected_logprobs(FULL.hidden[:0], FULL.weight, FULL.ids[:0], backend=backend)
    assert logprobs.shape == (0, FULL.ids.shape[1]) and rest.shape == (0,)


def test_masked_tokens_and_frozen_sides_cost_nothing(monkeypatch):
    """Rows that the products see, and gradients that are allocated."""
    from distill_kernels.products import Products

    rows, d_hidden, d_weight = [], [], []
    for name, into in (("logits", rows), ("d_hidden", d_hidden), ("d_weight", d_weight)):
        real = getattr(Products, name)

        def record(self, *args, into=into, real=real):
            into.append(len(args[0]))
            return real(self, *args)

        monkeypatch.setattr(Products, name, record)
    head = FULL.weight.clone().requires_grad_()
    loss = sparse_distillation_loss(FULL.hidden, head, *FULL[3:], LABELS, tail="bucket", backend="torch")
    loss.backward()
    assert sum(rows) == int((LABELS >= 0).sum()) < TOKENS and not d_hidden and len(d_weight) == 1
    loss_of(case=FULL._replace(hidden=FULL.hidden.clone().requires_grad_()), backend="torch").backward()
    assert len(d_hidden) == 1 and len(d_weight) == 1
    with torch.no_grad():
        loss_of(case=FULL._replace(hidden=FULL.hidden.clone().requires_grad_()), backend="torch")
    assert len(d_hidden) == 1


# Accumulation, determinism, autograd


@BOTH
def test_accumulation_over_parts_is_one_batch(backend):
    options = everything(CASE) | {"tail": "bucket", "backend": backend}
    items = torch.tensor(int((options["labels"] >= 0).sum()))
    whole = results_of(sparse_distillation_loss, CASE, 1.7, **options | {"num_items": items})
    parts = []
    for part in (slice(0, 9), slice(9, None)):
        some = CASE._replace(hidden=CASE.hidden[part], ids=CASE.ids[part], logprobs=CASE.logprobs[part])
        own = {name: options[name][part] for name in ("labels", "token_weight")}
        parts.append(results_of(sparse_distillation_loss, some, 1.7, **options | own | {"num_items": items}))
    torch.testing.assert_close(parts[0]["loss"] + parts[1]["loss"], whole["loss"])
    torch.testing.assert_close(parts[0]["d_weight"] + parts[1]["d_weight"], whole["d_weight"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([part["d_hidden"] for part in parts]), whole["d_hidden"], rtol=1e-4, atol=1e-6)
    mean = results_of(sparse_distillation_loss, CASE, 1.7, **options | {"num_items": None})
    assert torch.equal(mean["loss"], whole["loss"])


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_from_run_to_run_and_on_any_number_of_threads(reduction, backend):
    case = make_case("moderate", 150, 2600, 30, bias=True)
    options = everything(case) | {"num_items": None, "reduction": reduction, "backend": backend}
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 1) if backend == "native" else (before, before):
            torch.set_num_threads(threads)
            results.append(results_of(sparse_distillation_loss, case, 1.7, tail="bucket", **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@BOTH
def test_order_of_a_list_does_not_matter(backend):
    turned = FULL._replace(ids=FULL.ids.flip(-1), logprobs=FULL.logprobs.flip(-1))
    got, other = (results_of(sparse_distillation_loss, case, 1.7, tail="bucket", backend=backend) for case in (FULL, turned))
    for name in got:
        torch.testing.assert_close(got[name], other[name], rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_is_right_and_second_derivatives_are_refused(reduction, backend):
    hidden = FULL.hidden.clone().requires_grad_()
    loss = loss_of(FULL._replace(hidden=hidden), reduction=reduction, backend=backend).sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    (2 * loss).backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, 2 * first)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        gradient.sum().backward()
    logprobs, _ = selected_logprobs(hidden, FULL.weight, FULL.ids, backend=backend)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        gradient.sum().backward()


@BOTH
def test_leading_dimensions_and_strides_are_as_good(backend):
    flat = results_of(sparse_distillation_loss, FULL, 1.7, tail="bucket", backend=backend)
    wide = torch.full((TOKENS, 2 * FULL.ids.shape[1]), -1)
    wide[:, ::2] = FULL.ids
    head = FULL.weight.T.contiguous().T
    hidden = FULL.hidden.clone().requires_grad_()
    loss = sparse_distillation_loss(
        hidden.view(3, 7, -1), head, wide[:, ::2].unflatten(0, (3, 7)), FULL.logprobs.view(3, 7, -1), tail="bucket", backend=backend
    )
    torch.testing.assert_close(loss.detach(), flat["loss"])
    (gradient,) = torch.autograd.grad(loss, hidden, torch.tensor(1.7))
    torch.testing.assert_close(gradient, flat["d_hidden"], rtol=1e-5, atol=1e-7)
    per_token = sparse_distillation_loss(
        hidden.view(3, 7, -1), head, FULL.ids.view(3, 7, -1), FULL.logprobs.view(3, 7, -1), tail="bucket", reduction="none", backend=backend
    )
    assert per_token.shape == (3, 7)
    logprobs, rest = selected_logprobs(hidden.view(3, 7, -1), head, FULL.ids.view(3, 7, -1), backend=backend)
    assert logprobs.shape == (3, 7, FULL.ids.shape[1]) and rest.shape == (3, 7)


@BOTH
def test_autocast_casts_as_a_linear_layer_does(backend):
    options = {"tail": "bucket", "labels": LABELS, "ce_weight": 0.5, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        got = results_of(sparse_distillation_loss, FULL, 1.7, **options)
        logprobs, _ = selected_logprobs(FULL.hidden, FULL.weight, FULL.ids, backend=backend)
    want = results_of(sparse_distillation_loss, FULL.to(torch.bfloat16), 1.7, **options)
    assert torch.equal(got["loss"], want["loss"]) and got["loss"].dtype is torch.float32
    assert torch.equal(got["d_weight"], want["d_weight"].float())
    assert torch.equal(logprobs, selected_logprobs(FULL.hidden.bfloat16(), FULL.weight.bfloat16(), FULL.ids, backend=backend)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction):
    def step(hidden, weight, ids, logprobs, labels):
        loss = sparse_distillation_loss(hidden, weight, ids, logprobs, labels, tail="bucket", ce_weight=0.5, reduction=reduction)
        chosen, rest = selected_logprobs(hidden, weight, ids)
        return loss.sum() + 0.1 * (chosen.sum() + rest.sum())

    def run(function):
        hidden, weight = (tensor.clone().requires_grad_() for tensor in CASE[:2])
        loss = function(hidden, weight, *CASE[3:], LABELS)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(step), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="once in a row"):
        compiled(*FULL[:2], FULL.ids[:, :1].expand(-1, 2).contiguous(), FULL.logprobs[:, :2], LABELS)


@pytest.mark.parametrize("deferred", [False, True])
def test_ops_pass_torchs_own_checks(deferred):
    hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in CASE[:3])
    coefficients = torch.rand(TOKENS, 3)
    tensors = Tensors(hidden, weight, bias, None, None, None, LABELS.clamp(min=0), coefficients)
    options = Options(tail="bucket", backend="torch", temperature=2.0)
    call, numbers = as_text(Problem.of(tensors, options, cross_entropy=True, z_loss=True, d_bias=True, deferred=deferred))
    lists = FULL.ids, FULL.logprobs, None
    torch.library.opcheck(listed_entries.terms, (*tensors[:3], *lists, tensors.labels, coefficients, numbers, call))
    call, _ = as_text(Problem.of(tensors, options, kd=False, d_bias=True, deferred=True))
    torch.library.opcheck(listed_entries.logprobs, (*tensors[:3], CASE.ids, None, call))


# Cost


def test_plan_says_what_it_costs():
    made = plan(1024, 20_000, 64, 0, listed=32, backend="native")
    once = 2 * 1024 * 20_000 * 64
    assert made.schedule == "chunked" and (made.forward_flops, made.backward_flops) == (once, 2 * once)
    none = plan(1024, 20_000, 64, 0, listed=32, reduction="none", backend="native")
    assert none.forward_flops + none.backward_flops == 4 * once
    forward = plan(1024, 20_000, 64, 0, listed=32, hidden_gradient=False, weight_gradient=False, backend="native")
    assert forward.schedule == "tile-fused" and forward.backward_flops == 0
    assert forward.workspace_bytes < 4 * 20_000 * 1024 / 2  # no logits
    wider = plan(1024, 20_000, 64, 0, listed=64, backend="native")
    assert wider.chunk_tokens == made.chunk_tokens and wider.workspace_bytes > made.workspace_bytes
    with pytest.raises(ValueError, match="listed=3 entries take the place of the teacher's head"):
        plan(10, 100, 8, 8, listed=3)
    with pytest.raises(ValueError, match="listed must be an int of at least 0, got -1"):
        plan(10, 100, 8, 0, listed=-1)


def test_backend_without_kernels_for_lists_says_so(monkeypatch):
    backend = backends.load("torch")
    monkeypatch.delattr(backend, "run_listed")
    with pytest.raises(NotImplementedError, match="backend 'torch' cannot run this: it has no kernels for entries that tokens list"):
        loss_of(backend="torch")
    fields = {"tokens": 1, "vocabulary": 2, "student_dim": 1, "teacher_dim": 0, "student_dtype": torch.float32}
    options = Options(backend="torch")
    problem = Problem(**fields, teacher_dtype=torch.float32, device=torch.device("cpu"), options=options, kd=False, cross_entropy=True)
    assert backends.choose(problem) is backend


# What is refused


def changed(**changes):
    return lambda: loss_of(**changes)


def with_ids(change):
    ids = FULL.ids.clone()
    change(ids)
    return FULL._replace(ids=ids)


def with_logprobs(value, at=(4, 2)):
    logprobs = FULL.logprobs.clone()
    logprobs[at] = value
    return FULL._replace(logprobs=logprobs)


REFUSED = {
    "no tail": (lambda: sparse_distillation_loss(*FULL[:2], *FULL[3:]), TypeError, "tail"),
    "unknown tail": (changed(tail="drop"), ValueError, "tail must be one of 'bucket', 'renormalise', 'ignore', got 'drop'"),
    "unknown divergence": (changed(divergence="kl"), ValueError, "unknown divergence 'kl'"),
    "id too large": (
        changed(case=with_ids(lambda ids: ids[4, 2].fill_(VOCABULARY))),
        ValueError,
        "teacher_ids must be at least 0 and below the vocabulary size 300, or -1 for none, got 300 in row 4",
    ),
    "id below -1": (changed(case=with_ids(lambda ids: ids[7, 0].fill_(-100))), ValueError, "or -1 for none, got -100 in row 7"),
    "id twice": (
        changed(case=with_ids(lambda ids: ids[5, 3].copy_(ids[5, 0]))), ValueError, "have -1, not an id, where a row has fewer, got",
    ),
    "ids of another dtype": (changed(case=FULL._replace(ids=FULL.ids.int())), TypeError, "teacher_ids must be int64, got torch.int32"),
    "ids of another shape": (
        changed(case=FULL._replace(ids=FULL.ids[:-1])), ValueError, r"at least one place for each token, shape \(21, 'K'\), got \(20, 11\)",
    ),
    "ids without places": (changed(case=FULL._replace(ids=FULL.ids[:, :0], logprobs=FULL.logprobs[:, :0])), ValueError, r"got \(21, 0\)"),
    "ids without a dimension": (changed(case=FULL._replace(ids=FULL.ids[:, 0])), ValueError, r"\(21, 'K'\), got \(21,\)"),
    "logprobs of another shape": (
        changed(case=FULL._replace(logprobs=FULL.logprobs[:, 1:])), ValueError, r"the shape of teacher_ids, \(21, 11\), got \(21, 10\)",
    ),
    "integer logprobs": (changed(case=FULL._replace(logprobs=FULL.ids)), TypeError, "teacher_logprobs must be float32"),
    "NaN": (changed(case=with_logprobs(math.nan)), ValueError, "teacher_logprobs must be logarithms of probabilities.*got nan in row 4"),
    "logits": (changed(case=with_logprobs(3.0)), ValueError, "those of a row must not sum to more than 1, got 20.* in row 4"),
    "a little too much": (
        changed(case=FULL._replace(logprobs=torch.full_like(FULL.logprobs, -2.3))), ValueError, "must not sum to more than 1, got 1.1",
    ),
    "no probability": (
        changed(case=with_logprobs(-math.inf, at=4), tail="renormalise"), ValueError, "must not all be −inf.* row 4",
    ),
    "teacher that requires grad": (
        changed(case=FULL._replace(logprobs=FULL.logprobs.clone().requires_grad_())), ValueError, "teacher_logprobs requires grad",
    ),
    "other temperature": (
        changed(temperature=2.0, teacher_temperature=1.0), ValueError, "temperature 1 and the loss is of 2: .*the whole distribution",
    ),
    "negative teacher_temperature": (changed(teacher_temperature=-1.0, tail="renormalise"), ValueError, "teacher_temperature must be"),
    "tail mass of another tail": (changed(tail="ignore", teacher_tail_mass=torch.zeros(TOKENS)), ValueError, "but tail is 'ignore'"),
    "tail mass above 1": (changed(teacher_tail_mass=torch.full((TOKENS,), 1.5)), ValueError, "must be a probability, got 1.5 in row 0"),
    "tail mass of another shape": (changed(teacher_tail_mass=torch.zeros(3)), ValueError, "teacher_tail_mass must have one entry for each"),
    "no labels": (changed(ce_weight=1.0), ValueError, "ce_weight is not 0 but labels is None"),
    "label out of range": (
        changed(labels=torch.full((TOKENS,), VOCABULARY), ce_weight=1.0), ValueError, "labels must be at least 0 and below",
    ),
    "nothing to compute": (changed(kd_weight=0.0), ValueError, "are all 0"),
    "num_items of a sum": (changed(num_items=3, reduction="sum"), ValueError, "num_items is the normaliser"),
    "weight that requires grad": (changed(token_weight=torch.ones(TOKENS, requires_grad=True)), ValueError, "token_weight gets no"),
    "unknown backend": (changed(backend="fast"), ValueError, "backend must be 'auto' or one of"),
    "workspace too small": (
        lambda: loss_of(make_case(tokens=2, vocabulary=300_000, dim=4, ragged=False), backend="torch", workspace_mib=1),
        ValueError, "workspace_mib=1 cannot hold",
    ),
    "selected ids twice": (
        lambda: selected_logprobs(*FULL[:2], FULL.ids[:, :1].expand(-1, 2)), ValueError, "token_ids must name each entry once",
    ),
    "selected ids out of range": (lambda: selected_logprobs(*FULL[:2], FULL.ids + 300), ValueError, "token_ids must be at least 0"),
    "selected ids of no dimension": (lambda: selected_logprobs(*FULL[:2], FULL.ids[:, 0]), ValueError, "token_ids must have at least one"),
    "selected at temperature 0": (lambda: selected_logprobs(*FULL[:2], FULL.ids, temperature=0.0), ValueError, "temperature must be"),
}  # fmt: skip


@pytest.mark.parametrize("decimals, noticed", [(1, True), (2, True), (3, False), (None, False)])
def test_rounded_log_probabilities_are_noticed(decimals, noticed):
    case = FULL if decimals is None else FULL._replace(logprobs=FULL.logprobs.round(decimals=decimals) - 0.1)
    case.logprobs[2, 1] = -math.inf  # which is no number that could have been rounded
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss_of(case)
        assert any("rounded to two decimals" in str(one.message) for one in said) == noticed
        # What is masked is not looked at.
        said.clear()
        loss_of(case, labels=torch.full((TOKENS,), -100))
        assert not said


@pytest.mark.parametrize("call, error, words", REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_rounded_log_probabilities_that_sum_to_a_little_more_than_one_are_a_tail_of_nothing():
    logprobs = torch.tensor([0.6, 0.42]).log().expand(TOKENS, 2).contiguous()
    case = FULL._replace(ids=FULL.ids[:, :2], logprobs=logprobs)
    got, want = loss_of(case), loss_of(case, teacher_tail_mass=torch.zeros(TOKENS))
    assert torch.equal(got, want) and got.isfinite()


@BOTH
def test_nan_of_the_student_is_not_lost(backend):
    """Also where it is of a listed entry alone, or of one that is not listed."""
    for entry in (int(FULL.ids[3, 0]), int((FULL.ids[3].max() + 1) % VOCABULARY)):
        weight = FULL.weight.clone()
        weight[entry, 0] = math.nan
        got = loss_of(FULL._replace(weight=weight), reduction="none", backend=backend)
        assert got.isnan().all()
    logprobs, rest = selected_logprobs(FULL.hidden * math.nan, FULL.weight, FULL.ids, backend=backend)
    assert logprobs.isnan().all() and rest.isnan().all()


def test_flawed_rows_are_nan_where_checks_would_wait_for_the_device(monkeypatch):
    """As on a GPU: the checks say nothing, and no other token is touched."""
    monkeypatch.setattr(distill_kernels.listed, "_refuse", lambda *args: None)
    clean = loss_of(reduction="none", backend="torch")
    ids, logprobs = FULL.ids.clone(), FULL.logprobs.clone()
    ids[0, 0], ids[1, 1], logprobs[2, 0], logprobs[3, 0] = VOCABULARY + 5, ids[1, 0], math.nan, 1.0
    hidden = FULL.hidden.clone().requires_grad_()
    for backend in ("torch", "auto"):
        got = loss_of(FULL._replace(hidden=hidden, ids=ids, logprobs=logprobs), reduction="none", backend=backend)
        assert got[:4].isnan().all()
        torch.testing.assert_close(got[4:].detach(), clean[4:])
        (gradient,) = torch.autograd.grad(got.sum(), hidden)
        assert gradient[:4].isnan().all() and gradient[4:].isfinite().all()
        made, rest = selected_logprobs(FULL.hidden, FULL.weight, ids, backend=backend)
        assert made[:2].isnan().all() and rest[:2].isnan().all() and made[2:].isfinite().all()


def test_blocks_of_the_page_run():
    assert run_python_blocks("docs/sparse-teachers.md", at_least=3)["loss"].isfinite()


def test_weights_of_tokens_scale_their_gradients():
    weight = make_token_weight(TOKENS)
    got = results_of(sparse_distillation_loss, FULL, 1.0, tail="bucket", token_weight=weight, reduction="sum")
    alone = results_of(sparse_distillation_loss, FULL, 1.0, tail="bucket", reduction="sum")
    torch.testing.assert_close(got["d_hidden"], alone["d_hidden"] * weight[:, None], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("largest", [-1e-9, -1e-6, -1e-3, -1.0])
def test_tail_of_a_peaked_teacher_keeps_its_digits(largest):
    """1 − Σ p in float32, of which the largest alone has none."""
    logprobs = torch.tensor([largest, -21.5, -23.0]).expand(TOKENS, 3).contiguous()
    case = FULL._replace(ids=FULL.ids[:, :3].contiguous(), logprobs=logprobs)
    mass = 1 - logprobs.double().exp().sum(-1)
    got, want = loss_of(case, divergence="reverse_kl"), loss_of(case, divergence="reverse_kl", teacher_tail_mass=mass)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@BOTH
def test_nan_is_not_lost_where_nothing_is_listed(backend):
    ids = torch.full_like(FULL.ids, -1)
    hidden = FULL.hidden.clone()
    hidden[3] = math.nan
    got = loss_of(FULL._replace(hidden=hidden, ids=ids), z_loss_weight=0.1, reduction="none", backend=backend)
    assert got[3].isnan() and got[4:].isfinite().all()
