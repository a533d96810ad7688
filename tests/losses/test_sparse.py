"""Losses of sparse teachers against the float64 reference and against formulas of their own, on the torch and native backends."""

import math

import pytest
import torch
from accuracy import BACKENDS, DIVERGENCES, FAMILIES, make_labels
from sparse_cases import TAILS, TOKENS, VOCABULARY, check_sparse, everything, make_case, results_of
from torch.nn.functional import cross_entropy, kl_div

from distill_kernels import distillation_loss, divergences, reference, sparse_distillation_loss

pytestmark = pytest.mark.covering(2)
BOTH = pytest.mark.parametrize("backend", BACKENDS)
EACH = pytest.mark.parametrize("tail", TAILS)
ALL = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
TWO = pytest.mark.parametrize("divergence", ["forward_kl", divergences.jensen_shannon(0.3)], ids=str)
PER_TOKEN = torch.randn(TOKENS, generator=torch.Generator().manual_seed(0))


@BOTH
@EACH
@ALL
def test_divergence_matches_reference(divergence, tail, backend):
    check_sparse(make_case("moderate"), divergence=divergence, tail=tail, backend=backend, reduction="none", upstream=PER_TOKEN)


@BOTH
@EACH
@ALL
def test_divergence_with_every_option_matches_reference(divergence, tail, backend):
    case = make_case("realistic", bias=True, temperature=2.0)
    check_sparse(case, divergence=divergence, tail=tail, backend=backend, **everything(case))


@BOTH
@EACH
@TWO
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_match_reference(dtype, divergence, tail, backend):
    case = make_case("realistic", bias=True, temperature=2.0, dtype=dtype)
    options = everything(case)
    check_sparse(case, divergence=divergence, tail=tail, backend=backend, **options)
    options |= {"reduction": "none", "upstream": PER_TOKEN, "num_items": None}
    check_sparse(case, divergence=divergence, tail=tail, backend=backend, **options)


@EACH
@ALL
def test_float64_is_exact(divergence, tail):
    case = make_case("realistic", bias=True, temperature=2.0, dtype=torch.float64)
    check_sparse(case, divergence=divergence, tail=tail, backend="auto", **everything(case))
    check_sparse(case, divergence=divergence, tail=tail, backend="torch", reduction="none", upstream=PER_TOKEN)


@BOTH
@EACH
@TWO
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "equal"])
def test_input_family_matches_reference(family, divergence, tail, backend):
    case = make_case(family)
    options = {"labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 0.5, "reduction": "none", "upstream": PER_TOKEN}
    check_sparse(case, divergence=divergence, tail=tail, backend=backend, **options)


@BOTH
@EACH
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "options", [{}, {"ce_weight": 1.0, "kd_weight": 0.0}, {"z_loss_weight": 0.1}, {"temperature_squared": False}], ids=str
)
def test_option_matches_reference(options, temperature, tail, backend):
    case = make_case("moderate", temperature=temperature)
    labels = make_labels(TOKENS, VOCABULARY) if "ce_weight" in options else None
    check_sparse(case, tail=tail, backend=backend, temperature=temperature, labels=labels, **options)


@BOTH
@EACH
def test_any_entries_may_be_listed(tail, backend):
    check_sparse(make_case("moderate", top=False), tail=tail, backend=backend, divergence="reverse_kl")


@BOTH
@EACH
@pytest.mark.parametrize(
    "tokens, vocabulary, dim, width", [(1, 1, 1, 1), (1, 2, 3, 1), (5, 97, 7, 97), (70, 2500, 20, 40), (130, 1200, 9, 3)]
)
def test_ragged_sizes_match_reference(tokens, vocabulary, dim, width, tail, backend):
    # Panels of tokens, slices of the vocabulary, and lists that fill neither. One token or feature is one draw of luck for eager.
    case = make_case("grid", tokens, vocabulary, dim, width, bias=True, ragged=tokens > 1, temperature=2.0)
    check_sparse(case, tail=tail, backend=backend, divergence=divergences.jensen_shannon(0.3), slack=4, **everything(case))


