"""What the stages of the GPU suite do: verdicts that can fail, timings of what was checked, tests in processes that may die, tools."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

import cuda_emulated

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.gpu_suite import stages
from benchmarks.gpu_suite.stages import Comparison
from benchmarks.gpu_suite.work import ceilings, compare, machine, own_tests, profile, right, variants, verdicts
from distill_kernels.backends.cuda import extension, launch

FEW = Case("few", 8, 50, 6, 10)
SIZES = (5, 200, 16, 32)


@pytest.fixture
def said(monkeypatch):
    """What stages of this process emit."""
    records = []
    for module in (machine, ceilings, compare, right, profile, own_tests):
        monkeypatch.setattr(module, "emit", lambda **record: records.append(record))
    return records


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(extension, "kernels", cuda_emulated.module())
    launch.limits.cache_clear()
    yield
    launch.limits.cache_clear()


# Verdicts


def gradients():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(300, 16, generator=generator), torch.randn(40, 16, generator=generator)]


def test_one_wrong_row_of_many_is_found():
    truth, one = gradients(), torch.ones(())
    made = [t.clone() for t in truth]
    bounds = verdicts.OURS[torch.bfloat16]
    assert verdicts.verdict(one, made, one, truth, bounds).right
    made[0][299] *= 1.12  # 0.7 % of the whole: within the bound of that
    wrong = verdicts.verdict(one, made, one, truth, bounds)
    assert wrong.gradient_error < bounds.gradient and not wrong.right and wrong.record()["verdict"] == "FAIL"


@pytest.mark.parametrize("where", ["value", "gradient"])
def test_nan_is_wrong(where):
    truth, value = gradients(), torch.ones(())
    made, got = [t.clone() for t in truth], torch.full((), math.nan) if where == "value" else value
    if where == "gradient":
        made[1][3, 3] = math.nan
    assert not verdicts.verdict(got, made, value, truth, verdicts.OTHERS[torch.float32]).right


def test_value_alone_can_be_wrong():
    right_, wrong = (verdicts.verdict(torch.tensor(v), [], torch.tensor(1.0), [], verdicts.OURS[torch.bfloat16]) for v in (1.0005, 1.01))
    assert right_.right and not wrong.right


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_estimate_that_errs_otherwise_than_it_predicts_is_wrong(factor):
    truth, one = gradients(), torch.ones(())
    made = [t * (1 + 0.5 * factor) for t in truth]
    assert not verdicts.verdict(one, made, one, truth, right.estimate(verdicts.OURS[torch.float32], 0.5)).right
    made = [t * 1.5 for t in truth]
    assert verdicts.verdict(one, made, one, truth, right.estimate(verdicts.OURS[torch.float32], 0.5)).right


# Right or not, of the cuda backend in the emulation


@pytest.mark.parametrize("name", stages.RIGHT_CUDA)
def test_every_way_through_the_cuda_kernels_is_taken_and_judged(name, emulated, said, monkeypatch):
    monkeypatch.setattr(right, "why_not", lambda backend: None)
    monkeypatch.setattr(right, "multiplies_16_bits", lambda: True)
    taken = []

    def recorded(forced_shape):
        def of(cluster, chosen):
            shape = forced_shape(cluster, chosen)
            return lambda *args: taken.append(shape(*args)) or taken[-1]

        return of

    for function in ("_row_shape", "_sweep_shape"):
        monkeypatch.setattr(right, function, recorded(getattr(right, function)))
    right.right(name, (140, 700, 24, 40), 1)
    (record,) = said
    assert record["verdict"] == "PASS", record
    assert {shape.cluster for shape in taken} == ({int(name[-1])} if "cluster" in name else set())
    assert (record["gradient_error"] is None) == ("sweep" in name)


def test_way_that_is_wrong_fails(said, monkeypatch):
    import distill_kernels

    loss = distill_kernels.distillation_loss
    monkeypatch.setattr(right.distill_kernels, "distillation_loss", lambda **given: loss(**given | {"backend": "torch"}) * 1.02)
    monkeypatch.setattr(right, "in_chunks", lambda *args: (64, 3))
    right.right("triton chunked", SIZES, 3)
    assert said[0]["verdict"] == "FAIL"


def test_way_in_fewer_chunks_than_wanted_fails(said, monkeypatch):
    import distill_kernels

    loss = distill_kernels.distillation_loss
    monkeypatch.setattr(right.distill_kernels, "distillation_loss", lambda **given: loss(**given | {"backend": "torch"}))
    monkeypatch.setattr(right, "in_chunks", lambda *args: (64, 2))
    right.right("triton chunked", SIZES, 3)
    assert said[0]["verdict"] == "FAIL" and "2 chunks" in said[0]["why"]


def test_workspace_is_the_largest_that_makes_chunks():
    workspace, chunks = right.in_chunks(stages.RIGHT, torch.bfloat16, "torch", None)
    assert chunks > stages.CHUNKS and workspace > 30


# Comparisons


def compared(monkeypatch, made, **changes):
    monkeypatch.setattr(compare, "variant", lambda name: made[name])
    comparison = Comparison("a comparison", tuple(made), 10, dtype="float32", **changes)
    compare.compare(comparison, (FEW.tokens, FEW.vocabulary, FEW.student_dim, FEW.teacher_dim), only_warm=False)


def test_what_is_wrong_gets_no_time_and_what_fails_costs_itself_alone(said, monkeypatch):
    def fails(*tensors):
        raise RuntimeError("it does not compile")

    made = {
        "right": variants.Variant(cases.eager),
        "wrong": variants.Variant(lambda *tensors: cases.eager(*tensors) * 1.01),
        "fails": variants.Variant(fails),
    }
    compared(monkeypatch, made)
    verdict = {record["variant"]: record for record in said if record["kind"] == "verdict"}
    assert {name: record["verdict"] for name, record in verdict.items()} == {"right": "PASS", "wrong": "FAIL", "fails": "ERROR"}
    assert "it does not compile" in verdict["fails"]["why"]
    assert {record["variant"] for record in said if record["kind"] == "time"} == {"products", "right"}


def test_what_is_timed_is_what_was_checked(said, monkeypatch):
    """At the same size and in the same direction, forward too."""
    calls = []

    def recorded(*tensors):
        calls.append((tuple(tensors[0].shape), torch.is_grad_enabled()))
        return cases.eager(*tensors)

    for backward in (True, False):
        calls.clear()
        compared(monkeypatch, {"recorded": variants.Variant(recorded)}, backward=backward)
        assert set(calls) == {((FEW.tokens, FEW.student_dim), backward)} and len(calls) == 1 + compare.DRY_ROUNDS
        timed = [record for record in said if record["kind"] == "time" and record["variant"] == "recorded"][-1]
        assert timed["direction"] == ("forward+backward" if backward else "forward") and timed["rounds"] == compare.DRY_ROUNDS


def test_comparison_of_nothing_right_fails(said, monkeypatch):
    with pytest.raises(SystemExit, match="no variant was found right"):
        compared(monkeypatch, {"wrong": variants.Variant(lambda *tensors: cases.eager(*tensors) * 2)})


def test_turns_are_told_of_after_the_first_the_third_and_the_last(monkeypatch):
    told = []
    machine.in_turns({"a": lambda: None, "b": lambda: None}, 0.0, lambda samples: told.append(len(samples["a"])), most=10)
    assert told == [1, 3]
    told.clear()
    machine.in_turns({"a": lambda: None}, 1e3, lambda samples: told.append(len(samples["a"])), most=7)
    assert told == [1, 3, 7]


def test_variants_have_the_flops_and_bytes_of_what_they_make():
    n, v, s, t = FEW.tokens, FEW.vocabulary, FEW.student_dim, FEW.teacher_dim
    ours, sampled, entropy = (variants.variant(name) for name in ("ours", "8% of columns", "ours, cross entropy"))
    assert ours.flops(FEW, True) == FEW.product_flops and ours.flops(FEW, False) == FEW.forward_flops
    assert entropy.flops(FEW, True) == 6 * n * v * s
    assert sampled.flops(FEW, True) == pytest.approx(2 * n * v * (s + t + 0.16 * s))
    assert ours.bytes(FEW, True, 2) == 2 * (n + v) * (2 * s + t) and ours.bytes(FEW, False, 4) == 4 * (n + v) * (s + t)
    assert entropy.bytes(FEW, True, 2) == 2 * (n + v) * 2 * s


def test_every_variant_of_the_list_has_a_name_here():
    wanted = {name for comparison in (*stages.COMPARISONS, *stages.CUDA_COMPARISONS) for name in comparison.variants}
    assert wanted == set(variants.VARIANTS)


def test_torch_compile_is_asked_for_a_graph_of_fixed_shapes(monkeypatch):
    asked = {}
    monkeypatch.setattr(variants, "has_gpu", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.update(options) or function)
    variants.variant("torch.compile")
    assert asked == {"dynamic": False, "backend": "inductor"}


@pytest.mark.parametrize("there", [False, True])
def test_liger_is_run_as_its_users_run_it_on_a_gpu_only(there, monkeypatch):
    asked = {}
    module = types.ModuleType("liger_kernel.chunked_loss")
    module.LigerFusedLinearJSDLoss = lambda **options: asked.update(options)
    for name in ("liger_kernel", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(variants, "has_gpu", lambda: there)
    variants.variant("liger")
    assert asked["compiled"] is there


def test_teachers_head_is_quantised_once_and_the_students_at_every_call(monkeypatch):
    import distill_kernels

    seen = []
    monkeypatch.setattr(variants.distill_kernels, "distillation_loss", lambda *tensors, **options: seen.append(tensors[1::2]))
    sweep = variants.variant("int8 sweep")
    tensors = [torch.randn(2, 3) for _ in range(4)]
    for _ in range(2):
        sweep.loss(*tensors)
    (student, teacher), (_, again) = seen
    assert student is tensors[1] and isinstance(teacher, distill_kernels.PreparedHead) and again is teacher and teacher.weight is tensors[3]


def test_row_kernels_of_both_backends_count_the_bytes_that_they_move(emulated, said):
    for backend in ("triton", "cuda"):
        ceilings.row_kernels(backend, dry=True)
    # Each logit of both models twice, or once by a kernel whose shared memory has room for 300; dz of two bytes.
    assert [record["bytes"] for record in said] == [4 * 300 * 18, 4 * 300 * 10]
    assert all(record["gbps"] > 0 for record in said)


def test_card_that_cannot_be_read_costs_no_timing(monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1980)
    monkeypatch.setattr(torch.cuda, "temperature", lambda: 41)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 512000)
    assert machine.card() == {"sm_mhz": 1980, "celsius": 41, "watts": 512.0}

    def unreadable():
        raise ModuleNotFoundError("pynvml is not installed")

    monkeypatch.setattr(torch.cuda, "clock_rate", unreadable)
    assert machine.card() == {"card": "ModuleNotFoundError: pynvml is not installed"}


# Own tests

OWN = """
import os, time
import pytest

