"""The GPU suite: run to its end at tiny sizes, stages that go wrong, a disk that is full, and what it would do on a GPU."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

import gpu_suite_faults
from gpu_suite_faults import STAGES

from benchmarks.gpu_suite import report, runner, stages
from benchmarks.gpu_suite.journal import Journal, read

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "gpu_suite_faults"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
}
OUTPUT = {"suite.jsonl", "report.txt", "report.png", "log.txt"}


def suite(*arguments, **options):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, **options)


def rates(records):
    return {record["what"]: record["gbps"] for record in records if record["kind"] == "rate"}


def ends(records):
    return {record["stage"]: record["ended"] for record in records if record["kind"] == "stage"}


def test_dry_run_goes_through_every_stage(tmp_path):
    made = suite(tmp_path, "--dry-run")
    assert made.returncode == 0, made.stdout + made.stderr
    assert {path.name for path in tmp_path.iterdir()} == OUTPUT
    records = read(tmp_path / "suite.jsonl")
    assert ends(records) == {stage.name: "done" for stage in stages.all_stages(dry=True)}
    verdicts = [record for record in records if record["kind"] == "verdict"]
    right = {record["case"]: record for record in verdicts if "comparison" not in record}
    assert {name: right[name]["verdict"] for name in stages.RIGHT_TRITON} == dict.fromkeys(stages.RIGHT_TRITON, "PASS")
    assert right["triton chunked"]["chunks"] >= stages.CHUNKS and right["triton chunked"]["row_error"] > 0
    assert all("finds no GPU" in record["why"] for name, record in right.items() if name.startswith("cuda"))
    passed = {(record["comparison"], record["variant"]) for record in verdicts if "comparison" in record and record["verdict"] == "PASS"}
    for comparison in stages.all_stages(dry=True):
        if comparison.name.startswith("time: ") and "CUDA" not in comparison.name:
            assert (comparison.name.removeprefix("time: "), comparison.arguments[0].variants[0]) in passed
    times = [record for record in records if record["kind"] == "time"]
    # What was timed was found right before, at the same size.
    assert {(record["comparison"], record["variant"]) for record in times if record["variant"] != "products"} == passed
    assert all(record["milliseconds"] > 0 and record["to_products"] > 0 for record in times)
    tests = [record for record in records if record["kind"] == "test"]
    assert {record["outcome"] for record in tests} == {"passed"} and {record["test"].split("/")[2] for record in tests} == {
        "triton",
        "cuda",
    }
    for text in (made.stdout, (tmp_path / "report.txt").read_text()):
        assert "nothing went wrong" in text and "of cuBLAS" in text and "Liger" in text
    rows = {(row["comparison"], row["variant"]): row for row in report.timings(records)}
    headline = rows["headline", "ours"]
    (cublas,) = (record["tflops"] for record in records if record.get("what") == "products, bfloat16")
    assert headline["of_cublas"] == pytest.approx(headline["tflops"] / cublas)
    assert headline["to_eager"] == pytest.approx(headline["milliseconds"] / rows["headline", "eager"]["milliseconds"])


def test_stages_that_go_wrong_cost_themselves_alone(tmp_path, capsys):
    """Killed, hung, crashed, not compiled: what each had said is in the file, and all others' numbers, in the file and in the report."""
    assert runner.run(list(STAGES.values()), tmp_path, COMMAND, ENVIRONMENT, minutes=3) == 1
    records = read(tmp_path / "suite.jsonl")
    assert rates(records) == {
        "rate 10": 10.0, "before it hung": 1.0, "before it crashed": 2.0, "before it did not compile": 3.0, "rate 20": 20.0,
        "rate 30": 30.0,
    }  # fmt: skip
    assert ends(records) == {
        "first": "done", "hangs": "exit code 1", "hangs for good": "killed after 4 s", "crashes": "killed by SIGSEGV",
        "killed": "killed by SIGKILL", "does not compile": "exit code 1", "one of two": "done", "other of two": "killed by SIGSEGV",
        "last": "done",
    }  # fmt: skip
    said = {record["stage"]: record.get("said", "") for record in records if record["kind"] == "stage"}
    assert "Timeout" in said["hangs"] and "in hangs" in said["hangs"]  # where it hung
    assert "power of 2" in said["does not compile"]
    printed = capsys.readouterr().out
    for text in (printed, (tmp_path / "report.txt").read_text()):
        assert all(f"{what} " in text for what in rates(records)) and "6 things went wrong" in text


