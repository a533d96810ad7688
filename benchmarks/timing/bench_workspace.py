"""Forward + backward at several sizes of the workspace, against the four matrix products alone: what the default was chosen by.

    python -m pytest -c benchmarks/pytest.ini benchmarks/timing/bench_workspace.py          # about 4 minutes on two cores

Interleaved as in bench_latency.py. Results go to results/workspace.csv.
"""

import time

import pytest
import torch

from benchmarks import cases, record

SIZES = (64, 96, 128, 192, 256)  # MiB
ROUNDS = 3

rows = []


@pytest.fixture(scope="module", autouse=True)
def results():
    yield
    if rows:
        print(f"\nwritten: {record.write('workspace', rows, ('case', 'dtype', 'workspace_mib'))}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", cases.LATENCY_CASES, ids=lambda c: c.name)
def bench_workspace(benchmark, case, dtype):
    tensors = case.tensors(dtype)
    steps = {0: cases.all_products(*(t.detach() for t in tensors[:2]))}
    steps |= {mib: cases.forward_backward(cases.fused("native", workspace_mib=mib)) for mib in SIZES}
    samples = {mib: [] for mib in steps}

    def each():
        for mib, step in steps.items():
            step(*tensors)
            begin = time.perf_counter()
            step(*tensors)
            samples[mib].append(time.perf_counter() - begin)

    benchmark.pedantic(each, rounds=ROUNDS, warmup_rounds=1)
    medians = {mib: record.quartiles(times[1:])["median"] for mib, times in samples.items()}
    for mib in SIZES:
        rows.append(
            {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "workspace_mib": mib, "to_products": medians[mib] / medians[0]}
        )
    print(f"\n{case.name} {dtype}: of the products alone " + ", ".join(f"{mib} MiB {medians[mib] / medians[0]:.3f}" for mib in SIZES))
