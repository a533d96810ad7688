"""Distillation with exact losses, with column-sampled gradients and with the quantised sweep, several seeds each: does it change what is
learned?

    python -m benchmarks.students.distil_curves  # half an hour on two cores; writes results/distil_curves.csv and distil_curves.png
    python -m benchmarks.students.distil_curves 0.08 "int8 0.08"  # some of them; the others' rows stay

The student of the demo (12 of SmolLM2's 30 layers), here with its tied embeddings and head trained too, so that both sampled gradients
matter, on the demo's text. A seed fixes the order of the text; runs of one seed differ in their gradients alone. Held-out KL to the
teacher along the run is what is compared: a fraction is good enough where its curve lies within the spread of the seeds.
"""

import copy
import functools
import statistics
import sys
import time

import torch

from benchmarks import record
from distill_kernels.api.models import initial_models
from distill_kernels.api.models.backbone import run_backbone
from distill_kernels.api.runs import corpus, loop

VARIANTS = {
    "exact": {},
    "0.04": {"column_fraction": 0.04},
    "0.08": {"column_fraction": 0.08},
    "0.16": {"column_fraction": 0.16},
    "int8 0.08": {"column_fraction": 0.08, "sweep": "int8"},
}
SEEDS = (0, 1, 2)
STEPS = 60
BATCH, LENGTH = 4, 128
EVALUATE_AT = (10, 20, 40, STEPS)
PAIRS_AT = (0, 20, STEPS)
HELD_OUT = 16  # windows


def optimizer_of(student):
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5) * (0.1 + 0.9 * (1 - step / STEPS)))


def run(student, text, held_out, order, seed, options):
    """(step, held-out quantities, median seconds of a step so far) along a run."""
    torch.manual_seed(seed)
    student = copy.deepcopy(student).requires_grad_(True)
    optimizer, schedule = optimizer_of(student)
    times, begin = [], time.perf_counter()
    steps = loop.train(student.train(), text, order, optimizer, schedule, **options)
    for step, _ in enumerate(steps, start=1):
        times.append(time.perf_counter() - begin)
        if step in EVALUATE_AT:
            yield step, loop.evaluate(student.eval(), held_out, BATCH), statistics.median(times)
            student.train()
        begin = time.perf_counter()


def prepare(seeds):
    """The student before training; the text that the runs of all seeds read, and some held out, each with the teacher's states of it; for
    each seed the rows of the text that its steps read."""
    teacher, tokenizer = initial_models.load("--teacher", initial_models.default_teacher())
    teacher.requires_grad_(False)
    student = initial_models.cut_student(teacher, initial_models.DEFAULT_LAYERS)
    documents = corpus.split_documents(None, 0)
    train, held_out = (corpus.windows(part, tokenizer, LENGTH) for part in (documents.train, documents.held_out))
    orders = [corpus.epochs(len(train), BATCH, STEPS, torch.Generator().manual_seed(seed)) for seed in seeds]
    used, places = torch.cat(orders).unique(return_inverse=True)
    some = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:HELD_OUT]]
    texts = [loop.read(loop.TaughtText(ids, model=teacher), BATCH) for ids in (train[used], some)]
    return student, *texts, places.chunk(len(seeds))


def trained_pair():
    """Flat hidden states (HELD_OUT · LENGTH, D) of held-out text, and head, of the student after one run with exact gradients, and of the
    teacher."""
    return trained_pairs()[STEPS]


@functools.cache
def trained_pairs():
    """The same after each number of steps of PAIRS_AT."""
    student, text, held_out, (order,) = prepare(SEEDS[:1])
    torch.manual_seed(0)
    student.requires_grad_(True).train()
    optimizer, schedule = optimizer_of(student)
    pairs = {}

    def look(step):
        if step in PAIRS_AT:
            with torch.no_grad():
                learned = [run_backbone(student.eval(), input_ids=ids) for ids in held_out.input_ids.split(BATCH)]
            pair = torch.cat([x.hidden for x in learned]), learned[0].weight, held_out.output.hidden, held_out.output.weight
            pairs[step] = [tensor.detach().clone().flatten(0, -2) for tensor in pair]
            student.train()

    look(0)
    for step, _ in enumerate(loop.train(student, text, order, optimizer, schedule), start=1):
        look(step)
    return pairs


def main(names):
    student, text, held_out, orders = prepare(SEEDS)
    rows = []
    for seed, order in zip(SEEDS, orders, strict=True):
        for name in names:
            for step, quality, seconds in run(student, text, held_out, order, seed, VARIANTS[name]):
                rows.append({"column_fraction": name, "seed": seed, "step": step, **quality, "seconds_per_step": seconds})
            written = record.write("distil_curves", rows, ("column_fraction", "seed", "step"))  # as it goes, for it takes long
            print(f"seed {seed}, {name}: KL {quality['kl']:.4f}, {seconds:.2f} s a step", flush=True)
    print(f"written: {written}")
    plot(record.read("distil_curves"))


def plot(rows):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in VARIANTS:
        curves = [[float(row["kl"]) for row in rows if row["column_fraction"] == name and row["seed"] == str(seed)] for seed in SEEDS]
        middle = [statistics.mean(at) for at in zip(*curves, strict=True)]
        sweep, _, fraction = name.rpartition(" ")
        label = name if name == "exact" else f"{float(fraction):.0%} of the columns" + f", {sweep} sweep" * bool(sweep)
        (line,) = axes.plot(EVALUATE_AT, middle, marker="o", label=label)
        low, high = ([pick(at) for at in zip(*curves, strict=True)] for pick in (min, max))
        axes.fill_between(EVALUATE_AT, low, high, alpha=0.15, color=line.get_color())
    axes.set(xlabel="step", ylabel="held-out KL to the teacher, nats", yscale="log")
    axes.legend(title=f"mean and range of {len(SEEDS)} seeds")
    figure.savefig(record.RESULTS / "distil_curves.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:] or list(VARIANTS))