@BOTH
@EACH
def test_several_chunks_match_reference(tail, backend):
    case = make_case("moderate", 300, 3000, 16, 9, bias=True)
    check_sparse(case, tail=tail, backend=backend, workspace_mib=2, **everything(case) | {"temperature": 1.0})
    check_sparse(case, tail=tail, backend=backend, workspace_mib=2, reduction="none", upstream=torch.linspace(-1, 2, 300))


def whole(case, log_p):
    """The case with every entry listed, in the vocabulary's order."""
    return case._replace(ids=torch.arange(log_p.shape[-1]).expand_as(log_p).contiguous(), logprobs=log_p)


@BOTH
@ALL
@EACH
def test_list_of_everything_is_the_whole_loss(divergence, tail, backend):
    case = make_case("moderate", 9, 80, 12, 5)
    teacher = make_case("moderate", 9, 80, 12, 5, seed=1)
    log_p = reference.logits(teacher.hidden, teacher.weight).log_softmax(-1).float()  # of which 1 − Σ p is rounding
    options = {"divergence": divergence, "backend": backend, "labels": make_labels(9, 80), "ce_weight": 0.3}
    got = results_of(sparse_distillation_loss, whole(case, log_p), 1.7, tail=tail, **options)

    def dense(hidden, weight, ids, logprobs, **options):
        return distillation_loss(hidden, weight, teacher.hidden, teacher.weight, **options)

    want = results_of(dense, case, 1.7, **options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-5, atol=2e-6 * float(want[name].abs().max()))


# Formulas in probability space, from logits in memory, for what other trainers compute.


def dense_student(case):
    leaves = [tensor.double().requires_grad_() for tensor in (case.hidden, case.weight)]
    return leaves, leaves[0] @ leaves[1].T


def same(case, loss, leaves, **options):
    got = results_of(sparse_distillation_loss, case, 1.7, **options)
    gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, 1.7))
    for value, want in zip(got.values(), (loss.detach(), *gradients), strict=True):
        torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@BOTH
@pytest.mark.parametrize("renormalised", [False, True])
def test_ignored_tail_is_the_top_k_loss_of_trainers(renormalised, backend):
    """Σ p_k (log p_k − log q_k) with q of the whole vocabulary, p renormalised or not, averaged over tokens; value and gradient are both
    multiplied by temperature²."""
    temperature = 2.0
    case = make_case("moderate", ragged=False, temperature=temperature)
    if renormalised:
        case = case._replace(logprobs=case.logprobs.log_softmax(-1))
    leaves, z = dense_student(case)
    q = (z / temperature).softmax(-1).gather(-1, case.ids)
    p = case.logprobs.double().exp()
    loss = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    same(case, loss, leaves, tail="ignore", temperature=temperature, backend=backend)


@BOTH
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_bucket_is_the_top_k_loss_with_a_tail_of_trainers(beta, backend):
    """k + 1 outcomes, the last 1 − Σ of each model; β as in GKD: 0 is forward KL, 1 is reverse KL."""
    case = make_case("moderate", ragged=False)
    leaves, z = dense_student(case)
    q, p = z.softmax(-1).gather(-1, case.ids), case.logprobs.double().exp()
    q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q, p))
    m = beta * p + (1 - beta) * q
    if beta in (0.0, 1.0):
        pair = (q, p) if beta == 0.0 else (p, q)
        loss = kl_div(pair[0].log(), pair[1], reduction="batchmean")
    else:
        loss = beta * kl_div(m.log(), p, reduction="batchmean") + (1 - beta) * kl_div(m.log(), q, reduction="batchmean")
    divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta) or divergences.jensen_shannon(beta)
    same(case, loss, leaves, tail="bucket", divergence=divergence, backend=backend)


@BOTH
def test_renormalised_is_a_softmax_over_the_list(backend):
    """Of logits gathered at the teacher's top k; and p of another temperature, which its own logits would have given."""
    case = make_case("moderate", ragged=False)
    leaves, z = dense_student(case)
    temperature = 2.0
    want = torch.softmax(case.logprobs.double() / temperature, -1)
    loss = kl_div((z.gather(-1, case.ids) / temperature).log_softmax(-1), want, reduction="batchmean") * temperature**2
    same(case, loss, leaves, tail="renormalise", temperature=temperature, teacher_temperature=1.0, backend=backend)


