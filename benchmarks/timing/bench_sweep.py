"""The quantised sweep: time against the products alone, the exact and the column-sampled loss, eager and Liger; its errors; and what
turning the rows before they are quantised is worth.

    python -m pytest -c benchmarks/pytest.ini benchmarks/timing/bench_sweep.py              # about 20 minutes on two cores
    python -m pytest -c benchmarks/pytest.ini benchmarks/timing/bench_sweep.py -k sweep_time

Students of SmolLM2 after 0, 20 and 60 steps of distillation (`distil_curves.trained_pairs`, 2 minutes), on held-out text; times with the
last. Interleaved as in bench_latency.py. The teacher's head is prepared, the student's is quantised in every step that is timed. Results
go to results/sweep.csv, sweep_errors.csv, sweep_quantisation.csv and sweep_pilot.csv.
"""

import pytest
import torch

import distill_kernels
from benchmarks import cases, record
from benchmarks.students import distil_curves
from benchmarks.timing.bench_columns import CASES, FRACTIONS, dtypes, exact_gradients, medians_of, tensors_of
from distill_kernels.call.worthwhile import kept_columns
from distill_kernels.estimators import quantised
from distill_kernels.estimators.columns import draw

ERROR_SEEDS = 6
time_rows, error_rows, quantisation_rows, pilot_rows = [], [], [], []


@pytest.fixture(scope="module", autouse=True)
def results():
    yield
    for name, measured, key in (
        ("sweep", time_rows, ("case", "dtype", "variant")),
        ("sweep_errors", error_rows, ("steps", "temperature", "column_fraction", "sweep")),
        ("sweep_quantisation", quantisation_rows, ("model", "quantisation")),
        ("sweep_pilot", pilot_rows, ("scores",)),
    ):
        if measured:
            print(f"\nwritten: {record.write(name, measured, key)}")


def swept(tensors, fraction, **options):
    """A loss with the sweep, the teacher's head prepared once."""
    prepared = distill_kernels.prepare_head(tensors[3])
    prepared.quantised("int8")
    options |= {"column_fraction": fraction, "sweep": "int8", "backend": "native"}
    return lambda *given: distill_kernels.distillation_loss(*given[:3], prepared, **options)


@dtypes
@pytest.mark.parametrize("case", [*CASES, "smollm2-v129280-2048"])
def bench_sweep_time(benchmark, case, dtype):
    tokens, vocabulary = CASES.get(case, (2048, 129280))
    tensors = tensors_of(tokens, vocabulary, dtype)
    steps = {"products": cases.all_products(*(t.detach() for t in tensors[:2])), "forward products": cases.forward_products}
    steps["exact"] = cases.forward_backward(cases.fused("native"))
    steps["columns 0.08"] = cases.forward_backward(cases.fused("native", column_fraction=0.08))
    steps |= {f"int8 {f}": cases.forward_backward(swept(tensors, f)) for f in (FRACTIONS if tokens == 512 else (0.08,))}
    steps["int8 0.08, forward"] = cases.forward_only(swept(tensors, 0.08))
    steps["exact, forward"] = cases.forward_only(cases.fused("native"))
    steps["eager"] = cases.forward_backward(cases.eager)
    steps |= {name: cases.forward_backward(loss) for name, loss in cases.peers().items() if name == "liger"}
    medians = medians_of(benchmark, steps, tensors, rounds=5 if tokens * len(tensors[1]) < 2e8 else 2)  # a minute and a half each
    for name, median in medians.items():
        row = {"case": case, "tokens": tokens, "vocabulary": len(tensors[1]), "dtype": str(dtype).removeprefix("torch."), "variant": name}
        others = [other for other in ("products", "exact", "columns 0.08", "forward products", "eager") if other in medians]
        row |= {f"to_{other.replace(' ', '_')}": median / medians[other] for other in others}
        time_rows.append(row | {"seconds": median})
        print("\n" + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in time_rows[-1].items()))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("steps", distil_curves.PAIRS_AT)
def bench_errors(benchmark, steps, temperature):
    """Observed over seeds, against the standard errors and the predicted errors of the stats, and with exact sums beside."""
    tensors = [t[:512].clone().requires_grad_(i < 2) if i % 2 == 0 else t.clone().requires_grad_(i < 2)
               for i, t in enumerate(distil_curves.trained_pairs()[steps])]  # fmt: skip
    exact = exact_gradients(tensors, temperature=temperature)
    truth = distill_kernels.distillation_loss_and_stats(*tensors, temperature=temperature)[1].divergence

    def measure():
        for fraction in FRACTIONS:
            for sweep in (None, "int8", "fp8"):
                error_rows.append({"steps": steps, "temperature": temperature, "column_fraction": fraction, "sweep": sweep or "exact"})
                error_rows[-1] |= errors(tensors, truth, exact, fraction, sweep, temperature)
                row = error_rows[-1].items()
                print("\n" + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in row))

    benchmark.pedantic(measure, rounds=1)


