"""Problems for the tile-fused CUDA sweep, run in the emulation by sweep_driver.cpp, and what their terms have to be.

Every problem has what a tile can do wrong with it: more tokens than one block has and not a multiple, several tiles of the vocabulary and
the last a small one, hidden sizes that are multiples of 8 and of nothing more.
"""

import struct
import subprocess
from typing import NamedTuple

import cuda_emulated
import torch
from accuracy import EAGER_ORDERS, Inputs, assert_as_good_as_eager, eager_terms, make_inputs, make_labels

from distill_kernels import reference
from distill_kernels.call.checks import NO_LABEL
from distill_kernels.call.problem import TERMS
from distill_kernels.divergences import BUILT_IN, LOG_PROBABILITY_FLOOR, STUDENT_ENTROPY

DRIVER = cuda_emulated.EMULATION / "sweep_driver.cpp"
KERNELS = ("sweep", "sweep_mma", "sweep_wgmma", "tensor_map")
ELEMENTS = {torch.bfloat16: 1, torch.float16: 2}  # params.h: enum class Element
DIVERGENCES = (*BUILT_IN, STUDENT_ENTROPY.name)  # in the order of DK_FOR_EACH_DIVERGENCE
ROWS = ENTRIES = 128  # of a tile
# A late schedule, in which copies and products happen when they are waited for, and an early one, each in another order of threads.
SCHEDULES = (0, 3)
WAYS = (("mma", 1), ("wgmma", 1), ("wgmma", 2))  # matrix instructions, and blocks to a cluster


class Refused(Exception):
    pass


class Case(NamedTuple):
    inputs: Inputs
    options: dict  # of reference.distillation_terms
    splits: int = 1
    weights: torch.Tensor | None = None  # (N,) 0: the token does not count; None: all do
    terms: tuple = TERMS  # that are wanted


def make_case(
    *, family="moderate", tokens=21, vocabulary=140, student_dim=24, teacher_dim=40, dtype=torch.bfloat16, bias=False, splits=1,
    labels=False, terms=TERMS, **options,
):  # fmt: skip
    inputs = make_inputs(family, tokens, vocabulary, student_dim, teacher_dim, dtype=dtype, bias=bias)
    if bias:
        inputs = inputs._replace(student_bias=inputs.student_bias.float(), teacher_bias=inputs.teacher_bias.float())
    if labels:
        options["labels"] = make_labels(tokens, vocabulary)
    return Case(inputs, options, splits, terms=terms)


def everything(**changes):
    chosen = {
        "family": "realistic", "tokens": 150, "vocabulary": 300, "student_dim": 72, "teacher_dim": 136, "bias": True, "splits": 2,
        "labels": True, "temperature": 2.0, "label_smoothing": 0.1, "student_logit_scale": 1.1, "teacher_logit_scale": 0.9,
        "student_softcap": 30.0,
    }  # fmt: skip
    return make_case(**chosen | changes)


def clamped(**changes):
    """So cold that most tokens have entries below the floor."""
    return make_case(**{"family": "huge", "temperature": 0.05, "labels": True, "label_smoothing": 0.1} | changes)