@BOTH
@EACH
def test_cross_entropy_alone_is_torchs(tail, backend):
    case = make_case("moderate")
    labels = make_labels(TOKENS, VOCABULARY)
    leaves, z = dense_student(case)
    loss = cross_entropy(z, labels)
    same(case, loss, leaves, tail=tail, labels=labels, ce_weight=1.0, kd_weight=0.0, backend=backend)


@BOTH
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "squared_hellinger"])
def test_tiny_bucket_keeps_its_digits(divergence, backend):
    """Nearly all the probability is listed: 1e-9 is left to the student and 3e-9 to the teacher, of which float32 has no 1 − Σ."""
    case = make_case("moderate", 6, 400, 8, 4, ragged=False)
    student = torch.zeros(6, 400)
    student.scatter_(1, case.ids, 26.0)
    mass = torch.full((6,), 3e-9)
    case = case._replace(hidden=student, weight=torch.eye(400), logprobs=torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(6, 4).contiguous())
    options = {"tail": "bucket", "divergence": divergence, "reduction": "sum", "teacher_tail_mass": mass, "backend": backend}
    got = results_of(sparse_distillation_loss, case, 1.7, **options)
    options.pop("backend")
    truth = results_of(reference.sparse_distillation_loss, case.to(torch.float64), 1.7, **options)
    others = torch.ones_like(student, dtype=torch.bool).scatter_(1, case.ids, False)
    # d_hidden is the gradient of the logits here: of the others it is their share of the bucket.
    assert 1e-13 < truth["d_hidden"][others].abs().max() < 1e-10
    assert (got["d_hidden"][others].double() / truth["d_hidden"][others] - 1).abs().max() < 1e-5
    torch.testing.assert_close(got["loss"].double(), truth["loss"], rtol=1e-6, atol=0)


@BOTH
@EACH
def test_row_without_entries_has_a_cross_entropy_only(tail, backend):
    case = make_case("moderate")
    labels = make_labels(TOKENS, VOCABULARY, masked=0.0)
    options = {"tail": tail, "labels": labels, "reduction": "none", "backend": backend}
    assert (case.ids[1] < 0).all()
    kd = results_of(sparse_distillation_loss, case, 1.0, **options)
    assert kd["loss"][1] == 0 and not kd["d_hidden"][1].any() and kd["d_hidden"][2:].any(-1).sum() >= TOKENS - 3
    both = results_of(sparse_distillation_loss, case, 1.0, ce_weight=0.5, **options)
    nll = cross_entropy(case.hidden[1] @ case.weight.T, labels[1])
    torch.testing.assert_close(both["loss"][1], 0.5 * nll)
    assert both["d_hidden"][1].any()


@BOTH
@EACH
def test_probability_of_zero_is_a_number(tail, backend):
    """−inf among the log-probabilities, and −inf among the student's logits, listed and not."""
    case = make_case("moderate", bias=True, ragged=False)
    case.logprobs[3, 2] = -math.inf
    case.bias[case.ids[4, 1]] = case.bias[case.ids[5].max() - 1] = -math.inf
    for divergence in ("forward_kl", "reverse_kl", divergences.jensen_shannon(0.3)):
        got = results_of(sparse_distillation_loss, case, 1.7, tail=tail, divergence=divergence, reduction="sum", backend=backend)
        assert all(value.isfinite().all() for value in got.values())
        truth = results_of(
            reference.sparse_distillation_loss, case.to(torch.float64), 1.7, tail=tail, divergence=divergence, reduction="sum"
        )
        torch.testing.assert_close(got["loss"].double(), truth["loss"], rtol=1e-5, atol=0)


def test_divergence_of_ones_own_runs_natively():
    @divergences.register
    def square_of_sparse_test(log_p, log_q):
        gap = divergences.exp(log_q) - divergences.exp(log_p)
        return gap * gap, 2 * divergences.exp(log_q) * gap

    try:
        case = make_case("moderate", dtype=torch.float64)
        check_sparse(case, tail="bucket", divergence="square_of_sparse_test", backend="torch")
        single = case.to(torch.float32)
        got, want = (
            results_of(sparse_distillation_loss, single, 1.7, tail="bucket", divergence="square_of_sparse_test", backend=backend)
            for backend in ("auto", "torch")
        )
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    finally:
        del divergences.FAMILIES["square_of_sparse_test"]
