"""The register tiles alone, one thread, against the fused-multiply-add peak of one core measured in the same run.

    python -m pytest -c benchmarks/pytest.ini benchmarks/timing/bench_kernel.py             # seconds

Rounds of both alternate; the share is of medians. Results go to results/kernel.csv.
"""

import time

import pytest
import torch

from benchmarks import record
from distill_kernels.backends import native

ROUNDS = 21
PANEL = 64
ROWS, DEPTHS = 96, (64, 192, 288, 512)  # a block of a head, and depths of the three products

rows = []


@pytest.fixture(scope="module", autouse=True)
def results():
    yield
    if rows:
        print(f"\nwritten: {record.write('kernel', rows, ('compiled_for', 'depth'))}")


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("instruction_set", [name for name in native.instruction_sets() if name != "avx512bf16"])
def bench_share_of_peak(benchmark, instruction_set, depth):
    a, b, c = torch.randn(ROWS, depth), torch.randn(depth, PANEL), torch.empty(ROWS, PANEL)
    repeats = max(1, int(2e9 / (2 * ROWS * PANEL * depth)))
    peaks, rates = [], []

    def multiply():
        for _ in range(repeats):
            native._native.multiply(a.data_ptr(), b.data_ptr(), c.data_ptr(), ROWS, depth, instruction_set)

    multiply()
    torch.testing.assert_close(c, a @ b, rtol=1e-4, atol=1e-4)
    for _ in range(ROUNDS):
        peaks.append(native._native.multiply_add_rate(2_000_000, instruction_set))
        begin = time.perf_counter()
        multiply()
        rates.append(repeats * 2 * ROWS * PANEL * depth / (time.perf_counter() - begin))
    benchmark.pedantic(multiply, rounds=1)
    peak, rate = (record.quartiles(samples)["median"] for samples in (peaks, rates))
    rows.append({"compiled_for": instruction_set, "depth": depth, "peak_gflops": peak / 1e9, "gflops": rate / 1e9, "share": rate / peak})
    print(f"\n{instruction_set}, depth {depth}: {rate / 1e9:.1f} of {peak / 1e9:.1f} GFLOP/s, {rate / peak:.1%}")
