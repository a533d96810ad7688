import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accuracy import DIVERGENCES, check_loss, everything, make_inputs, make_labels, make_token_weight, with_gradients

from distill_kernels import distillation_loss, distillation_loss_and_stats, divergences, plan, token_logprobs
from distill_kernels.backends import native
from distill_kernels.call.problem import WORKSPACE_MIB

if native._native is None:
    pytest.skip("the compiled extension was not built", allow_module_level=True)

ISA = pytest.mark.parametrize("isa", native.instruction_sets())
ALL = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


@pytest.fixture
def forced(monkeypatch, isa):
    monkeypatch.setattr(native, "INSTRUCTION_SET", isa)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_instruction_sets_end_with_the_one_every_processor_has():
    assert native.instruction_sets()[-1] == "baseline"


@ISA
@ALL
def test_instruction_set_with_every_option_matches_reference(forced, isa, divergence):
    check_loss(make_inputs("realistic", bias=True), divergence=divergence, backend="native", **everything(21, 300))


@ISA
@ALL
def test_instruction_set_matches_reference(forced, isa, divergence):
    upstream = torch.randn(21, generator=torch.Generator().manual_seed(0))
    check_loss(make_inputs("grid"), divergence=divergence, temperature=2.0, reduction="none", upstream=upstream, backend="native")


@ISA
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 9, 16, 17, 33])
@pytest.mark.parametrize("vocabulary", [63, 2049])
def test_instruction_set_with_ragged_tokens_matches_reference(forced, isa, tokens, vocabulary):
    inputs = make_inputs("grid", tokens, vocabulary, 8, 8, bias=True)
    check_loss(inputs, divergence=divergences.jensen_shannon(0.3), backend="native", **everything(tokens, vocabulary))


@ISA
def test_gradient_of_the_bias_alone(forced, isa):
    inputs = make_inputs("moderate", 70, 2500, bias=True).to(torch.bfloat16)

    def gradient(backend):
        bias = inputs.student_bias.clone().requires_grad_()
        loss = distillation_loss(*inputs[:4], student_bias=bias, teacher_bias=inputs.teacher_bias, backend=backend, reduction="sum")
        return torch.autograd.grad(loss, bias)[0]

    torch.testing.assert_close(gradient("native"), gradient("torch"))


@ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lanes_beyond_the_last_token_reach_no_gradient(forced, isa, dtype):
    # There the hidden states are zero and the log-sum-exp is: what is left of the logits, the biases, overflows exp.
    inputs = make_inputs("moderate", 3, 300, bias=True)
    check_loss(inputs._replace(student_bias=inputs.student_bias + 100, teacher_bias=inputs.teacher_bias + 100).to(dtype), backend="native")


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setattr(native, "INSTRUCTION_SET", "avx1024")
    with pytest.raises(ValueError, match="'avx1024' is not available"):
        distillation_loss(*make_inputs("flat")[:4], backend="native")


def test_unknown_instruction_set_of_math_function_is_refused():
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="'nonesuch' is not available"):
        native._native.math_function("e", x.data_ptr(), x.data_ptr(), 4, "nonesuch")


def evaluate(which, x, isa):
    """(x, f(x)) in float64 of the float32 numbers nearest to x; f is exp, log or tanh."""
    x = torch.as_tensor(x).to(torch.float32).contiguous()
    out = torch.full_like(x, float("nan"))
    native._native.math_function(which, x.data_ptr(), out.data_ptr(), x.numel(), isa)
    return x.double(), out.double()


def every_magnitude(smallest, largest):
    """Positive float32 numbers, evenly spread over their bit patterns, so over every exponent."""
    low, high = torch.tensor([smallest, largest]).view(torch.int32).tolist()
    return torch.arange(low, high, 1999, dtype=torch.int32).view(torch.float32)


@ISA
def test_exp_is_within_its_bound(isa):
    x, got = evaluate("e", torch.linspace(-87, 88, 1_000_003, dtype=torch.float64), isa)
    assert (got / x.exp() - 1).abs().max() < 2e-7
    small = every_magnitude(1e-30, 1.0)
    x, got = evaluate("e", torch.cat([small, -small]), isa)
    assert (got / x.exp() - 1).abs().max() < 2e-7


