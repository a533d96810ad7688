"""What test_compiled_schedules.py runs in processes of its own, which share the compiler's cache on disk.

    python scheduled_losses.py [NUMBER ...]


Compiles losses with numbers that change from step to step, and prints a line of JSON for each step: how far value and gradients are from
those of the eager call, relative to the largest entry.
"""

import json
import math
import sys
import time

import torch

from distill_kernels import distillation_loss, divergences, selected_logprobs, sparse_distillation_loss, token_logprobs
from distill_kernels.call import worthwhile

STEPS = (0.1, 0.3, 0.9)  # the second makes a number dynamic, the third is the first that a cache could be stale for
FORMS = {
    "a - b·s": lambda s: 4.0 - 3.0 * s,
    "a·s": lambda s: 3.0 * s,
    "a + s": lambda s: 1 + s,
    "alone": lambda s: s,
    "cosine": lambda s: 1 + 0.5 * (1 + math.cos(math.pi * s)),
}


def inputs():
    g = torch.Generator().manual_seed(0)
    shapes = {"student_hidden": (12, 8), "student_weight": (50, 8), "teacher_hidden": (12, 6), "teacher_weight": (50, 6)}
    made = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    made["student_hidden"].requires_grad_()
    made["student_weight"].requires_grad_()
    return made, torch.randint(50, (12,), generator=g)


CALL, LABELS = inputs()
LEAVES = CALL["student_hidden"], CALL["student_weight"]
LOGPROBS, IDS = (CALL["teacher_hidden"] @ CALL["teacher_weight"].T).log_softmax(-1).topk(4)


def listed(**options):
    return sparse_distillation_loss(*LEAVES, IDS, LOGPROBS, **options)


def sampled(**options):
    return distillation_loss(**CALL, column_fraction=0.4, seed=3, **options)


# By what is scheduled. Each is called with a number between 0.1 and 4.
LOSSES = {
    "temperature": lambda x: distillation_loss(**CALL, temperature=x, labels=LABELS, ce_weight=0.5, backend="native"),
    "temperature, per token": lambda x: distillation_loss(**CALL, temperature=x, reduction="none", backend="torch").square().sum(),
    "temperature, sampled": lambda x: sampled(temperature=x, backend="native"),
    "temperature, sampled, per token": lambda x: sampled(temperature=x, reduction="none", backend="torch").square().sum(),
    "temperature, untempered KD": lambda x: distillation_loss(**CALL, temperature=x, temperature_squared=False, backend="torch"),
    "student_logit_scale": lambda x: distillation_loss(**CALL, student_logit_scale=x, backend="native"),
    "softcaps": lambda x: distillation_loss(**CALL, student_softcap=x, teacher_softcap=2 * x, backend="native"),
    "ce_weight": lambda x: distillation_loss(**CALL, labels=LABELS, ce_weight=x, kd_weight=5 - x),
    "label_smoothing": lambda x: distillation_loss(**CALL, labels=LABELS, ce_weight=1.0, label_smoothing=0.2 * x),
    "beta": lambda x: distillation_loss(**CALL, divergence=divergences.jensen_shannon(beta=0.2 * x)),
    "column_fraction": lambda x: sampled_by(0.1 * x),
    "lists": lambda x: listed(tail="renormalise", temperature=x, teacher_temperature=1.0),
    "lists, per token": lambda x: listed(tail="bucket", student_logit_scale=x, reduction="none").sum(),
    "log-probabilities": lambda x: sum(made.sum() for made in token_logprobs(*LEAVES, LABELS, temperature=x)),
    "chosen log-probabilities": lambda x: selected_logprobs(*LEAVES, IDS, temperature=x)[0].square().sum(),
}


NUMBERS = list(LOSSES)[1:]  # the temperature goes through every form, these through the first


def sampled_by(fraction):
    return distillation_loss(**CALL, column_fraction=fraction, seed=3, reduction="none").sum()


def results(loss):
    return loss.detach(), *torch.autograd.grad(1.7 * loss, LEAVES)


def off(got, want):
    return max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))


def check(number, form):
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, of=LOSSES[number], value=FORMS[form]: of(value(s)), fullgraph=True)
    begin = time.perf_counter()
    for step in STEPS:
        error = off(results(compiled(step)), results(LOSSES[number](FORMS[form](step))))
        print(json.dumps({"number": number, "form": form, "step": step, "error": error}), flush=True)
    print(f"{number}, {form}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    worthwhile.LEAST_TOKENS = worthwhile.LEAST_VOCABULARY = 1
    torch.set_num_threads(1)
    for number in sys.argv[1:]:
        check(number, "a - b·s")
    for form in FORMS if len(sys.argv) == 1 else ():
        check("temperature", form)
    counters = torch._dynamo.utils.counters
    print(json.dumps({"hits": counters["aot_autograd"]["autograd_cache_hit"]}))
