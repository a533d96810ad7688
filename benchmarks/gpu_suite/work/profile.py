"""What the counters say of the slowest kernels of a step, and what the sanitizer says of the kernels in CUDA C++.

python -m benchmarks.gpu_suite.work.profile step 8192 128256 2048 4096      # what ncu looks at: two steps of the loss
python -m benchmarks.gpu_suite.work.profile small 260 5000 256 512          # what compute-sanitizer looks at
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from unittest import mock

import torch

import distill_kernels
from benchmarks import cases
from benchmarks.gpu_suite.journal import emit
from benchmarks.gpu_suite.work.machine import device, has_gpu
from benchmarks.gpu_suite.work.right import MODELS, Sizes, forced, problem_of
from distill_kernels.call import worthwhile

SLOWEST = 3
# Of ncu: what a kernel's time, its share of what memory and processors can do, and its registers are called there.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of its peak",
    "dram__bytes.sum": "memory moved",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "processors, % of their peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "launch__registers_per_thread": "registers",
}
FAULTS = 99  # exit code of compute-sanitizer where it found any
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY.*")


def steps(sizes: Sizes) -> None:
    """Two of the loss with its gradients in bfloat16: the first compiles."""
    backend = "triton" if has_gpu() else "torch"
    with torch.device(device()):
        tensors = cases.Case("", *sizes).tensors(torch.bfloat16)
    leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(tensors)]
    for _ in range(2):
        cases.forward_backward(cases.fused(backend))(*leaves)


def slowest(sizes: Sizes) -> list[str]:
    """Names of the kernels that take most of a step by torch's profiler; a record of each."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if has_gpu() else activity.CPU]) as profiled:
        steps(sizes)
    attribute = "self_device_time_total" if has_gpu() else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: getattr(event, attribute), reverse=True)
    whole = sum(getattr(event, attribute) for event in events) or 1
    for event in events[:12]:
        micros = getattr(event, attribute)
        words = f"{micros / event.count / 1e3:.3f} ms, {event.count} times, {micros / whole:.0%} of all"
        emit(kind="profile", what=event.key[:120], words=words, milliseconds=micros / event.count / 1e3, calls=event.count)
    return [event.key for event in events[:SLOWEST]]


def counters(sizes: Sizes) -> None:
    """ncu on the slowest kernels, clocks left as they are."""
    ncu = shutil.which("ncu")
    if ncu is None:
        emit(kind="profile", what="counters", reason="there is no ncu on the PATH")
        return
    names = "|".join(re.escape(name.split("(")[0].split("<")[0].split(" ")[-1].split("::")[-1]) for name in slowest(sizes))
    command = [ncu, "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(METRICS), "--kernel-name-base", "function"]
    command += ["--kernel-name", f"regex:({names})", "--launch-count", str(4 * SLOWEST), *program("step", sizes)]
    ran = subprocess.run(command, capture_output=True, text=True)
    found = list(rows_of(ran.stdout.splitlines()))
    for row in found:
        words = ", ".join(f"{name} {value}" for name, value in row["counters"].items())
        emit(kind="profile", what=f"ncu: {row['kernel']}"[:140], words=words, counters=row["counters"])
    if not found:
        emit(kind="profile", what="counters", reason=f"ncu ended with {ran.returncode} and no row: {(ran.stdout + ran.stderr)[-800:]}")


def rows_of(lines: Iterable[str]) -> Iterable[dict]:
    """Of what ncu prints: {"kernel", "counters": {name: value with its unit}}. Names of columns, then units, then a row for each launch."""
    table = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(table) < 3:
        return
    head, units = table[0], table[1]
    for values in table[2:]:
        row = dict(zip(head, values, strict=True))
        unit = dict(zip(head, units, strict=True))
        counted = {name: f"{row[metric]} {unit[metric]}".strip() for metric, name in METRICS.items() if metric in row}
        yield {"kernel": row["Kernel Name"], "counters": counted}


def program(what: str, sizes: Sizes) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_suite.work.profile", what, *map(str, sizes)]


def small(sizes: Sizes) -> None:
    """Every kernel of the cuda backend, by every cluster size: loss and gradients, the value alone, sampled columns."""
    tensors = problem_of(sizes, torch.bfloat16)
    made = {key: value.clone().requires_grad_(key in MODELS[:2]) for key, value in tensors.items()}
    for cluster in (1, 2, 4):
        with forced(cluster, cluster), mock.patch.multiple(worthwhile, LEAST_TOKENS=1, LEAST_VOCABULARY=1):
            for options in ({}, {"column_fraction": 0.25, "seed": 0}):
                distill_kernels.distillation_loss(**made, **options, backend="cuda").backward()
            with torch.no_grad():
                distill_kernels.distillation_loss(**tensors, backend="cuda")


def sanitized(tool: str, sizes: Sizes) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        emit(kind="profile", what=f"sanitizer: {tool}", reason="there is no compute-sanitizer on the PATH")
        return
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FAULTS), *program("small", sizes)]
    # Each tensor an allocation of its own: in the blocks of torch's cache nothing would be out of bounds.
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    said = ran.stdout + ran.stderr
    summary = SUMMARY.search(said)
    if ran.returncode == 0 and summary is not None:
        emit(kind="profile", what=f"sanitizer: {tool}", words=summary[0])
    else:
        emit(kind="profile", what=f"sanitizer: {tool}", reason=f"exit code {ran.returncode}: {json.dumps(said[-1500:])}")


if __name__ == "__main__":
    {"step": steps, "small": small}[sys.argv[1]](tuple(map(int, sys.argv[2:])))
