"""Time and gradient error of column-sampled gradients, against the exact ones of the same backend, the products alone, eager and Liger.

    python -m pytest -c benchmarks/pytest.ini benchmarks/bench_columns.py            # about 8 minutes on two cores

Interleaved as in bench_latency.py. Observed errors are of one sample each, root mean square over three seeds; predicted ones are those of
the stats. Results go to results/columns.csv.
"""

import time

import pytest
import torch

import distill_kernels
from benchmarks import cases, record

FRACTIONS = (0.04, 0.08, 0.16)
ROUNDS = 3
LARGE = 129280
CASES = {"smollm2-512": (512, None), "smollm2-2048": (2048, None), "smollm2-v129280-512": (512, LARGE)}

rows = []


@pytest.fixture(scope="module", autouse=True)
def results():
    yield
    if rows:
        print(f"\nwritten: {record.write('columns', rows, ('case', 'dtype', 'variant'))}")


def tensors_of(tokens, vocabulary, dtype):
    """SmolLM2's states and head; a larger vocabulary has, beside its 49,152 real rows, means of two of them each.

    Such a row's logit is the mean of two real ones: as peaked a softmax as the real one, with a longer tail.
    """
    made = [t.detach() for t in cases.Case("", tokens, 49152, 576, 576, real=True).tensors()]
    if vocabulary is not None:
        generator = torch.Generator().manual_seed(0)
        pairs = torch.randint(49152, (2, vocabulary - 49152), generator=generator)
        for i in (1, 3):
            made[i] = torch.cat([made[i], (made[i][pairs[0]] + made[i][pairs[1]]) / 2])
    return [t.to(dtype).requires_grad_(i < 2) for i, t in enumerate(made)]


def errors(tensors, exact, fraction):
    """Relative errors of d_hidden and d_weight: (observed (2,), predicted (2,))."""
    observed, predicted = torch.zeros(2), torch.zeros(2)
    for seed in range(3):
        tensors[0].grad = tensors[1].grad = None
        loss, stats = distill_kernels.distillation_loss_and_stats(*tensors, column_fraction=fraction, seed=seed, backend="native")
        loss.backward()
        observed += torch.stack([((t.grad.float() - g).norm() / g.norm()).square() for t, g in zip(tensors[:2], exact, strict=True)])
        predicted += stats.gradient_error.square()
    return (observed / 3).sqrt(), (predicted / 3).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def bench_columns(benchmark, case, dtype):
    tokens, vocabulary = CASES[case]
    tensors = tensors_of(tokens, vocabulary, dtype)
    steps = {"products": cases.all_products(*(t.detach() for t in tensors[:2])), "forward products": cases.forward_products}
    steps["exact"] = cases.forward_backward(cases.fused("native"))
    steps |= {f: cases.forward_backward(cases.fused("native", column_fraction=f)) for f in FRACTIONS}
    if tokens < 1024:
        steps |= {"eager": cases.forward_backward(cases.eager)}
        steps |= {name: cases.forward_backward(loss) for name, loss in cases.peers().items() if name == "liger"}
    steps["exact"](*tensors)
    exact = [t.grad.float().clone() for t in tensors[:2]]
    found = {f: errors(tensors, exact, f) for f in FRACTIONS}
    samples = {name: [] for name in steps}

    def each():
        for name, step in steps.items():
            step(*tensors)
            begin = time.perf_counter()
            step(*tensors)
            samples[name].append(time.perf_counter() - begin)

    benchmark.pedantic(each, rounds=ROUNDS, warmup_rounds=0)
    medians = {name: record.quartiles(times)["median"] for name, times in samples.items()}
    for name, median in medians.items():
        row = {"case": case, "tokens": tokens, "vocabulary": len(tensors[1]), "dtype": str(dtype).removeprefix("torch."), "variant": name}
        row |= {f"to_{other.replace(' ', '_')}": median / medians[other] for other in ("exact", "products", "forward products")}
        row |= {"seconds": median, "rounds": ROUNDS}
        if name in found:
            (hidden, weight), (hidden_predicted, weight_predicted) = (pair.tolist() for pair in found[name])
            row |= {"d_hidden_error": hidden, "d_hidden_predicted": hidden_predicted}
            row |= {"d_weight_error": weight, "d_weight_predicted": weight_predicted}
            print(
                f"\n{case} {dtype} {name}: {row['to_exact']:.2f} of exact, {row['to_products']:.2f} of the products, "
                f"{row['to_forward_products']:.2f} of the forward ones; errors {hidden:.4f} ({hidden_predicted:.4f}), {weight:.4f} "
                f"({weight_predicted:.4f})"
            )
        rows.append(row)
