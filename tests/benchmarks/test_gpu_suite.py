"""The GPU suite: run to its end at tiny sizes, its watchdog, and what it would do on a GPU."""

import csv
import json
import math
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

import cuda_emulated

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.gpu_suite import case as gpu_case
from benchmarks.gpu_suite import suite as gpu_suite
from distill_kernels.backends.cuda import extension, launch

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"environment", "peaks", "rows", "tests", "tiny:bfloat16", "tiny:float32"}


def suite(*arguments):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # it sets that itself
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


@pytest.mark.exhaustive
def test_dry_run_runs_to_its_end(tmp_path):
    made = suite(tmp_path, "--dry-run")
    assert made.returncode == 0, made.stdout + made.stderr
    found = json.loads((tmp_path / "suite.json").read_text())
    assert set(found["stages"]) == STAGES and found["dry_run"] is True
    assert found["stages"]["tests"]["passed"] == found["stages"]["tests"]["collected"] > 0
    assert "passed" in (tmp_path / "tests.txt").read_text()
    rows = list(csv.DictReader((tmp_path / "latency.csv").open()))
    ours = [row for row in rows if row["variant"] == "ours"]
    assert {(row["dtype"], row["direction"]) for row in ours} == {
        (d, w) for d in ("bfloat16", "float32") for w in ("forward", "forward+backward")
    }
    for row in ours:
        assert math.isfinite(float(row["milliseconds"])) and float(row["to_products"]) > 0
        if row["direction"] == "forward+backward":
            assert float(row["error"]) < (1e-2 if row["dtype"] == "bfloat16" else 1e-5)
    assert {"products", "eager", "ours, 8% of columns", "ours (cross entropy)"} <= {row["variant"] for row in rows}
    peaks = found["stages"]["peaks"]
    for row in rows:
        assert float(row["of_cublas"]) == pytest.approx(float(row["tflops"]) / peaks[f"{row['dtype']}_tflops"], rel=1e-4)
        assert float(row["of_copy"]) == pytest.approx(float(row["gbps"]) / peaks["copy_gbps"], rel=1e-4)
        if "%" in row["variant"]:
            assert 0 < float(row["least"]) <= float(row["error"]) <= float(row["bound"])
    kernels = dict(found["stages"]["rows"])
    assert isinstance(kernels.pop("cuda", None), str) or "cuda 4x300" in kernels  # why it cannot run, or what it reached
    assert "triton 4x300" in kernels and all(kernel["of_copy"] > 0 for kernel in kernels.values())
    assert " of cuBLAS of copy " in made.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"suite.json", "latency.csv", "tests.txt"}


