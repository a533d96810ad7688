"""The cuda backend against the float64 reference: on a GPU if there is one and the extension was built, else its kernels in emulation."""

import dataclasses
import functools
import math

import pytest
import torch
from accuracy import (
    DIVERGENCES,
    assert_as_good_as_eager,
    check_loss,
    eager_stats,
    everything,
    make_inputs,
    make_labels,
    make_token_weight,
    moved,
    relative,
    with_gradients,
)
from cuda_emulated import DEVICE, ON_GPU
from thinned import paired

from distill_kernels import backends, distillation_loss, distillation_loss_and_stats, divergences, plan, reference, token_logprobs
from distill_kernels.backends import cuda as backend
from distill_kernels.backends.cuda import extension, launch
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem

pytestmark = pytest.mark.usefixtures("kernels")
TOKENS, VOCABULARY = 21, 300
ALL = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
BOTH = ["forward_kl", divergences.jensen_shannon(0.3)]  # one in one pass, and one in two
TWO = pytest.mark.parametrize("divergence", BOTH, ids=str)
ALL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=["float32", "bfloat16", "float16"])
# Gradients of logits are rounded to the 16-bit dtype of the inputs before their products, which eager does not do.
SLACK_16 = 2
REAL = extension.kernels


def with_limits(monkeypatch, **changed):
    limits = launch.limits(0)._replace(**changed)
    monkeypatch.setattr(launch, "limits", lambda index: limits)
    return limits


def check(inputs, **options):
    slack = options.pop("slack", 1) * (SLACK_16 if inputs.student_hidden.dtype.itemsize == 2 else 1)
    return check_loss(inputs, backend="cuda", device=DEVICE, slack=slack, **options)