@ISA
def test_exp_at_the_ends_is_zero_infinity_or_nan(isa):
    inf = float("inf")
    _, got = evaluate("e", [0.0, -0.0, -87.34, -104.0, -1e4, -3e38, -inf, 88.73, 89.0, 3e38, inf, float("nan")], isa)
    assert got[:2].tolist() == [1.0, 1.0]
    assert (got[2:7] == 0).all()
    assert (got[7:11] == inf).all()
    assert got[11].isnan()


@ISA
def test_log_is_within_its_bound(isa):
    near_one = torch.linspace(0.5, 2.0, 500_001, dtype=torch.float64)
    x, got = evaluate("l", torch.cat([every_magnitude(1.2e-38, 3.4e38).double(), near_one]), isa)
    truth = x.log()
    assert ((got - truth).abs() / truth.abs().clamp(min=1)).max() < 1e-7
    assert evaluate("l", [1.0], isa)[1].item() == 0


@ISA
def test_tanh_is_within_its_bound(isa):
    small = every_magnitude(1e-30, 0.3)
    x, got = evaluate("t", torch.cat([torch.linspace(-12, 12, 1_000_001), small, -small]), isa)
    assert (got - x.tanh()).abs().max() < 1e-7
    _, got = evaluate("t", [float("inf"), -float("inf"), 100.0, -100.0, 0.0, float("nan")], isa)
    assert got[:5].tolist() == [1.0, -1.0, 1.0, -1.0, 0.0]
    assert got[5].isnan()


def identity_inputs(tokens=21, vocabulary=2500):
    """Heads that are the identity: every product is exact in any order of summation and on any number of threads, so that loss and
    d_student_hidden show the bits of the row kernel. Two slices of the vocabulary, so that there are two tasks for threads."""
    logits = make_inputs("moderate", tokens, vocabulary, 8, 8)
    eye = torch.eye(vocabulary)
    return logits.student_hidden @ logits.student_weight.T, eye, logits.teacher_hidden @ logits.teacher_weight.T, eye


def bits(tensors, divergence):
    """What the kernel makes of it all: loss, gradient of the logits, stats."""
    hidden = tensors[0].clone().requires_grad_()
    tokens, vocabulary = hidden.shape
    options = everything(tokens, vocabulary)
    loss, stats = distillation_loss_and_stats(hidden, *tensors[1:], divergence=divergence, backend="native", **options)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return torch.cat(
        [loss.detach().view(1), gradient.flatten(), stats.divergence, stats.student_entropy, stats.cross_entropy, stats.tail_mass]
    )


@ISA
@pytest.mark.parametrize("divergence", ["forward_kl", divergences.jensen_shannon(0.3)], ids=str)
def test_bits_do_not_depend_on_threads(forced, isa, divergence, threads):
    tensors = identity_inputs()
    inputs = make_inputs("realistic", 40, 5000, 70, 30, bias=True)  # three slices of the vocabulary
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        loss = with_gradients(distillation_loss, inputs, 1.7, divergence=divergence, backend="native", **everything(40, 5000))
        results.append(torch.cat([bits(tensors, divergence), *(value.flatten() for value in loss.values())]))
    assert results[0].isfinite().all() and results[0].abs().max() > 0
    assert all(torch.equal(results[0], other) for other in results[1:])


@ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, vocabulary", [(20, 10_400), (200, 1000)])  # more tasks than threads in the vocabulary, and fewer
def test_bits_do_not_depend_on_up_to_eight_threads(forced, isa, dtype, tokens, vocabulary, threads):
    inputs = make_inputs("realistic", tokens, vocabulary, 70, 30, bias=True).to(dtype)
    options = {"divergence": divergences.jensen_shannon(0.3), "backend": "native", **everything(tokens, vocabulary)}
    results = []
    for count in (1, 5, 8):
        threads(count)
        loss = with_gradients(distillation_loss, inputs, 1.7, **options)
        alone = distillation_loss(*inputs[:4], backend="native", reduction="none")
        results.append([alone, *loss.values()])
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in results[0])
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


