"""The plan: a pure function whose figures hold when memory is measured."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distill_kernels
from distill_kernels import backends, distillation_loss
from distill_kernels.backends import native
from distill_kernels.call.options import Options
from distill_kernels.call.problem import Problem
from distill_kernels.schedule.plan import MIB, Schedule, make_plan

BACKENDS = ("torch", "native")
ALLOWANCE_MIB = 16  # allocator slack and torch's own scratch, on top of what the plan promises

# Of a backend's demands: a kernel with and without row temporaries, scratch for each token, scratch as such.
schedules = st.builds(
    Schedule,
    token_alignment=st.sampled_from([1, 16, 32]),
    token_bytes=st.integers(0, 100_000),
    fixed_bytes=st.integers(0, 4 * MIB),
    row_bytes=st.sampled_from([0, 4 * 32_000, 48 * 50_000]),
    most_bytes=st.none() | st.integers(-MIB, 32 * MIB),  # less than nothing, where what is fixed is more
)


def problem_of(tokens=1000, vocabulary=50_000, student_dim=64, teacher_dim=96, dtype=torch.float32, workspace_mib=None, **asked):
    options, device = Options(workspace_mib=workspace_mib), torch.device("cpu")
    return Problem(tokens, vocabulary, student_dim, teacher_dim, dtype, dtype, device, options, kd=False, **asked)


def with_workspace(problem, mib):
    return dataclasses.replace(problem, options=dataclasses.replace(problem.options, workspace_mib=mib))


problems = st.builds(
    problem_of,
    tokens=st.integers(0, 100_000),
    vocabulary=st.integers(1, 300_000),
    student_dim=st.integers(1, 8192),
    teacher_dim=st.integers(0, 8192),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    workspace_mib=st.integers(1, 2048),
    d_hidden=st.booleans(),
    d_weight=st.booleans(),
    d_bias=st.booleans(),
)


def plan_or_none(problem, schedule):
    try:
        return make_plan(problem, schedule)
    except ValueError as error:
        assert f"workspace_mib={problem.workspace_mib} cannot hold the logits" in str(error)
        return None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problems, schedules)
def test_plan_keeps_its_promises(problem, schedule):
    plan = plan_or_none(problem, schedule)
    assert plan == plan_or_none(problem, schedule)
    if plan is None:
        return
    assert 0 < plan.workspace_bytes <= problem.workspace_mib * MIB
    assert plan.chunk_tokens >= 1 and plan.chunk_tokens % schedule.token_alignment == 0
    # The chunks cover the tokens, and none of them is empty.
    assert plan.chunks >= 1 and plan.chunks * plan.chunk_tokens >= problem.tokens
    assert (plan.chunks - 1) * plan.chunk_tokens < max(problem.tokens, 1)
    assert bool(plan.row_tokens) == bool(schedule.row_bytes) and plan.row_tokens <= plan.chunk_tokens
    # Logits of a chunk and what the kernel asked for, nothing else.
    logits = plan.chunk_tokens * problem.vocabulary * problem.compute_dtype.itemsize * (2 if problem.teacher_dim else 1)
    kernel = plan.chunk_tokens * schedule.token_bytes + schedule.fixed_bytes + plan.row_tokens * schedule.row_bytes
    assert plan.workspace_bytes == logits + kernel
    if schedule.most_bytes is not None and plan.chunk_tokens > schedule.token_alignment:
        assert logits + plan.chunk_tokens * schedule.token_bytes <= schedule.most_bytes


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems, schedules)
def test_plan_says_a_workspace_that_is_enough(problem, schedule):
    try:
        make_plan(problem, schedule)
        return
    except ValueError as error:
        needed = int(re.search(r"it needs at least (\d+)$", str(error))[1])
    assert needed > problem.workspace_mib
    assert make_plan(with_workspace(problem, needed), schedule).chunk_tokens >= 1
    # And no more than that, to the MiB.
    if needed - 1 > problem.workspace_mib:
        with pytest.raises(ValueError, match="cannot hold"):
            make_plan(with_workspace(problem, needed - 1), schedule)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [32_000, 49_152, 128_256, 262_144])
def test_backend_says_a_workspace_that_is_enough(name, dtype, vocabulary):
    shape = 1000, vocabulary, 2048, 4096
    try:
        distill_kernels.plan(*shape, dtype=dtype, backend=name, workspace_mib=1)
    except ValueError as error:
        needed = int(re.search(r"it needs at least (\d+)$", str(error))[1])
        distill_kernels.plan(*shape, dtype=dtype, backend=name, workspace_mib=needed)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems, schedules)
def test_larger_workspace_never_means_smaller_chunks(problem, schedule):
    plan = plan_or_none(problem, schedule)
    if plan is not None:
        larger = make_plan(with_workspace(problem, 2 * problem.workspace_mib), schedule)
        assert larger.chunks <= plan.chunks


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mib", [16, 64, 512])
@pytest.mark.parametrize("shape", [(1, 32_000, 64, 64), (513, 49_152, 576, 960), (8192, 128_256, 2048, 4096), (2048, 262_144, 640, 0)])
def test_workspace_of_both_backends_stays_within_what_was_given(name, dtype, workspace_mib, shape):
    try:
        plan = distill_kernels.plan(*shape, dtype=dtype, backend=name, workspace_mib=workspace_mib)
    except ValueError as error:
        # 16 aligned tokens of a large vocabulary do not fit in 16 MiB; 64 MiB must be enough for every released vocabulary.
        assert workspace_mib == 16 and re.search(r"cannot hold the logits of 1?\d tokens?", str(error))
        return
    assert plan.workspace_bytes <= workspace_mib * MIB
    # Most of what was given is used, once there are tokens to fill it, up to where larger chunks are no faster.
    if shape[0] >= 8192 and workspace_mib >= 64 and plan.chunk_tokens < native.CHUNK_TOKENS:
        assert plan.workspace_bytes > 0.5 * workspace_mib * MIB


def test_plan_does_not_look_at_free_memory():
    def made():
        return distill_kernels.plan(8192, 128_256, 2048, 4096, dtype=torch.bfloat16)

    before = made()
    hog = torch.zeros(64 * MIB, dtype=torch.uint8)
    assert made() == before
    assert hog is not None


def test_fields_are_the_arithmetic_of_the_shapes():
    n, v, d_s, d_t = 1000, 50_000, 64, 96
    plan = distill_kernels.plan(n, v, d_s, d_t, backend="torch")
    assert plan.gradient_bytes == 4 * (n * d_s + v * d_s)
    assert plan.cast_bytes == 0
    assert plan.peak_bytes == plan.workspace_bytes + plan.gradient_bytes
    assert plan.forward_flops == 2 * n * v * (d_s + d_t)
    assert plan.backward_flops == 2 * n * v * 2 * d_s
    assert plan.eager_bytes == 5 * 4 * n * v

    half = distill_kernels.plan(n, v, d_s, d_t, dtype=torch.bfloat16, backend="torch")
    assert half.gradient_bytes == plan.gradient_bytes and half.cast_bytes == plan.gradient_bytes // 2
    assert half.peak_bytes == max(half.workspace_bytes + half.gradient_bytes, half.gradient_bytes + half.cast_bytes)

    frozen_head = distill_kernels.plan(n, v, d_s, d_t, weight_gradient=False, backend="torch")
    assert frozen_head.gradient_bytes == 4 * n * d_s and frozen_head.backward_flops == 2 * n * v * d_s
    frozen_hidden = distill_kernels.plan(n, v, d_s, d_t, hidden_gradient=False, backend="torch")
    assert frozen_hidden.gradient_bytes == 4 * v * d_s and frozen_hidden.backward_flops == 2 * n * v * d_s
    no_teacher = distill_kernels.plan(n, v, d_s, 0, backend="torch")
    assert no_teacher.forward_flops == 2 * n * v * d_s and no_teacher.chunks < plan.chunks
    double = distill_kernels.plan(n, v, d_s, d_t, dtype=torch.float64, backend="torch")
    assert double.gradient_bytes == 2 * plan.gradient_bytes and double.cast_bytes == 0


def test_plan_of_per_token_losses_repeats_the_forward_products_in_backward():
    mean, none = (distill_kernels.plan(1000, 50_000, 64, 96, reduction=reduction) for reduction in ("mean", "none"))
    assert none.forward_flops == mean.forward_flops
    assert none.backward_flops == mean.forward_flops + mean.backward_flops


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_is_the_one_that_a_call_runs_on(name, dtype, monkeypatch):
    used = []
    module = backends.load(name)
    monkeypatch.setattr(module, "make_plan", lambda *args: used.append(make_plan(*args)) or used[-1])
    student, teacher = torch.randn(70, 16, dtype=dtype, requires_grad=True), torch.randn(70, 24, dtype=dtype)
    weight = torch.randn(20_000, 16, dtype=dtype, requires_grad=True)
    distillation_loss(student, weight, teacher, torch.randn(20_000, 24, dtype=dtype), backend=name, workspace_mib=8)
    assert used == [distill_kernels.plan(70, 20_000, 16, 24, dtype=dtype, backend=name, workspace_mib=8)]
    assert used[0].chunks > 1


def test_printed_plan_names_its_figures():
    plan = distill_kernels.plan(8192, 128_256, 2048, 4096, dtype=torch.bfloat16, backend="torch")
    printed = str(plan)
    for word, count in (("workspace", plan.workspace_bytes), ("peak", plan.peak_bytes)):
        assert re.search(rf"^{word} +{re.escape(f'{count / MIB:,.1f}')} MiB", printed, re.MULTILINE), printed
    eager = plan.eager_bytes + plan.gradient_bytes + plan.cast_bytes
    assert re.search(rf"^eager +{re.escape(f'{eager / MIB:,.1f}')} MiB", printed, re.MULTILINE)
    flops = rf"{re.escape(f'{plan.forward_flops / 1e12:,.3f}')} TFLOP forward, {re.escape(f'{plan.backward_flops / 1e12:,.3f}')} TFLOP"
    assert re.search(flops, printed)
    assert f"{plan.chunks:,} of {plan.chunk_tokens:,} tokens" in printed


def test_doctor_prints_and_returns_what_can_run(capsys):
    reasons = distill_kernels.doctor()
    printed = capsys.readouterr().out
    assert set(reasons) == set(backends.ORDER)
    assert reasons["torch"] is None
    assert torch.__version__ in printed
    for name, reason in reasons.items():
        assert re.search(rf"^ +{name} +cpu +({'ready, .+' if reason is None else 'cannot run: .+'})$", printed, re.MULTILINE)
    fastest = next(name for name in backends.ORDER if reasons[name] is None)
    assert re.search(rf'backend="auto" on cpu takes {fastest}$', printed, re.MULTILINE)
    if reasons["native"] is None:
        assert f"compiled kernels for {backends.load('native').instruction_sets()[0]}" in printed


# Measured memory. One process measures one case after another: the kernel's high-water mark of resident memory is reset before each.

MEASURE = """
import gc, json, sys
import torch
import distill_kernels

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def peak_mib(function):
    "MiB of resident memory that `function` adds at its peak."
    gc.collect()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before