def per_token(tokens=TOKENS):
    return torch.randn(tokens, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("divergence, dtype", paired(DIVERGENCES, ALL_DTYPES))
def test_divergence_with_every_option_matches_reference(divergence, dtype):
    check(make_inputs("realistic", bias=True, dtype=dtype), divergence=divergence, **everything(TOKENS, VOCABULARY))


@ALL
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


@pytest.mark.parametrize("options, divergence", paired(OPTIONS, BOTH))
def test_option_matches_reference(options, divergence):
    check(make_inputs("moderate"), divergence=divergence, **options)
    if not options.keys() & {"reduction", "num_items"}:
        check(make_inputs("moderate", bias=True), divergence=divergence, reduction="none", upstream=per_token(), **options)


@TWO
@pytest.mark.parametrize("family", ["flat", "moderate", "peaked", "huge", "realistic", "grid"])
def test_input_family_matches_reference(family, divergence):
    labels = make_labels(TOKENS, VOCABULARY)
    check(make_inputs(family), divergence=divergence, labels=labels, ce_weight=0.5, reduction="none", upstream=per_token())


def test_equal_teacher_gives_rounding_error_only():
    for divergence in ("forward_kl", "reverse_kl", divergences.jensen_shannon(0.3)):
        inputs = make_inputs("equal", bias=True).to(DEVICE)
        run = functools.partial(with_gradients, distillation_loss, upstream=1.7, backend="cuda", divergence=divergence, temperature=2.0)
        got, scale = run(inputs=inputs), run(inputs=inputs._replace(teacher_weight=inputs.teacher_weight.roll(1, 0)))
        for name, value in got.items():
            assert value.abs().max() <= 2e-6 * scale[name].abs().max(), name


# Rows that begin at every place within a vector, of less than one and of many; in a block, in clusters of every size, and held nowhere.
@pytest.mark.parametrize("vocabulary, divergence", paired([1, 2, 3, 4, 5, 7, 33, 129, 300, 301, 302, 303, 1000, 3001], BOTH))
def test_vocabulary_of_any_size_matches_reference(vocabulary, divergence):
    inputs = make_inputs("grid", 9, vocabulary, 5, 3, bias=True)
    check(inputs, divergence=divergence, slack=4, **everything(9, vocabulary))
    check(inputs.to(torch.bfloat16), divergence=divergence, slack=4, reduction="none", upstream=per_token(9))


# Shared memory of a block, the most blocks to a token; how many they are, and whether they hold a row of 76 vectors.
SHAPES = {
    "one block": (2**20, 1, 1, True),
    "two blocks that could be one": (2**20, 8, 2, True),
    "eight blocks": (1520 + 32 * 10, 8, 8, True),
    "two blocks that hold nothing": (1520, 2, 2, False),
    "one block that holds nothing": (1520, 1, 1, False),
}


@pytest.mark.skipif(ON_GPU, reason="the device's limits are its own")
@pytest.mark.parametrize("shared_bytes, most, cluster, holds", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("divergence", ["forward_kl", divergences.alpha_beta(0.2, 0.7)], ids=str)
def test_every_way_to_share_a_row_matches_reference(shared_bytes, most, cluster, holds, divergence, monkeypatch):
    limits = with_limits(monkeypatch, shared_bytes=shared_bytes, cluster=most, multiprocessors=1000, threads=32)
    shape = launch.row_shape(9, 301, 2, limits)
    assert shape.cluster == cluster and (shape.held_vectors > 0) == holds
    check(make_inputs("moderate", 9, 301, bias=True), divergence=divergence, **everything(9, 301))
    check(make_inputs("moderate", 9, 301, dtype=torch.float16), divergence=divergence)


@pytest.mark.parametrize("dtype, divergence", paired(ALL_DTYPES, BOTH))
def test_several_chunks_match_reference(dtype, divergence):
    tokens, vocabulary = 64, 3000
    inputs = make_inputs("moderate", tokens, vocabulary, 16, 24, dtype=dtype, bias=True)
    assert plan(tokens, vocabulary, 16, 24, dtype=dtype, device=DEVICE, backend="cuda", workspace_mib=1).chunks > 1
    check(inputs, divergence=divergence, workspace_mib=1, labels=make_labels(tokens, vocabulary), ce_weight=0.3)


def test_student_and_teacher_of_different_dtypes_match_reference():
    inputs = make_inputs("moderate")
    narrow = inputs._replace(teacher_hidden=inputs.teacher_hidden.bfloat16(), teacher_weight=inputs.teacher_weight.bfloat16())
    check(narrow)
    check(narrow, reduction="none", upstream=per_token())


@TWO
@pytest.mark.parametrize("which", ["student_bias", "teacher_bias"])
def test_entries_of_minus_infinity_match_reference(which, divergence):
    inputs = make_inputs("moderate", bias=True)
    getattr(inputs, which)[5:50] = -math.inf
    options = {"divergence": divergence, "labels": make_labels(TOKENS, VOCABULARY)}
    got = with_gradients(distillation_loss, inputs.to(DEVICE), 1.7, backend="cuda", **moved(options, DEVICE))
    truth = with_gradients(reference.distillation_loss, inputs.to(torch.float64), 1.7, **options)
    for name in truth:
        torch.testing.assert_close(got[name].cpu().double(), truth[name], rtol=2e-5, atol=2e-6 * truth[name].abs().max().item())


def test_entries_below_the_floor_match_reference():
    # A temperature so low that the spread of logits passes the floor of -10,000; most tokens have such entries, the first has none.
    inputs = make_inputs("huge")
    inputs.student_hidden[0] *= 1e-3
    inputs.teacher_hidden[0] *= 1e-3
    options = {"temperature": 0.05, "temperature_squared": False, "labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 0.1}
    for divergence in ("forward_kl", "reverse_kl", divergences.jensen_shannon(0.3)):
        check(inputs, divergence=divergence, label_smoothing=0.1, **options)
    untempered = {"temperature": 4.0, "student_logit_scale": 20.0, "label_smoothing": 0.1}
    check(make_inputs("huge"), **options | untempered)


@pytest.mark.parametrize("options", [{}, everything(TOKENS, VOCABULARY)], ids=["plain", "everything"])
@TWO
def test_stats_match_reference(divergence, options):
    inputs = make_inputs("realistic")
    options = {"divergence": divergence, **options}
    _, stats = distillation_loss_and_stats(*inputs.to(DEVICE)[:4], backend="cuda", **moved(options, DEVICE))
    names = ("divergence", "temperature", "labels", "label_smoothing", "student_logit_scale", "teacher_logit_scale", "student_softcap",
             "teacher_softcap")  # fmt: skip
    terms = {name: options[name] for name in names if name in options}
    _, truth = reference.distillation_terms(*inputs.to(torch.float64)[:4], **terms)
    eager = eager_stats(inputs, **terms)
    valid = stats.valid.cpu()
    for name, value in truth.items():
        got = getattr(stats, name).cpu()
        assert (got[~valid] == 0).all(), name
        assert_as_good_as_eager(name, got[valid], [stat[valid] for stat in eager[name]], value[valid])


@pytest.mark.parametrize("tied", ["student", "teacher"])
def test_agreement_is_of_the_first_of_equal_maxima(tied):
    """Rows that begin at every place within a vector: what comes before the whole ones and after them is taken before them."""
    tokens, vocabulary = 32, 301
    logits = torch.randint(0, 3, (tokens, vocabulary), generator=torch.Generator().manual_seed(0)).float()
    # Of entry 15's thread also entry 299, where a row begins three entries before a whole vector.
    logits[1::4] = 0.0
    logits[1::4, [15, 299]] = 2.0
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    alone = torch.nn.functional.one_hot(first, vocabulary).float()
    student, teacher = (logits, alone) if tied == "student" else (alone, logits)
    matrices = (x.to(DEVICE) for x in (torch.eye(tokens), student.T.contiguous(), torch.eye(tokens), teacher.T.contiguous()))
    _, stats = distillation_loss_and_stats(*matrices, backend="cuda")
    assert stats.top1_agreement.cpu().tolist() == [1.0] * tokens


@DTYPES
def test_token_logprobs_match_reference(dtype):
    inputs = make_inputs("moderate", dtype=dtype, bias=True)
    ids = make_labels(TOKENS, VOCABULARY)
    options = {"temperature": 1.5, "softcap": 20.0, "logit_scale": 1.3}
    results = []
    for function, device, to in ((token_logprobs, DEVICE, dtype), (reference.token_logprobs, "cpu", torch.float64)):
        hidden, weight, bias = (x.detach().to(device, to).clone().requires_grad_() for x in (inputs[0], inputs[1], inputs[4]))
        extra = {"backend": "cuda"} if function is token_logprobs else {}
        made = torch.stack(function(hidden, weight, ids.to(device), bias=bias, **options, **extra))
        (made * torch.linspace(-1, 2, made.numel(), device=device).view_as(made)).sum().backward()
        results.append([x.detach().cpu().double() for x in (made, hidden.grad, weight.grad, bias.grad)])
    for got, truth in zip(*results, strict=True):
        allowed = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert (got - truth).abs().max() <= allowed * truth.abs().max()


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_tokens_may_hold_anything(reduction, dtype):
    inputs = make_inputs("moderate", dtype=dtype).to(DEVICE)
    labels = make_labels(TOKENS, VOCABULARY).to(DEVICE)
    masked = labels == -100
    dirty = inputs._replace(student_hidden=inputs.student_hidden.clone(), teacher_hidden=inputs.teacher_hidden.clone())
    dirty.student_hidden[masked], dirty.teacher_hidden[masked] = math.nan, math.inf
    upstream = per_token() if reduction == "none" else 1.7
    options = {"labels": labels, "ce_weight": 0.2, "reduction": reduction, "backend": "cuda"}
    clean, got = (with_gradients(distillation_loss, x, upstream, **options) for x in (inputs, dirty))
    assert all(torch.equal(clean[name], got[name]) for name in clean)


def test_tokens_without_coefficients_get_zeros_where_they_are_not_left_out(kernels):
    """In a graph that is being captured none can be left out: the kernel itself passes over them."""
    inputs, labels = make_inputs("moderate", 9, 301), make_labels(9, 301)
    logits = inputs.student_hidden @ inputs.student_weight.T, inputs.teacher_hidden @ inputs.teacher_weight.T
    coefficients = torch.rand(9, 3) * (labels != -100)[:, None]
    for logit in logits:
        logit[labels == -100] = math.nan
    problem = dataclasses.replace(SIMPLE, tokens=9, vocabulary=301, cross_entropy=True, stats=True)
    tensors = [x.to(DEVICE) for x in (*logits, labels.clamp(min=-1), coefficients)]
    made = [torch.full(shape, math.nan, device=DEVICE) for shape in ((9, 3), (9, 6), (9, 301))]
    chunk = Chunk(tensors[2], tensors[3], made[0], made[1])
    launch.Launcher(problem, Nothing(tensors[0], None, None)).rows(chunk, tensors[0], tensors[1], made[2], None)
    for x in made:
        assert (x[labels == -100] == 0).all() and x[labels != -100].isfinite().all() and x[labels != -100].any()


@dataclasses.dataclass
class Chunk:
    labels: torch.Tensor
    coefficients: torch.Tensor
    terms: torch.Tensor
    stats: torch.Tensor


@dataclasses.dataclass
class Nothing:
    student_hidden: torch.Tensor
    student_bias: torch.Tensor | None
    teacher_bias: torch.Tensor | None


def test_all_tokens_masked_give_zeros():
    inputs = make_inputs("moderate").to(DEVICE)
    labels = torch.full((TOKENS,), -100, device=DEVICE)
    got = with_gradients(distillation_loss, inputs, 1.0, labels=labels, ce_weight=1.0, backend="cuda")
    assert all((value == 0).all() for value in got.values())


def test_nan_arrives():
    for name in ("student_hidden", "teacher_hidden"):
        inputs = make_inputs("moderate").to(DEVICE)
        getattr(inputs, name)[3] = math.nan
        for divergence in ("forward_kl", "total_variation"):
            loss = distillation_loss(*inputs[:4], divergence=divergence, reduction="none", backend="cuda")
            assert loss[3].isnan() and loss.isnan().sum() == 1


def test_float16_gradients_of_tiny_coefficients_do_not_underflow():
    inputs = make_inputs("moderate", dtype=torch.float16)
    upstream = 2.0**14  # a loss scaler's
    got = with_gradients(distillation_loss, inputs.to(DEVICE), upstream, num_items=10**6, backend="cuda")
    truth = with_gradients(reference.distillation_loss, inputs.to(torch.float64), upstream, num_items=10**6)
    for name in ("d_student_hidden", "d_student_weight"):
        assert relative(got[name].cpu(), truth[name]) < 2e-3, name


@DTYPES
def test_same_inputs_give_the_same_bits_in_any_order_of_threads(dtype, kernels):
    inputs = make_inputs("realistic", dtype=dtype, bias=True).to(DEVICE)
    options = {**moved(everything(TOKENS, VOCABULARY), DEVICE), "backend": "cuda"}
    results = []
    for seed in (0, 1, 2):
        if not ON_GPU:
            kernels.schedule(seed)
        results.append(with_gradients(distillation_loss, inputs, 1.7, **options))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


# Sampled columns


@DTYPES
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dim", [24, 23], ids=["rows of whole vectors", "ragged rows"])
def test_sampled_gradients_are_those_of_the_torch_backend(dtype, reduction, dim, sampling_pays, draws):
    """By the same draw. With "none" the columns of dz are kept for backward, and without go straight into the products' dtype."""
    inputs = make_inputs("moderate", TOKENS, VOCABULARY, dim, 40, dtype=dtype).to(DEVICE)
    upstream = per_token().to(DEVICE) if reduction == "none" else 1.7
    options = {"column_fraction": 0.1, "seed": 3, "reduction": reduction}
    truth, got = (with_gradients(distillation_loss, inputs, upstream, backend=name, **options) for name in ("torch", "cuda"))
    (wanted, *_), (drawn, *_) = draws
    assert torch.equal(wanted, drawn) and len(drawn) == 30
    bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for name in ("d_student_hidden", "d_student_weight"):
        assert truth[name].any() and relative(got[name], truth[name]) <= bound, name


def test_sampled_gradients_take_a_head_of_any_strides(sampling_pays):
    inputs = make_inputs("moderate", bias=True).to(DEVICE)
    options = {"backend": "cuda", "column_fraction": 0.1, "seed": 3}
    wide = inputs.student_weight.new_full((VOCABULARY, 29), math.nan)
    wide[:, 2:26] = inputs.student_weight
    truth = with_gradients(distillation_loss, inputs, 1.7, **options)
    for weight in (wide[:, 2:26], inputs.student_weight.T.contiguous().T):
        weight = weight.detach().requires_grad_()
        hidden = inputs.student_hidden.clone().requires_grad_()
        biases = {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
        loss = distillation_loss(hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, **biases, **options)
        for name, gradient in zip(("hidden", "weight"), torch.autograd.grad(1.7 * loss, (hidden, weight)), strict=True):
            torch.testing.assert_close(gradient, truth[f"d_student_{name}"])


# Traffic


def requested_bytes(tokens, vocabulary, *, passes, element, labels, bias, shape):
    """(read, written) of a launch of the row kernel in which every token counts: logits of both models, once where they are held, and
    a bias for each; dz and terms; and what each thread reads of its token: coefficients, of which the first tells that it counts."""
    reads = tokens * vocabulary * 8 * (1 if shape.held_vectors else passes) * (2 if bias else 1)
    reads += tokens * shape.cluster * launch.limits(0).threads * (4 + 12 + 8 * labels)
    return reads, tokens * vocabulary * element + tokens * 12


@pytest.mark.skipif(ON_GPU, reason="bytes are counted in the emulation")
@pytest.mark.parametrize("vocabulary", [300, 303, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_requested_bytes_equal_the_closed_form(vocabulary, dtype, kernels):
    tokens = 9
    inputs = make_inputs("moderate", tokens, vocabulary, 8, 8, dtype=dtype)
    for divergence, passes in (("forward_kl", 2), ("total_variation", 3)):
        for labels, bias in ((None, None), (torch.arange(tokens), torch.zeros(vocabulary))):
            options = {} if labels is None else {"labels": labels, "ce_weight": 0.5, "student_bias": bias, "teacher_bias": bias}
            leaves = [x.clone().requires_grad_() for x in inputs[:2]]
            kernels.take_traffic()
            distillation_loss(*leaves, *inputs[2:4], divergence=divergence, backend="cuda", **options)
            shape = launch.row_shape(tokens, vocabulary, 2, launch.limits(0))
            assert (shape.held_vectors > 0) == (vocabulary < 3000)
            assert kernels.take_traffic() == requested_bytes(
                tokens, vocabulary, passes=passes, element=dtype.itemsize, labels=labels is not None, bias=bias is not None, shape=shape
            )


# What it refuses, and what the plan says


SIMPLE = Problem(
    tokens=4, vocabulary=100, student_dim=8, teacher_dim=8, student_dtype=torch.float32, teacher_dtype=torch.float32, device=DEVICE
)  # fmt: skip


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"student_dtype": torch.float64}, "float64 inputs want float64"),
        ({"vocabulary": 2**31}, "at most 2147482624 entries"),
        ({"device": torch.device("meta")}, "runs on GPU tensors, these are on meta"),
        ({"options": Options(sweep="int8", column_fraction=0.08)}, "no quantised sweep"),
        ({"options": Options(divergence=divergences.Divergence("mine"))}, "mine is not one of them"),
    ],
)
def test_reason_why_not_is_given_in_words(change, reason):
    assert backend.why_not(SIMPLE) is None
    assert reason in backend.why_not(dataclasses.replace(SIMPLE, **change))


def test_driver_is_not_started_where_torch_finds_a_gpu(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "why_no_device", lambda: pytest.fail("it was asked"))
    assert "runs on GPU tensors, these are on meta" in backend.why_not(dataclasses.replace(SIMPLE, device=torch.device("meta")))


def test_more_parameters_than_a_divergence_has_are_refused(kernels):
    with pytest.raises(ValueError, match="at most 2 parameters, these are 3"):
        kernels.rows({}, {}, 0, [1.0, 2.0, 3.0], device=0, stream=0)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_reason_why_not_names_what_is_missing(monkeypatch):
    assert "torch finds no GPU" in backend.why_not(dataclasses.replace(SIMPLE, device=torch.device("cuda")))
    monkeypatch.setattr(extension, "kernels", None)
    monkeypatch.setattr(extension, "MISSING", "No module named 'distill_kernels._cuda'")
    assert "extension is missing (No module named 'distill_kernels._cuda'); install CUDA's nvcc" in backend.why_not(SIMPLE)


@pytest.mark.skipif(REAL is None, reason="the extension was not built: there is no nvcc")
def test_compiled_extension_imports_without_a_gpu_and_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(extension, "kernels", REAL)
    assert set(REAL.divergences) >= set(divergences.BUILT_IN) and not REAL.emulated
    if not torch.cuda.is_available():
        on_cpu = dataclasses.replace(SIMPLE, device=torch.device("cpu"))
        assert "it runs on GPU tensors, these are on cpu, and CUDA finds no GPU here: " in backend.why_not(on_cpu)
        with pytest.raises(NotImplementedError, match="backend 'cuda' cannot run this: it runs on GPU tensors"):
            distillation_loss(*make_inputs("flat")[:4], backend="cuda")
        with pytest.raises(RuntimeError, match="attribute of the device: "):
            REAL.limits(0)


def test_auto_never_takes_it_before_a_backend_that_can():
    assert backends.ORDER.index("cuda") > backends.ORDER.index("triton")
    assert backends.name_of(backends.choose(SIMPLE)) != "cuda"


@pytest.mark.skipif(ON_GPU, reason="the limits are those of the emulation")
def test_a_row_is_shared_by_no_more_blocks_than_hold_it_or_find_work():
    limits = launch.Limits(90, 132, 232448, 8, 512)
    assert launch.row_shape(800, 28800, 2, limits) == (1, 7200)
    assert launch.row_shape(800, 32000, 2, limits) == (2, 4000)
    assert launch.row_shape(800, 128256, 2, limits) == (8, 4008)
    assert launch.row_shape(800, 128256, 1, limits) == (4, 8016)
    assert launch.row_shape(800, 262144, 2, limits) == (1, 0)
    assert launch.row_shape(4, 262144, 2, limits) == (8, 0)  # few rows: 32 of 132 multiprocessors rather than 4
    assert launch.row_shape(1, 1000, 2, limits) == (1, 250)
    assert launch.row_shape(2, 128256, 2, limits._replace(cluster=1, shared_bytes=166912)) == (1, 0)
