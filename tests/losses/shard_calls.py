"""Calls of a loss whose vocabulary is divided over the ranks of a process group: a rank holds all tensors of a case and passes its rows.

Gradients of rows are put together before they are compared. `case` registers what shard_ranks.py runs.
"""


import torch
import torch.distributed as distributed
from accuracy import (
    assert_as_good_as_eager,
    assert_close64,
    eager_loss,
    eager_with_gradients,
    make_inputs,
    with_gradients,
)

from distill_kernels import distillation_loss, reference

TOKENS, VOCABULARY, STUDENT_DIM, TEACHER_DIM = 37, 301, 24, 16
CASES = {}  # name -> (function, numbers of ranks, those of them that are exhaustive)


def case(ranks, *arguments, exhaustive=()):
    def register(function):
        title = " ".join([function.__name__, *(str(a) for a in arguments)])
        CASES[title] = lambda: function(*arguments), ranks, exhaustive
        return function

    return register


def rank():
    return distributed.get_rank()


def rows(vocabulary):
    """This rank's rows."""
    return rows_of(rank(), vocabulary)


def rows_of(rank, vocabulary=VOCABULARY):
    """Shards of unlike sizes, the last a single entry where there are several."""
    ranks = distributed.get_world_size()
    ends = [round((vocabulary - 1) * ((i + 1) / max(1, ranks - 1)) ** 1.5) for i in range(ranks - 1)] + [vocabulary]
    return slice(0 if rank == 0 else ends[min(rank, ranks - 1) - 1], ends[min(rank, ranks - 1)])


def sharded(function=distillation_loss):
    """`function` of whole heads, which passes on this rank's rows of them."""

    def call(student_hidden, student_weight, teacher_hidden, teacher_weight, *, student_bias=None, teacher_bias=None, **options):
        own = rows(student_weight.shape[0])
        biases = {"student_bias": student_bias, "teacher_bias": teacher_bias}
        biases = {name: None if bias is None else bias[own] for name, bias in biases.items()}
        weights = student_weight[own], teacher_weight[own]
        return function(
            student_hidden, weights[0], teacher_hidden, weights[1], process_group=distributed.group.WORLD, **biases, **options
        )

    return call


def put_together(got):
    """Gradients of every rank's rows, each 0 outside of them, as one."""
    for name in ("d_student_weight", "d_student_bias"):
        if name in got:
            distributed.all_reduce(got[name])
    return got


def assert_alike(tensor):
    """The same bits on all ranks."""
    everyone = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, tensor.contiguous())
    assert all(torch.equal(other, tensor) for other in everyone), "ranks have other bits"


def check(inputs, upstream=1.7, backend="torch", slack=1, **options):
    got = put_together(with_gradients(sharded(), inputs, upstream, backend=backend, **options))
    assert_alike(got["loss"])
    assert_alike(got["d_student_hidden"])
    options.pop("workspace_mib", None)
    truth = with_gradients(reference.distillation_loss, inputs.to(torch.float64), upstream, **options)
    if inputs.student_hidden.dtype is torch.float64:
        for name in truth:
            assert_close64(name, got[name], truth[name])
        return
    eager = eager_with_gradients(eager_loss, inputs, upstream, **options)
    for name in truth:
        assert got[name].dtype == (torch.float32 if name == "loss" else inputs.student_hidden.dtype)
        assert_as_good_as_eager(name, got[name], eager[name], truth[name], gradient=name != "loss", slack=slack)


def inputs_of(family="moderate", tokens=TOKENS, vocabulary=VOCABULARY, dtype=torch.float32, bias=True):
    return make_inputs(family, tokens, vocabulary, STUDENT_DIM, TEACHER_DIM, dtype=dtype, bias=bias)
