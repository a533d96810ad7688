"""Time and gradient error of column-sampled gradients, against the exact ones of the same backend, the products alone, eager and Liger.

    python -m pytest -c benchmarks/pytest.ini benchmarks/timing/bench_columns.py            # about 15 minutes on two cores
    python -m pytest -c benchmarks/pytest.ini benchmarks/timing/bench_columns.py -k bench_columns

A student of SmolLM2 after 60 steps of distillation (`distil_curves.trained_pair`, 2 minutes), on held-out text. Interleaved as in
bench_latency.py. Observed errors are root mean square over three seeds; predicted ones are those of the stats. Results go to
results/columns.csv. bench_chunk has the chunks that the default was chosen by (results/columns_chunk.csv), bench_break_even where sampling
stops to pay (results/columns_break_even.csv).
"""

import time

import pytest
import torch

import distill_kernels
from benchmarks import cases, record
from benchmarks.students import distil_curves
from distill_kernels.backends import native
from distill_kernels.call import worthwhile

FRACTIONS = (0.04, 0.08, 0.16)
ROUNDS = 5
LARGE = 129280
CASES = {"smollm2-512": (512, None), "smollm2-2048": (2048, None), "smollm2-v129280-512": (512, LARGE)}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))

rows, chunk_rows, even_rows = [], [], []


@pytest.fixture(scope="module", autouse=True)
def results():
    yield
    for name, measured, key in (
        ("columns", rows, ("case", "dtype", "temperature", "variant")),
        ("columns_chunk", chunk_rows, ("dtype", "chunk_tokens")),
        ("columns_break_even", even_rows, ("tokens", "vocabulary", "dim", "dtype", "variant")),
    ):
        if measured:
            print(f"\nwritten: {record.write(name, measured, key)}")


def tensors_of(tokens, vocabulary, dtype):
    """States of both models and their heads; a larger vocabulary has, beside its 49,152 real rows, means of two of them each.

    Such a row's logit is the mean of two real ones: as peaked a softmax as the real one, with a longer tail.
    """
    made = [t[:tokens] if i % 2 == 0 else t for i, t in enumerate(distil_curves.trained_pair())]
    if vocabulary is not None:
        generator = torch.Generator().manual_seed(0)
        pairs = torch.randint(49152, (2, vocabulary - 49152), generator=generator)
        for i in (1, 3):
            made[i] = torch.cat([made[i], (made[i][pairs[0]] + made[i][pairs[1]]) / 2])
    return [t.to(dtype).clone().requires_grad_(i < 2) for i, t in enumerate(made)]


def errors(tensors, exact, fraction, **options):
    """Relative errors of d_hidden and d_weight: (observed (2,), predicted (2,))."""
    observed, predicted = torch.zeros(2), torch.zeros(2)
    for seed in range(3):
        tensors[0].grad = tensors[1].grad = None
        options |= {"column_fraction": fraction, "seed": seed, "backend": "native"}
        loss, stats = distill_kernels.distillation_loss_and_stats(*tensors, **options)
        loss.backward()
        observed += torch.stack([((t.grad.float() - g).norm() / g.norm()).square() for t, g in zip(tensors[:2], exact, strict=True)])
        predicted += stats.gradient_error.square()
    return (observed / 3).sqrt(), (predicted / 3).sqrt()


def exact_gradients(tensors, **options):
    cases.forward_backward(cases.fused("native", **options))(*tensors)
    return [t.grad.float().clone() for t in tensors[:2]]


def error_columns(found):
    names = ("d_hidden_error", "d_weight_error", "d_hidden_predicted", "d_weight_predicted")
    return dict(zip(names, torch.cat(found).tolist(), strict=True))


def medians_of(benchmark, steps, tensors, rounds=ROUNDS):
    """Median seconds of each step, the second of two, in turns."""
    samples = {name: [] for name in steps}

    def each():
        for name, step in steps.items():
            step(*tensors)
            begin = time.perf_counter()
            step(*tensors)
            samples[name].append(time.perf_counter() - begin)

    benchmark.pedantic(each, rounds=rounds, warmup_rounds=0)
    return {name: record.quartiles(times)["median"] for name, times in samples.items()}