def packed(case: Case) -> bytes:
    """The file that the driver reads."""
    inputs, options = case.inputs, case.options
    tokens, student_dim = inputs.student_hidden.shape
    vocabulary = inputs.student_weight.shape[0]
    teacher = inputs.teacher_hidden is not None
    temperature, smoothing = options.get("temperature", 1.0), options.get("label_smoothing", 0.0)
    labels = options.get("labels")
    cross_entropy = "cross_entropy" in case.terms and labels is not None
    untempered = cross_entropy or "z_loss" in case.terms
    matrices = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight)
    divergence = options.get("divergence", "forward_kl") if "divergence" in case.terms else None
    numbers = [
        tokens, vocabulary, student_dim, inputs.teacher_hidden.shape[1] if teacher else 0, ELEMENTS[inputs.student_hidden.dtype],
        ELEMENTS[inputs.teacher_hidden.dtype] if teacher else 1, *(0 if matrix is None else matrix.stride(0) for matrix in matrices),
        -1 if divergence is None else DIVERGENCES.index(divergence), case.splits, -(-vocabulary // (case.splits * ENTRIES)) * ENTRIES,
        untempered, untempered and temperature != 1.0, cross_entropy and smoothing > 0,
    ]  # fmt: skip
    fractions = [
        *(options.get(f"{model}_logit_scale", 1.0) for model in ("student", "teacher")),
        *(options.get(f"{model}_softcap") or 0.0 for model in ("student", "teacher")), 1 / temperature, smoothing, LOG_PROBABILITY_FLOOR,
    ]  # fmt: skip
    weights = torch.ones(tokens) if case.weights is None else case.weights
    arrays = [None if matrix is None else with_its_gaps(matrix) for matrix in matrices]
    arrays += [inputs.student_bias, inputs.teacher_bias, weights[:, None].expand(-1, len(TERMS)).contiguous()]
    arrays += [torch.where(labels == -100, NO_LABEL, labels) if cross_entropy else None]
    return struct.pack("<16q7d", *map(int, numbers), *fractions) + b"".join(map(packed_array, arrays))


def with_its_gaps(matrix):
    """(everything from the first to the last element,) of memory."""
    return matrix.as_strided(((matrix.shape[0] - 1) * matrix.stride(0) + matrix.shape[1],), (1,))


def packed_array(array):
    if array is None:
        return struct.pack("<q", 0)
    return struct.pack("<q", array.numel()) + array.view(torch.int16 if array.element_size() == 2 else array.dtype).numpy().tobytes()


def run(case: Case, instructions, cluster, folder, *, sanitizer="", csrc=None, schedules=SCHEDULES):
    """(terms (N, 3), bytes read, bytes written). Raises Refused with what the emulation or a sanitizer says of a wrong kernel."""
    driver = cuda_emulated.program(DRIVER, KERNELS, sanitizer, **({} if csrc is None else {"csrc": csrc}))
    problem, terms = folder / "problem", folder / "terms"
    problem.write_bytes(packed(case))
    # Addresses that are drawn anew for each process do not leave the thread sanitizer the memory that it needs.
    command = [*(("setarch", "-R") if sanitizer == "thread" else ()), driver, problem, terms, instructions, cluster, *schedules]
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=0", "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    made = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600)
    if made.returncode:
        raise Refused(f"exit status {made.returncode}: {made.stderr[:2000]}")
    read, written = map(int, made.stdout.split())
    return torch.frombuffer(bytearray(terms.read_bytes()), dtype=torch.float32).view(-1, len(TERMS)), read, written


def check(case: Case, instructions, cluster, folder, **how):
    """Runs it, and holds the terms against the reference: as good as eager torch, for every term that is wanted. Returns the bytes read."""
    got, read, _ = run(case, instructions, cluster, folder, **how)
    counted = torch.ones(len(got), dtype=torch.bool) if case.weights is None else case.weights != 0
    assert (got[~counted] == 0).all(), "a token that does not count has terms"
    truth, *eager = (terms[counted] for terms in true_and_eager_terms(case))
    for column, name in enumerate(TERMS):
        if name in case.terms:
            assert_as_good_as_eager(name, got[counted, column], [terms[:, column] for terms in eager], truth[:, column])
    return read


def true_and_eager_terms(case: Case):
    """(N, 3) each: float64, and then float32 with the features in one order and another, each as good."""
    inputs, options = case.inputs, dict(case.options)
    if inputs.teacher_hidden is None:  # any will do: it has no part in the terms
        inputs = inputs._replace(teacher_hidden=inputs.student_hidden, teacher_weight=inputs.student_weight)
    entropy = options.get("divergence") == STUDENT_ENTROPY.name
    if entropy:
        del options["divergence"]
    biases = {name: getattr(inputs, name) for name in ("student_bias", "teacher_bias")}

    def of(function, *tensors):
        terms, stats = function(*tensors, **biases, **options)
        return torch.stack((stats["student_entropy"], *terms[1:]) if entropy else terms, -1)

    yield of(reference.distillation_terms, *inputs[:4])
    for seed in range(EAGER_ORDERS):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (torch.randperm(h.shape[1], generator=generator) for h in (inputs.student_hidden, inputs.teacher_hidden))
        models = (inputs.student_hidden, student), (inputs.student_weight, student), (inputs.teacher_hidden, teacher)
        yield of(eager_terms, *(matrix[:, order] for matrix, order in (*models, (inputs.teacher_weight, teacher))))