def test_a(): pass
@pytest.mark.parametrize("i", [1, 2])
def test_b(i): assert i == 2
def test_c(): os._exit(3)
def test_d(): pytest.skip("a reason")
def test_e(): time.sleep(600)
def test_f(): pass
"""


@pytest.mark.parametrize("share, shares", [(0, 1), (1, 2)])
def test_process_of_tests_that_dies_or_hangs_has_cost_one_test(share, shares, tmp_path, said, monkeypatch):
    path = tmp_path / "test_own.py"
    path.write_text(OWN)
    monkeypatch.setattr(own_tests, "CHOSEN", "test")
    monkeypatch.setattr(own_tests, "TEST_SECONDS", 3)
    own_tests.own_tests((str(path),), share, shares, dry=False)
    outcomes = {record["test"].split("::")[-1]: record["outcome"] for record in said}
    # In the order of the file, but what is parametrised comes once at first, and its other instances last.
    whole = {
        "test_a": "passed", "test_b[1]": "failed", "test_c": "crashed or hung", "test_d": "skipped", "test_e": "crashed or hung",
        "test_f": "passed", "test_b[2]": "passed",
    }  # fmt: skip
    assert outcomes == dict(list(whole.items())[share::shares])
    words = {record["test"].split("::")[-1]: record.get("said", "") for record in said}
    if share == 0:
        assert "assert 1 == 2" in words["test_b[1]"] and "a reason" in words["test_d"] and "Timeout" in words["test_e"]


def test_tests_that_cannot_be_collected_are_an_error(tmp_path, said):
    with pytest.raises(SystemExit, match="before its first test"):
        own_tests.own_tests((str(tmp_path / "nothing.py"),), 0, 1, dry=False)


# Tools

NCU = """#!/bin/sh
echo "$@" > "{log}"
echo '==PROF== Connected to process 1'
echo '"ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","launch__registers_per_thread"'
echo '"","","us","%","register/thread"'
echo '"0","gradient_kernel","1,234.5","71.25","80"'
echo '"1","statistics_kernel","400.0","90.00","48"'
"""


def tool(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_counters_are_read_from_what_ncu_prints(tmp_path, said, monkeypatch):
    tool(tmp_path, "ncu", NCU.format(log=tmp_path / "log"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(profile, "slowest", lambda sizes: ["gradient_kernel", "void cutlass::gemm<float>(int)", "at::native::copy"])
    profile.counters((1, 2, 3, 4))
    assert [record["counters"] for record in said] == [
        {"time": "1,234.5 us", "memory, % of its peak": "71.25 %", "registers": "80 register/thread"},
        {"time": "400.0 us", "memory, % of its peak": "90.00 %", "registers": "48 register/thread"},
    ]
    command = (tmp_path / "log").read_text()
    assert "--clock-control none" in command and "gradient_kernel|" in command and command.rstrip().endswith("step 1 2 3 4")


def test_slowest_kernels_are_those_of_a_step(said):
    names = profile.slowest((6, 300, 8, 12))
    assert len(names) == profile.SLOWEST and said[0]["milliseconds"] * said[0]["calls"] >= said[1]["milliseconds"] * said[1]["calls"]


@pytest.mark.parametrize(
    "status, printed, key, word",
    [
        (0, "========= ERROR SUMMARY: 0 errors", "words", "ERROR SUMMARY: 0 errors"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed", "words", "RACECHECK SUMMARY: 0 hazards"),
        (99, "========= Invalid __global__ write", "reason", "Invalid __global__ write"),
        (0, "Device not supported", "reason", "Device not supported"),
    ],
)
def test_sanitizer_is_believed_where_it_says_that_it_ran(status, printed, key, word, tmp_path, said, monkeypatch):
    tool(tmp_path, "compute-sanitizer", f'#!/bin/sh\necho "{printed}"\nexit {status}\n')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    profile.sanitized("memcheck", SIZES)
    assert word in said[0][key]


def test_tools_that_are_not_there_are_said(said, monkeypatch):
    monkeypatch.setenv("PATH", "")
    profile.counters(SIZES)
    profile.sanitized("racecheck", SIZES)
    assert ["on the PATH" in record["reason"] for record in said] == [True, True]


def test_sanitizer_sees_every_kernel_of_the_cuda_backend(emulated, monkeypatch):
    asked, kernels = set(), extension.kernels
    recorded = types.SimpleNamespace(**{name: getattr(kernels, name) for name in dir(kernels) if not name.startswith("__")})
    launches = {
        name for name in vars(recorded) if callable(getattr(recorded, name)) and name.startswith(("rows", "sweep", "gather", "scatter"))
    }
    for name in launches:
        function = getattr(kernels, name)
        setattr(recorded, name, lambda *args, name=name, function=function, **options: asked.add(name) or function(*args, **options))
    monkeypatch.setattr(extension, "kernels", recorded)
    monkeypatch.setattr(right, "STEEPNESS", 1.0)
    profile.small((140, 300, 24, 40))
    assert {"rows", "sweep"} <= asked and all(any(word in name for name in asked) for word in ("gather", "scatter"))


# On a GPU a test asks for the GPU


def test_backend_that_has_a_gpu_but_no_extension_is_not_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(pytest.fail.Exception, match="there is a GPU"):
        cuda_emulated.module()


def test_records_are_json(capsys):
    from benchmarks.gpu_suite.journal import emit

    emit(kind="rate", gbps=float("nan"), path=Path("/a"), nested=[{"x": float("inf")}])
    assert json.loads(capsys.readouterr().out) == {"kind": "rate", "gbps": "nan", "path": "/a", "nested": [{"x": "inf"}]}