@dtypes
@pytest.mark.parametrize("case", CASES)
def bench_columns(benchmark, case, dtype):
    tokens, vocabulary = CASES[case]
    tensors = tensors_of(tokens, vocabulary, dtype)
    found = {}
    for temperature in (1.0, 2.0):
        exact = exact_gradients(tensors, temperature=temperature)
        found |= {(temperature, f): errors(tensors, exact, f, temperature=temperature) for f in FRACTIONS}
    steps = {"products": cases.all_products(*(t.detach() for t in tensors[:2])), "forward products": cases.forward_products}
    steps["exact"] = cases.forward_backward(cases.fused("native"))
    steps |= {f: cases.forward_backward(cases.fused("native", column_fraction=f)) for f in FRACTIONS}
    steps |= {"eager": cases.forward_backward(cases.eager)}
    steps |= {name: cases.forward_backward(loss) for name, loss in cases.peers().items() if name == "liger"}
    medians = medians_of(benchmark, steps, tensors)
    here = {"case": case, "tokens": tokens, "vocabulary": len(tensors[1]), "dtype": str(dtype).removeprefix("torch.")}
    for name, median in medians.items():
        row = {**here, "temperature": 1.0, "variant": name}
        row |= {f"to_{other.replace(' ', '_')}": median / medians[other] for other in ("exact", "products", "forward products")}
        row |= {"seconds": median, "rounds": ROUNDS} | (error_columns(found[1.0, name]) if name in FRACTIONS else {})
        rows.append(row)
        print("\n" + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    rows.extend({**here, "temperature": 2.0, "variant": f} | error_columns(found[2.0, f]) for f in FRACTIONS)


@dtypes
def bench_chunk(benchmark, dtype, monkeypatch):
    """Fewer tokens to a chunk sample better, more multiply better."""
    sizes, steps, found = (48, 96, 192, 384), {}, {}
    run = cases.forward_backward(cases.fused("native", column_fraction=0.08, workspace_mib=256))
    tensors = tensors_of(768, None, dtype)
    exact = exact_gradients(tensors)
    for size in sizes:
        monkeypatch.setattr(native, "CHUNK_TOKENS", size)
        found[size] = errors(tensors, exact, 0.08, workspace_mib=256)

        def step(*tensors, size=size):
            native.CHUNK_TOKENS = size
            run(*tensors)

        steps[size] = step
    medians = medians_of(benchmark, steps, tensors)
    for size in sizes:
        row = {"dtype": str(dtype).removeprefix("torch."), "chunk_tokens": size, "to_192": medians[size] / medians[192]}
        chunk_rows.append(row | error_columns(found[size]))
        print(f"\n{chunk_rows[-1]}")


@dtypes
@pytest.mark.parametrize("vocabulary, dim", [(8192, 256), (8192, 2048), (16384, 576), (49152, 576)])
@pytest.mark.parametrize("tokens", [16, 64, 128])
def bench_break_even(benchmark, tokens, vocabulary, dim, dtype, monkeypatch):
    """Where sampling pays least; all of it with sampling forced, so that the bounds of `columns` can be judged."""
    monkeypatch.setattr(worthwhile, "LEAST_TOKENS", 1)
    tensors = cases.Case("", tokens, vocabulary, dim, dim).tensors(dtype)
    steps = {"exact": cases.forward_backward(cases.fused("native"))}
    steps |= {f: cases.forward_backward(cases.fused("native", column_fraction=f)) for f in (0.08, 0.4)}
    medians = medians_of(benchmark, steps, tensors, rounds=9)
    for name in (0.08, 0.4):
        row = {"tokens": tokens, "vocabulary": vocabulary, "dim": dim, "dtype": str(dtype).removeprefix("torch."), "variant": name}
        even_rows.append(row | {"to_exact": medians[name] / medians["exact"], "exact_milliseconds": medians["exact"] * 1e3})
        print(f"\n{even_rows[-1]}")
