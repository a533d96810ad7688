"""Peak memory above the inputs and the gradients, of forward + backward and of forward alone, each measurement in its own process.

    python -m pytest -c benchmarks/pytest.ini benchmarks/timing/bench_memory.py

The kernel's high-water mark of resident memory is reset once the inputs exist and a small call has loaded all code; what it reads
after the step, less resident memory before and the bytes of the returned gradients, is the figure. Results go to results/memory.csv.
A float16 or bfloat16 head's gradient is accumulated in float32, which `plan` counts as gradient; it is reported here in a column
of its own, for it is memory above the inputs and the returned gradients.
"""

import json
import subprocess
import sys

import pytest
import torch

import distill_kernels
from benchmarks import cases, record
from distill_kernels.api.measuring import peak_memory
from distill_kernels.call.problem import WORKSPACE_MIB
from distill_kernels.call.worthwhile import LEAST_TOKENS

TOKENS = (64, 256, 1024, 4096, 16384)
SHAPES = ((49152, 576, 576), (129280, 1024, 2048), (262144, 640, 640))
LIMIT_GIB = 14  # eager runs that would need more are left out
FORWARD_MIB = 32
SWEPT_MIB = 48
MIB = 2**20

rows = []


@pytest.fixture(scope="module", autouse=True)
def results():
    yield
    if rows:
        print(f"\nwritten: {record.write('memory', rows, ('tokens', 'vocabulary', 'dtype', 'variant'))}")


def measure(tokens, vocabulary, student_dim, teacher_dim, dtype, variant) -> dict:
    """One step in this process; bytes."""

    options = {"column_fraction": 0.08, "sweep": "int8", "sweep_tolerance": None} if variant == "native-int8" else {}
    loss = cases.eager if variant == "eager" else cases.fused(variant.partition("-")[0], **options)
    step = cases.forward_only(loss) if variant.endswith("-forward") else cases.forward_backward(loss)
    step(*cases.Case("warm-up", 96, 8192, 16, 16).tensors(dtype))
    tensors = cases.Case("", tokens, vocabulary, student_dim, teacher_dim).tensors(dtype)
    if options:  # both heads are prepared: their copies are inputs
        heads = [distill_kernels.prepare_head(weight) for weight in (tensors[1], tensors[3])]
        for head in heads:
            head.quantised("int8")
        step = cases.forward_backward(lambda hidden, _, teacher_hidden, __: loss(hidden, heads[0], teacher_hidden, heads[1]))
    peak = peak_memory.above(lambda: step(*tensors), tensors[0].device)
    made = [t.grad for t in tensors[:2] if t.grad is not None]
    gradients = sum(gradient.nbytes for gradient in made)
    accumulators = sum(gradient.numel() * 4 for gradient in made) if dtype.itemsize < 4 else 0
    return {"above": peak - gradients, "gradients": gradients, "accumulators": accumulators}


@pytest.mark.parametrize("variant", ["native", "native-forward", "native-int8", "torch", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"v{s[0]}-d{s[1]}")
@pytest.mark.parametrize("tokens", TOKENS)
def bench_peak_memory(benchmark, tokens, shape, dtype, variant):
    if variant == "eager" and 5 * 4 * tokens * shape[0] > LIMIT_GIB * 2**30:
        pytest.skip(f"eager would hold about {5 * 4 * tokens * shape[0] / 2**30:.0f} GiB of logits")
    if variant == "native-int8" and tokens < LEAST_TOKENS:
        pytest.skip("the exact loss runs")
    call = [sys.executable, "-m", "benchmarks.timing.bench_memory", str(tokens), *map(str, shape), dtype, variant]
    result = benchmark.pedantic(lambda: subprocess.run(call, capture_output=True, text=True, check=True), rounds=1)
    measured = json.loads(result.stdout)
    rows.append(
        {
            "tokens": tokens,
            "vocabulary": shape[0],
            "student_dim": shape[1],
            "teacher_dim": shape[2],
            "dtype": dtype,
            "variant": variant,
            "workspace_mib": WORKSPACE_MIB if variant != "eager" else "",
            "mib_above_inputs_and_gradients": measured["above"] / MIB,
            "of_which_float32_accumulators_mib": measured["accumulators"] / MIB if variant != "eager" else 0,
            "gradients_mib": measured["gradients"] / MIB,
        }
    )
    if variant != "eager":
        # What torch's library of products keeps for itself is beyond the torch backend's reach.
        allowed = {"native-forward": FORWARD_MIB, "native": WORKSPACE_MIB, "native-int8": SWEPT_MIB}.get(variant, WORKSPACE_MIB + 24)
        assert measured["above"] - measured["accumulators"] <= allowed * MIB, f"more than {allowed} MiB"


if __name__ == "__main__":
    *sizes, dtype, variant = sys.argv[1:]
    print(json.dumps(measure(*map(int, sizes), getattr(torch, dtype), variant)))