def errors(tensors, truth, exact, fraction, sweep, temperature):
    off, standard, gradient = [], [], torch.zeros(2, 2)
    seeds = ERROR_SEEDS if sweep != "fp8" else 1  # by torch on a CPU
    for seed in range(seeds):
        tensors[0].grad = tensors[1].grad = None
        options = {"sweep": sweep, "sweep_tolerance": None, "temperature": temperature, "column_fraction": fraction, "seed": seed}
        loss, stats = distill_kernels.distillation_loss_and_stats(*tensors, **options)
        loss.backward()
        observed = torch.stack([((t.grad - g).norm() / g.norm()).square() for t, g in zip(tensors[:2], exact, strict=True)])
        gradient += torch.stack([observed, stats.gradient_error.square()])
        if sweep:
            off.append(stats.divergence - truth)
            standard.append(stats.divergence_error)
    (d_hidden, d_weight), (d_hidden_predicted, d_weight_predicted) = (gradient / seeds).sqrt().tolist()
    found = {"d_hidden_error": d_hidden, "d_weight_error": d_weight}
    found |= {"d_hidden_predicted": d_hidden_predicted, "d_weight_predicted": d_weight_predicted, "kl": truth.mean().item()}
    if sweep:
        off, standard = torch.stack(off), torch.stack(standard)
        found |= {
            "mean_kl_error": (off.mean(1).square().mean().sqrt() / truth.mean()).item(),
            "token_rms": off.square().mean().sqrt().item(),
            "token_max": off.abs().max().item(),
            "token_rms_predicted": standard.square().mean().sqrt().item(),
            "coverage_of_95": (off.abs() <= 1.96 * standard).float().mean().item(),
        }
    return found


def _rows_alone(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def _turned(x):
    rows, scales = quantised.quantise(x, "int8")
    return rows.float() * scales[:, :1]


def quantised_logits(hidden, weight):
    """Logits from int8 by each of the ways to treat outlier channels, by name."""
    yield "a scale for each row", _rows_alone(hidden) @ _rows_alone(weight).T
    for power in (0.5, 0.7):
        smooth = hidden.square().mean(0).sqrt() ** power / weight.square().mean(0).sqrt() ** (1 - power)
        yield f"smoothing vector, power {power}", _rows_alone(hidden / smooth) @ _rows_alone(weight * smooth).T
    for channels in (4, 8, 16):
        large = hidden.square().mean(0).topk(channels).indices
        rest = torch.ones(hidden.shape[1]).index_fill(0, large, 0.0)
        yield (
            f"{channels} float channels",
            _rows_alone(hidden * rest) @ _rows_alone(weight * rest).T + hidden[:, large] @ weight[:, large].T,
        )
    yield "turned", _turned(hidden) @ _turned(weight).T


def bench_quantisation(benchmark):
    """Root mean square error of a logit, less its mean over the vocabulary (which no softmax sees), weighted with the probabilities."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = distil_curves.trained_pair()

    def measure():
        for model, hidden, weight in (("student", student_hidden[:192], student_weight), ("teacher", teacher_hidden[:192], teacher_weight)):
            exact = hidden @ weight.T
            probability = exact.softmax(-1)
            for name, logits in quantised_logits(hidden, weight):
                off = logits - exact
                off = off - (probability * off).sum(-1, keepdim=True)
                error = (probability * off.square()).sum(-1).mean().sqrt().item()
                outlier = (hidden.abs().amax(-1) / hidden.square().mean(-1).sqrt()).mean().item()
                quantisation_rows.append({"model": model, "quantisation": name, "logit_error": error, "max_to_rms": outlier})
                print(f"\n{model}, {name}: {error:.4f}")

    benchmark.pedantic(measure, rounds=1)


def references(swept, hidden, weight):
    """Log-sum-exps (n, 1), or what may stand for them while the sweep is on its way, by name: from a model's swept logits (n, V)."""
    vocabulary = swept.shape[1]
    yield "all", swept.logsumexp(-1, keepdim=True)
    likely = (weight @ hidden.mean(0)).topk(vocabulary // quantised.PILOT_FRACTION).indices
    yield "a sixteenth, likeliest by the mean hidden state", swept[:, likely].logsumexp(-1, keepdim=True)
    some = (torch.arange(vocabulary) // 96) % 16 == 0
    yield "a sixteenth, every 16th block of 96", swept[:, some].logsumexp(-1, keepdim=True)
    yield "a sixteenth, the first", swept[:, : vocabulary // 16].logsumexp(-1, keepdim=True)


def bench_pilot(benchmark):
    """Sampling error of d_hidden at 8 %, with scores from what stands for log-sum-exps; root mean square over 16 draws, logits in
    memory."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = (
        t[:176] if i % 2 == 0 else t for i, t in enumerate(distil_curves.trained_pair())
    )
    student_exact, teacher_exact = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T
    dz = student_exact.softmax(-1) - teacher_exact.softmax(-1)
    exact = dz @ student_weight
    x, y = (_turned(hidden) @ _turned(weight).T for hidden, weight in ((student_hidden, student_weight), (teacher_hidden, teacher_weight)))
    kept = kept_columns(len(student_weight), 0.08)

    def error(scores):
        draws = [draw(scores, kept, torch.tensor(seed * 2**28)) for seed in range(16)]
        return (
            torch.stack([((dz[:, c] * w) @ student_weight[c] - exact).square().sum() / exact.square().sum() for c, w in draws])
            .mean()
            .sqrt()
            .item()
        )

    def measure():
        pilot_rows.append({"scores": "norms of the exact dz", "d_hidden_error": error(dz.norm(dim=0))})
        both = references(x, student_hidden, student_weight), references(y, teacher_hidden, teacher_weight)
        for (name, lse_q), (_, lse_p) in zip(*both, strict=True):
            q, p = (x - lse_q).exp().clamp(max=1), (y - lse_p).exp().clamp(max=1)
            scores = ((q - p).square() + quantised.AGREEMENT * (q + p).square()).sum(0).sqrt()
            pilot_rows.append({"scores": f"swept, log-sum-exps over {name}", "d_hidden_error": error(scores)})
        print("\n" + "\n".join(map(str, pilot_rows)))

    benchmark.pedantic(measure, rounds=1)