def inputs(tokens, vocabulary, dim, dtype):
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(shape).to(getattr(torch, dtype))
    return (new(tokens, dim).requires_grad_(), new(vocabulary, dim).requires_grad_(), new(tokens, dim), new(vocabulary, dim))

def ours(tensors, backend, reduction, upstream, workspace_mib):
    loss = distill_kernels.distillation_loss(*tensors, backend=backend, reduction=reduction, workspace_mib=workspace_mib)
    loss.sum().backward(torch.tensor(upstream))

def eager(tensors):
    hidden, weight, teacher_hidden, teacher_weight = tensors
    log_q = (hidden @ weight.T).float().log_softmax(-1)
    log_p = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
    torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).backward()

torch.set_num_threads(1)
warm = inputs(64, 2000, 16, "float32")
eager(warm)
results = []
for case in json.loads(sys.argv[1]):
    tensors = inputs(case["tokens"], case["vocabulary"], case["dim"], case["dtype"])
    if case["backend"] == "eager":
        run = lambda: eager(tensors)
    else:
        for reduction in ("mean", "none"):  # loads the extension, and the products' kernels for this dtype
            ours(inputs(64, 2000, 16, case["dtype"]), case["backend"], reduction, 1.0, 64)
        run = lambda: ours(tensors, case["backend"], case["reduction"], case["upstream"], case["workspace_mib"])
    results.append(peak_mib(run))
    del tensors, run