def test_stage_that_hangs_is_killed_and_says_where(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", str(tmp_path), "--dry-run", "--stage", "tests", "--limit", "1"]
    failure = gpu_suite.watched(command, 60, cwd=ROOT)
    assert failure.startswith("exit code 1:") and "Timeout" in failure and "suite.py" in failure
    assert not list(tmp_path.glob("*.stage"))


@pytest.mark.parametrize("end, failure", [("time.sleep(600)", "killed after 1 s"), ("os._exit(3)", "exit code 3: "), ("pass", None)])
def test_what_a_stage_started_ends_with_it(end, failure, tmp_path, monkeypatch):
    """As pytest's processes, which a stage starts: they would keep the GPU busy while what comes next is timed."""
    program = f"""
import os, pathlib, subprocess, sys, time
quiet = subprocess.DEVNULL
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=quiet, stderr=quiet)
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
{end}
"""
    communicate = subprocess.Popen.communicate

    def after_it_started(self, timeout):
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        return communicate(self, timeout=timeout - 5)  # not the time that a stage has to say where it hangs

    monkeypatch.setattr(subprocess.Popen, "communicate", after_it_started)
    assert gpu_suite.watched([sys.executable, "-c", program], 1) == failure
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")


def test_suite_without_time_reports_what_it_left_out(tmp_path):
    made = suite(tmp_path, "--dry-run", "--minutes", "0.01")
    assert made.returncode == 1
    found = json.loads((tmp_path / "suite.json").read_text()) if (tmp_path / "suite.json").exists() else None
    assert found is not None and all(result == {"failed": "no time left"} for result in found["stages"].values())


# A case in this process, with losses of torch alone.

FEW = Case("few", 8, 50, 6, 10)


def run_case(monkeypatch, found, report=lambda rows: None):
    plain = dict.fromkeys(("ours", "eager", "torch backend"), gpu_case.Variant(cases.eager))
    monkeypatch.setattr(gpu_case, "variants", lambda: plain | found)
    gpu_case.run_case(FEW, torch.float32, 0.1, report)


def test_case_that_is_killed_leaves_what_it_had_measured(tmp_path, monkeypatch):
    calls = []

    def hangs(*tensors):
        calls.append(1)
        if len(calls) > 5:  # gate, twice for memory, two rounds
            raise KeyboardInterrupt
        return cases.eager(*tensors)

    path = tmp_path / "a.stage"
    with pytest.raises(KeyboardInterrupt):
        run_case(monkeypatch, {"late": gpu_case.Variant(hangs)}, lambda rows: gpu_suite.leave({"rows": rows}, path))
    rows = json.loads(path.read_text())["rows"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.stage"}
    assert {row["variant"]: row["rounds"] for row in rows if "milliseconds" in row} == dict.fromkeys(
        ("products", "ours", "eager", "torch backend", "late"), 2
    )
    assert {row["failed"] for row in rows if row["direction"] == "forward"} == {"not reached"}


def test_suite_keeps_what_a_killed_case_had_measured(tmp_path, monkeypatch):
    named = {"case": "tiny", "dtype": "float32", "direction": "forward", "variant": "ours"}
    row = named | {"milliseconds": 1.0, "tflops": 3.0, "peak_mib": 1.0}

    def killed(command, limit, **options):
        name = command[command.index("--stage") + 1]
        result = {"float32_tflops": 4.0, "copy_gbps": 1.0} if name == "peaks" else {"rows": [row, row | {"variant": "eager"}]}
        gpu_suite.leave(result, gpu_suite.stage_file(name, tmp_path))
        return None if name == "peaks" else "killed after 60 s"

    monkeypatch.setattr(gpu_suite, "watched", killed)
    monkeypatch.setattr(gpu_suite, "stages", lambda dry: {"peaks": 60, "tiny:float32": 60})
    monkeypatch.setattr(sys, "argv", ["gpu_suite", str(tmp_path), "--dry-run"])
    assert gpu_suite.main() == 1
    kept = json.loads((tmp_path / "suite.json").read_text())["stages"]["tiny:float32"]
    assert kept["failed"] == "killed after 60 s" and [r["of_cublas"] for r in kept["rows"]] == [0.75, 0.75]
    assert len(list(csv.DictReader((tmp_path / "latency.csv").open()))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"suite.json", "latency.csv"}


def test_what_is_timed_has_been_compiled_for_its_shape_and_no_other(monkeypatch):
    seen = []

    def recorded(*tensors):
        seen.append(len(tensors[0]))
        return cases.eager(*tensors)

    monkeypatch.setattr(gpu_case, "GATE_TOKENS", 4)
    monkeypatch.setattr(torch.compiler, "reset", lambda: seen.append("reset"))
    monkeypatch.setattr(gpu_case, "interleaved", lambda *args, **options: seen.append("timed"))
    run_case(monkeypatch, {"compiled": gpu_case.Variant(recorded)})
    assert seen[: seen.index("timed")] == [4, "reset", 8, 8]


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(gpu_case, "has_gpu", lambda: True)


def test_torch_compile_is_asked_for_a_graph_of_fixed_shapes(monkeypatch, on_gpu):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.update(options) or function)
    assert "compiled" in gpu_case.variants() and asked == {"dynamic": False}


@pytest.mark.parametrize("there", [False, True])
def test_liger_is_run_as_its_users_run_it_on_a_gpu_only(there, monkeypatch):
    asked = {}
    module = types.ModuleType("liger_kernel.chunked_loss")
    module.LigerFusedLinearJSDLoss = lambda **options: asked.update(options)
    for name in ("liger_kernel", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    monkeypatch.setattr(gpu_case, "has_gpu", lambda: there)
    assert "liger" in gpu_case.peers() and asked["compiled"] is there
    cases.peers()
    assert asked["compiled"] is False


def test_variants_have_the_flops_and_bytes_of_what_they_make():
    n, v, s, t = FEW.tokens, FEW.vocabulary, FEW.student_dim, FEW.teacher_dim
    found = gpu_case.variants()
    assert found["ours"].flops(FEW, True) == FEW.product_flops and found["ours"].flops(FEW, False) == FEW.forward_flops
    assert found["ours (cross entropy)"].flops(FEW, True) == 6 * n * v * s
    assert found["ours, 8% of columns"].flops(FEW, True) == pytest.approx(2 * n * v * (s + t + 0.16 * s))
    assert found["ours"].bytes(FEW, True, 2) == 2 * (n + v) * (2 * s + t) and found["ours"].bytes(FEW, False, 4) == 4 * (n + v) * (s + t)
    assert found["ours (cross entropy)"].bytes(FEW, True, 2) == 2 * (n + v) * 2 * s


@pytest.mark.parametrize("factor", [0.05, 3.0])
def test_estimate_that_errs_otherwise_than_it_predicts_is_not_timed(factor, monkeypatch):
    rows = []
    biased = gpu_case.Variant(lambda *tensors: cases.eager(*tensors) * (1 + factor), predicted=lambda *tensors: 0.5)
    run_case(monkeypatch, {"biased": biased}, lambda made: rows.__setitem__(slice(None), made))
    assert {row["variant"]: row.get("failed") for row in rows if row["direction"] == "forward+backward"} == {
        "products": None, "ours": None, "eager": None, "torch backend": None, "biased": "wrong gradients",
    }  # fmt: skip


@pytest.mark.exhaustive
def test_test_stage_takes_every_test_of_both_backends():
    def collected(*arguments):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", *arguments]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        return {line for line in listed.splitlines() if "::" in line}

    of_backends = collected(*(name for name in gpu_suite.TEST_FILES if "triton" in name or "cuda" in name))
    chosen = collected("-k", gpu_suite.TESTS, *gpu_suite.TEST_FILES)
    sampled = chosen - of_backends
    assert of_backends < chosen and all("triton]" in name or name.endswith("test_every_backend_keeps_the_same_columns") for name in sampled)
    assert len(sampled) >= 10


def test_rows_of_both_backends_are_timed_side_by_side_where_cuda_can_run(monkeypatch):
    monkeypatch.setattr(extension, "kernels", None)
    assert set(gpu_suite.rows(dry=True)) == {"cuda", "triton 4x300"} and "ours, cuda" not in gpu_case.variants()
    monkeypatch.setattr(extension, "kernels", cuda_emulated.module())
    launch.limits.cache_clear()
    found = gpu_suite.rows(dry=True)
    launch.limits.cache_clear()
    assert set(found) == {"triton 4x300", "cuda 4x300"} and all(row["gbps"] > 0 for row in found.values())
    # Each logit of both models twice, or once by a kernel whose shared memory has room for 300; dz of two bytes.
    assert [found[f"{name} 4x300"]["bytes"] for name in ("triton", "cuda")] == [4 * 300 * 18, 4 * 300 * 10]
    variants = gpu_case.variants()
    assert variants["ours, cuda"].flops(FEW, True) == FEW.product_flops
    assert variants["ours, cuda, 8% of columns"].flops(FEW, True) == variants["ours, 8% of columns"].flops(FEW, True)


@pytest.mark.parametrize("there", [False, True])
def test_cuda_is_timed_without_gradients_too_where_it_can_run(there, monkeypatch):
    rows = []
    found = {"ours, cuda": gpu_case.Variant(cases.eager)} if there else {}
    run_case(monkeypatch, found, lambda made: rows.__setitem__(slice(None), made))
    timed = {row["variant"] for row in rows if row["direction"] == "forward" and row["milliseconds"] > 0}
    assert timed == {"products", "ours", "eager", *found}