def test_chunks_do_not_depend_on_threads(threads):
    # Chunk borders decide the order of d_weight's sums. 6000 entries and 3 MiB are a tight fit.
    inputs = make_inputs("moderate", 61, 6000, 24, 16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(with_gradients(distillation_loss, inputs, 1.7, backend="native", workspace_mib=3))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_bits_of_a_token_do_not_depend_on_its_neighbours():
    # Another lane, another group of lanes, another chunk: the same token.
    tensors = identity_inputs(tokens=40, vocabulary=300)
    weight = torch.linspace(0.5, 2.0, 40)

    def loss_of(tokens, **options):
        hidden = tensors[0][tokens].clone().requires_grad_()
        loss = distillation_loss(
            hidden, tensors[1], tensors[2][tokens], tensors[3], token_weight=weight[tokens], reduction="none", backend="native", **options
        )
        return torch.cat([loss.detach().unsqueeze(-1), torch.autograd.grad(loss.sum(), hidden)[0]], -1)

    together = loss_of(slice(None))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss_of(order), together[order])
    for token in (0, 15, 16, 39):
        assert torch.equal(loss_of(slice(token, token + 1)), together[token : token + 1])


@ALL
def test_repeated_call_gives_the_same_bits(divergence):
    inputs = make_inputs("realistic", bias=True)
    options = {"divergence": divergence, "backend": "native", **everything(21, 300)}
    first = with_gradients(distillation_loss, inputs, 1.7, **options)
    for _ in range(3):
        again = with_gradients(distillation_loss, inputs, 1.7, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_concurrent_calls_give_the_bits_of_serial_ones():
    cases = [
        (make_inputs("moderate", 9 + 7 * i, 2100, 16, 16, bias=True, seed=i), divergence)
        for i, divergence in enumerate(["forward_kl", "reverse_kl", divergences.jensen_shannon(0.3), "total_variation"] * 2)
    ]

    def run(case):
        inputs, divergence = case
        tokens = inputs.student_hidden.shape[0]
        return with_gradients(distillation_loss, inputs, 1.7, divergence=divergence, backend="native", **everything(tokens, 2100))

    serial = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        concurrent = list(pool.map(run, cases * 4))
    for i, result in enumerate(concurrent):
        assert all(torch.equal(result[name], serial[i % len(cases)][name]) for name in result)


@ISA
def test_instruction_set_token_logprobs_match_torch_backend(forced, isa):
    inputs, ids = make_inputs("moderate"), make_labels(21, 300, masked=0.0)
    native_result = token_logprobs(*inputs[:2], ids, temperature=2.0, backend="native")
    torch_result = token_logprobs(*inputs[:2], ids, temperature=2.0, backend="torch")
    for got, wanted in zip(native_result, torch_result, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)


def test_instruction_sets_agree_with_each_other(monkeypatch):
    inputs = make_inputs("realistic", bias=True)
    options = {**everything(21, 300), "token_weight": make_token_weight(21), "divergence": divergences.skew_reverse_kl(0.1)}
    results = []
    for isa in native.instruction_sets():
        monkeypatch.setattr(native, "INSTRUCTION_SET", isa)
        results.append(with_gradients(distillation_loss, inputs, 1.7, backend="native", **options))
    for result in results[1:]:
        for name in result:
            torch.testing.assert_close(result[name], results[0][name], rtol=0, atol=1e-5 * results[0][name].abs().max().item(), msg=name)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_native_ignores_the_default_dtype(default):
    inputs = [torch.randn(5, 24, dtype=torch.float32), torch.randn(97, 24), torch.randn(5, 24), torch.randn(97, 24)]
    expected = distillation_loss(*inputs, backend="native")
    torch.set_default_dtype(default)
    try:
        assert torch.equal(distillation_loss(*inputs, backend="native"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


SUBNORMAL_FLOAT16 = """
import sys, torch
from distill_kernels import distillation_loss
from distill_kernels.backends import native

torch.set_num_threads(1)  # the mode is a thread's own
generator = torch.Generator().manual_seed(0)
large, small = (torch.randn(40, 50, generator=generator).mul(scale).half() for scale in (1e4, 3e-5))
assert 0 < small.abs().median() < torch.finfo(torch.float16).smallest_normal
tensors = (large, small, small, large), (large.float(), small.float(), small.float(), large.float())
if not torch.set_flush_denormal(True):
    print("unsupported")
    sys.exit()
for isa in sys.argv[1:]:
    native.INSTRUCTION_SET = isa
    half, single = (distillation_loss(*four, reduction="none", backend="native") for four in tensors)
    assert single.min() > 0.1 and torch.equal(half, single), (isa, half, single)
"""


def test_subnormal_float16_is_read_where_subnormals_are_flushed():
    ran = subprocess.run([sys.executable, "-c", SUBNORMAL_FLOAT16, *native.instruction_sets()], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if "unsupported" in ran.stdout:
        pytest.skip("this processor has no such mode")


@pytest.fixture
def lanes(monkeypatch):
    """(tokens, stride) of every chunk that the kernel receives."""
    received = []
    run_chunk = native._native.run_chunk
    monkeypatch.setattr(
        native._native, "run_chunk", lambda chunk, *rest: received.append((chunk["tokens"], chunk["stride"])) or run_chunk(chunk, *rest)
    )
    return received


@pytest.mark.parametrize(
    "tokens, active, expected",
    [
        (5, 5, [(5, 16)]),
        (192, 192, [(192, 192)]),
        (193, 193, [(112, 112), (81, 96)]),  # not 192 and 1
        (400, 17, [(17, 32)]),
        (400, 200, [(112, 112), (88, 96)]),  # of 3 chunks that the plan has for 400
        (400, 0, []),
    ],
)
def test_kernel_computes_no_more_lanes_than_tokens_that_count(tokens, active, expected, lanes):
    """Products and sums run over a chunk's stride, so that it is what a call costs."""
    inputs = make_inputs("moderate", tokens, 300)
    weight = torch.zeros(tokens)
    weight[torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:active]] = 1.0
    check_loss(inputs, token_weight=None if active == tokens else weight, backend="native")
    assert lanes == expected


NO_GRADIENT = {"hidden_gradient": False, "weight_gradient": False}


@pytest.mark.parametrize("threads", [1, 16, 64, 96, 128, 384])
@pytest.mark.parametrize("options", [{}, NO_GRADIENT, NO_GRADIENT | {"divergence": "total_variation"}], ids=str)
def test_native_plan_has_room_on_many_cores(threads, options, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    planned = plan(1024, 128256, 4096, 8192, dtype=torch.bfloat16, backend="native", **options)
    assert planned.chunk_tokens >= 16 and planned.workspace_bytes <= WORKSPACE_MIB * 2**20


def test_tile_fused_chunks_do_not_depend_on_threads(monkeypatch):
    planned = []
    for threads in (1, 8, 128):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        planned.append(plan(100_000, 128256, 4096, 8192, dtype=torch.bfloat16, backend="native", **NO_GRADIENT).chunk_tokens)
    assert len(set(planned)) == 1


@pytest.mark.parametrize(
    "options, schedule, reason",
    [
        (NO_GRADIENT, "tile-fused", "without gradients"),
        (NO_GRADIENT | {"divergence": "reverse_kl"}, "tile-fused", "without gradients"),
        (NO_GRADIENT | {"divergence": divergences.jensen_shannon(0.3)}, "chunked", "jensen_shannon"),
        ({"weight_gradient": False}, "chunked", "gradients"),
        ({}, "chunked", "gradients"),
        ({"reduction": "none"}, "chunked", "gradients"),  # of backward, where the memory is needed
    ],
)
def test_plan_names_its_schedule_and_why(options, schedule, reason):
    planned = plan(4096, 128256, 2048, 4096, backend="native", **options)
    assert planned.schedule == schedule and reason in planned.reason
    assert f"schedule    {schedule}: {planned.reason}" in str(planned)


@pytest.mark.parametrize("shape", [(1, 49152, 576, 576), (4096, 49152, 576, 576), (4096, 128256, 2048, 4096), (100_000, 262144, 640, 640)])
def test_tile_fused_workspace_is_bounded(shape):
    assert plan(*shape, backend="native", **NO_GRADIENT).workspace_bytes <= 32 * 2**20


@pytest.fixture
def largest(monkeypatch):
    """Elements of the largest tensor that the backend allocated."""
    sizes = [0]
    empty = native.memory.empty
    monkeypatch.setattr(native.memory, "empty", lambda *shape, **kwargs: sizes.append(math.prod(shape)) or empty(*shape, **kwargs))
    return lambda: max(sizes)


def test_evaluation_holds_no_logits(largest):
    tokens, vocabulary = 512, 20_000
    inputs = make_inputs("moderate", tokens, vocabulary, 8, 8)
    distillation_loss(*inputs[:4], backend="native")
    assert 0 < largest() < tokens * vocabulary / 8
    token_logprobs(inputs.student_hidden, inputs.student_weight, make_labels(tokens, vocabulary), backend="native")
    assert largest() < tokens * vocabulary / 8
    distillation_loss(*inputs[:4], backend="native", divergence="total_variation")
    assert largest() >= 160 * vocabulary


@ISA
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_value_has_the_same_bits_with_gradients_and_without(forced, isa, divergence):
    tokens, vocabulary = 150, 2500
    inputs = make_inputs("realistic", tokens, vocabulary, 24, 40, bias=True)
    options = {
        "temperature": 2.0,
        "student_softcap": 15.0,
        "student_bias": inputs.student_bias,
        "backend": "native",
        "divergence": divergence,
    }
    alone = distillation_loss(*inputs[:4], reduction="none", **options)
    leaves = [inputs.student_hidden.clone().requires_grad_(), inputs.student_weight.clone().requires_grad_()]
    for n in range(0, tokens, 37):
        only = (torch.arange(tokens) == n).float()
        with_gradient = distillation_loss(*leaves, *inputs[2:4], token_weight=only, reduction="sum", **options)
        assert with_gradient.requires_grad and with_gradient.item() == alone[n].item()


@ISA
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("low", [float("-inf"), -3e4])
def test_tile_fused_with_entries_below_the_floor_matches_the_chunked(forced, isa, divergence, low):
    """Such entries count as constants, which one pass over the logits cannot know: the tokens are looked at again."""
    tokens, vocabulary = 70, 2500
    inputs = make_inputs("moderate", tokens, vocabulary, 24, 40, bias=True)
    inputs.student_bias[100:300] = low
    inputs.teacher_bias[200:400] = low
    options = everything(tokens, vocabulary) | {"student_softcap": None, "teacher_softcap": None, "num_items": None}
    check_loss(inputs, divergence=divergence, backend="native", **options)
    biases = {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
    alone = distillation_loss(*inputs[:4], divergence=divergence, backend="native", **biases, **options)
    other = distillation_loss(*inputs[:4], divergence=divergence, backend="torch", **biases, **options)
    torch.testing.assert_close(alone, other, rtol=1e-5, atol=0)
    leaves = [inputs.student_hidden.clone().requires_grad_(), inputs.student_weight]
    assert alone.item() == distillation_loss(*leaves, *inputs[2:4], divergence=divergence, backend="native", **biases, **options).item()


@ISA
def test_register_tiles_multiply(isa):
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(96, 288, generator=generator), torch.randn(288, 64, generator=generator), torch.empty(96, 64)
    native._native.multiply(a.data_ptr(), b.data_ptr(), c.data_ptr(), 96, 288, isa)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=1e-4)
    rate = native._native.multiply_add_rate(1000, isa)
    assert math.isfinite(rate) and rate > 0
