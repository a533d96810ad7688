"""The GPU suite, run to its end at tiny sizes, and its watchdog."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)
ROOT = Path(__file__).resolve().parent.parent
STAGES = {"environment", "peaks", "rows", "tests", "tiny:bfloat16", "tiny:float32"}


def suite(*arguments):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # it sets that itself
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


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
    assert {"products", "eager"} <= {row["variant"] for row in rows}
    assert {path.name for path in tmp_path.iterdir()} == {"suite.json", "latency.csv", "tests.txt"}


def test_stage_that_hangs_is_killed_and_says_where(tmp_path):
    made = suite(tmp_path, "--dry-run", "--stage", "tests", "--limit", "1")
    assert made.returncode == 1
    assert "Timeout" in made.stderr and "gpu_suite.py" in made.stderr
    assert not list(tmp_path.glob("*.stage"))


def test_suite_without_time_reports_what_it_left_out(tmp_path):
    made = suite(tmp_path, "--dry-run", "--minutes", "0.01")
    assert made.returncode == 1
    found = json.loads((tmp_path / "suite.json").read_text()) if (tmp_path / "suite.json").exists() else None
    assert found is not None and all(result == {"failed": "no time left"} for result in found["stages"].values())