def test_report_is_made_of_a_file_that_was_cut_off(tmp_path):
    runner.run([STAGES["first"], STAGES["last"]], tmp_path, COMMAND, ENVIRONMENT, minutes=1)
    whole = (tmp_path / "suite.jsonl").read_bytes()
    (tmp_path / "report.txt").unlink()
    (tmp_path / "suite.jsonl").write_bytes(whole[: whole.index(b"rate 30")])  # within a line
    made = suite("--report", tmp_path / "suite.jsonl")
    assert made.returncode == 0 and "rate 10" in made.stdout and "rate 30" not in made.stdout
    assert (tmp_path / "report.txt").read_text() == made.stdout


def test_results_of_another_run_are_left_alone(tmp_path):
    (tmp_path / "suite.jsonl").write_text("{}")
    made = suite(tmp_path, "--dry-run")
    assert made.returncode == 2 and "of another run" in made.stderr and (tmp_path / "suite.jsonl").read_text() == "{}"


def test_what_a_stage_started_ends_with_it(tmp_path):
    runner.run([gpu_suite_faults.stage(str(tmp_path / "pid"), gpu_suite_faults.good)], tmp_path, COMMAND, ENVIRONMENT, minutes=1)
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")


def test_stage_for_which_no_time_is_left_says_so(tmp_path):
    assert runner.run([STAGES["first"]], tmp_path, COMMAND, ENVIRONMENT, minutes=0.05) == 1
    assert ends(read(tmp_path / "suite.jsonl")) == {"first": "no time left"}


def test_what_a_full_disk_refused_is_in_the_report(tmp_path, capsys):
    (tmp_path / "suite.jsonl").symlink_to("/dev/full")
    assert runner.run([STAGES["first"], STAGES["last"]], tmp_path, COMMAND, ENVIRONMENT, minutes=1) == 1
    printed = capsys.readouterr().out
    assert "rate 10 " in printed and "rate 30 " in printed and "is not whole: [Errno 28] No space left on device" in printed


def test_what_a_full_disk_refused_is_written_once_there_is_room(tmp_path):
    journal = Journal(tmp_path / "suite.jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a disk with room for a line and a part of one
        for number in range(4):
            journal.add({"kind": "rate", "what": f"rate {number}", "gbps": 1.0, "padding": "." * 20})
        assert journal.refused is not None and len(read(journal.path)) == 1 and journal.path.stat().st_size == 100
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.add({"kind": "rate", "what": "rate 4", "gbps": float("inf")})
    assert journal.refused is None and [record["what"] for record in read(journal.path)] == [f"rate {i}" for i in range(5)]
    assert json.loads(journal.path.read_bytes().splitlines()[-1])["gbps"] == "inf"


@pytest.mark.parametrize(
    "machine, without_cuda, word",
    [
        ({"gpu": None, "extension": "loaded"}, False, "finds no GPU"),
        ({"gpu": "one", "extension": "no module"}, False, "make gpu-bundle"),
        ({"gpu": "one", "extension": "no module"}, True, None),
        ({"gpu": "one", "extension": "loaded"}, False, None),
    ],
)
def test_suite_stops_where_what_it_needs_is_missing(machine, without_cuda, word):
    why = runner.why_stop(False, without_cuda)([{"kind": "machine", **machine}])
    assert why is None if word is None else word in why
    assert runner.why_stop(True, without_cuda)([{"kind": "machine", **machine}]) is None
    assert "did not say" in runner.why_stop(False, without_cuda)([])


def test_stop_ends_the_run_and_is_in_the_report(tmp_path):
    asked = []
    stop = lambda records: asked.append(1) or "of a reason"  # noqa: E731
    assert runner.run([STAGES["first"], STAGES["last"]], tmp_path, COMMAND, ENVIRONMENT, 1, stop) == 1
    assert rates(read(tmp_path / "suite.jsonl")) == {"rate 10": 10.0} and asked == [1]
    assert "stopped: of a reason" in (tmp_path / "report.txt").read_text()


def test_full_list_is_within_its_minutes_where_nothing_goes_wrong():
    """By the limits' halves, which is what stages are expected to take; and CUDA C++ comes after all of Triton's of its kind."""
    order, seconds = [], 0.0
    for stage in stages.all_stages(dry=False):
        name = stage.group or stage.name
        if name not in order:
            order.append(name)
            seconds += stage.seconds / 2
    assert seconds < runner.MINUTES * 60
    assert order.index("right: Triton") < order.index("right: CUDA") < order.index("ceilings") < order.index("time: headline")
    assert max(order.index(f"time: {one.name}") for one in stages.COMPARISONS) < order.index("time: CUDA C++")
    assert order[-2:] == ["tests: Triton", "tests: CUDA"]
    assert all(Path(ROOT, name).exists() for name in (*stages.TRITON_TESTS, *stages.CUDA_TESTS))