print(json.dumps(results))
"""


def case(backend, tokens, *, vocabulary=49_152, dim=32, dtype="float32", reduction="mean", upstream=1.0, workspace_mib=64):
    return {
        "backend": backend, "tokens": tokens, "vocabulary": vocabulary, "dim": dim, "dtype": dtype, "reduction": reduction,
        "upstream": upstream, "workspace_mib": workspace_mib,
    }  # fmt: skip


CASES = {f"{name}-{tokens}_tokens": case(name, tokens) for name in BACKENDS for tokens in (64, 512, 1536)}
CASES |= {f"{name}-workspace_{mib}": case(name, 512, workspace_mib=mib) for name in BACKENDS for mib in (16, 128)}
CASES |= {f"{name}-per_token": case(name, 512, reduction="none", upstream=2.5) for name in BACKENDS}
# d_weight is 96 MiB, three times the workspace: a copy of it, made to scale or to cast it, would stand out.
CASES |= {
    f"{name}-large_head-{dtype}-upstream_{upstream}": case(name, 64, dim=512, dtype=dtype, upstream=upstream, workspace_mib=32)
    for name in BACKENDS
    for dtype in ("float32", "bfloat16")
    for upstream in (1.0, 2.5)
}
EAGER = case("eager", 1024, vocabulary=16_384)


@pytest.fixture(scope="module")
def peaks():
    """MiB at the peak of every case, above what was resident before."""
    if sys.platform != "linux" or not Path("/proc/self/clear_refs").exists():
        pytest.skip("the high-water mark of memory can only be reset on Linux")
    # A fixed threshold has malloc give large blocks back at once, whatever came before in the process.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    command = [sys.executable, "-c", MEASURE, json.dumps([*CASES.values(), EAGER])]
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    if made.returncode and re.search(r"(PermissionError|OSError).*\n*$", made.stderr) and "clear_refs" in made.stderr:
        pytest.skip("the high-water mark of memory cannot be reset here")
    assert made.returncode == 0, made.stderr
    *ours, eager = json.loads(made.stdout)
    return dict(zip(CASES, ours, strict=True)) | {"eager": eager}


def test_a_rank_of_a_divided_vocabulary_is_planned():
    whole, of_four = (distill_kernels.plan(4096, 128256, 1024, 2048, backend="torch", ranks=ranks) for ranks in (1, 4))
    assert whole.exchanged_bytes == 0
    # To and from three others 14 numbers of each token, and its 1024 of d_hidden in a ring of four; 4 bytes each.
    assert of_four.exchanged_bytes == 4096 * 4 * (3 * 14 + 2 * 3 * 1024 // 4)
    assert of_four.gradient_bytes == 4 * 1024 * (4096 + 128256 // 4)
    assert of_four.forward_flops == whole.forward_flops // 4 and of_four.workspace_bytes <= 192 * 2**20
    with pytest.raises(NotImplementedError, match="not available for a vocabulary in shards"):
        distill_kernels.plan(4096, 128256, 1024, 2048, ranks=4, column_fraction=0.08, sweep="int8")
    with pytest.raises(ValueError, match="ranks must be an int of at least 1"):
        distill_kernels.plan(4096, 128256, 1024, 2048, ranks=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.exhaustive
def test_measured_peak_is_within_the_plan(name, peaks):
    c = CASES[name]
    plan = distill_kernels.plan(
        c["tokens"], c["vocabulary"], c["dim"], c["dim"], dtype=getattr(torch, c["dtype"]), reduction=c["reduction"],
        backend=c["backend"], workspace_mib=c["workspace_mib"],
    )  # fmt: skip
    assert peaks[name] <= plan.peak_bytes / MIB + ALLOWANCE_MIB
    # Or nothing was measured: float32 gradients, at least, were written.
    assert peaks[name] >= 0.8 * plan.gradient_bytes / MIB


@pytest.mark.exhaustive
def test_eager_estimate_is_near_the_measured_peak(peaks):
    plan = distill_kernels.plan(EAGER["tokens"], EAGER["vocabulary"], EAGER["dim"], EAGER["dim"])
    assert plan.eager_bytes + plan.gradient_bytes == pytest.approx(peaks["eager"] * MIB, rel=0.4)
