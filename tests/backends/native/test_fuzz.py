"""The native backend on random shapes, dtypes, options and places in memory, against the float64 reference by the rule of accuracy.py.

A matrix is a window in a larger one that is NaN elsewhere: rows a stride apart, even or odd, at addresses of any alignment, turned or
not; vectors are every other element of one. What is read beyond them shows in the result.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import accuracy
import pytest
import torch
from accuracy import DIVERGENCES, check_loss, make_inputs, make_labels, make_token_weight, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from distill_kernels import distillation_loss
from distill_kernels.backends import native
from distill_kernels.call import worthwhile

if native._native is None:
    pytest.skip("the compiled extension was not built", allow_module_level=True)

ISA = pytest.mark.parametrize("isa", native.instruction_sets())
SLACK = 4  # as for every ragged shape: with one token or two features eager's error is a draw of luck, and right calls exceed the rule
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS, DIMS, VOCABULARIES = (  # with the borders of vectors, panels, blocks and slices among them
    st.one_of(st.sampled_from(borders), st.integers(1, most))
    for borders, most in (
        ((1, 15, 16, 17, 64, 65, 150), 150),
        ((1, 2, 3, 63, 64, 65, 200), 200),
        ((1, 2, 95, 96, 97, 1151, 1152, 1153, 2303, 2304, 2305, 2600), 2600),
    )
)


class Window(NamedTuple):
    """Where a matrix lies in the larger one: columns to its left and right, rows above it, and whether columns are its rows."""

    left: int
    right: int
    above: int
    turned: bool

    def view(self, matrix):
        """The same values there, differentiably."""
        whole = pad(matrix.mT if self.turned else matrix, (self.left, self.right, self.above, 1), value=math.nan)
        window = whole[..., self.above : -1, self.left : whole.shape[-1] - self.right]
        return window.mT if self.turned else window


class Call(NamedTuple):
    """All that decides a random call, in a form that a failure can print."""

    batch: tuple[int, ...]
    vocabulary: int
    dims: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    windows: tuple[Window, ...]  # of the four matrices
    bias: bool
    labels: bool
    ignore_index: int
    token_weight: bool
    chunk_tokens: int
    sampled: bool  # gradients by way of sampled columns: here of all, so that they have to be exact
    seed: int
    options: dict

    @property
    def tokens(self):
        return math.prod(self.batch)

    def inputs(self):
        made = make_inputs("grid", self.tokens, self.vocabulary, *self.dims, bias=self.bias, seed=self.seed)
        student, teacher = (made.to(dtype) for dtype in self.dtypes)
        return student._replace(
            teacher_hidden=teacher.teacher_hidden, teacher_weight=teacher.teacher_weight, teacher_bias=teacher.teacher_bias
        )

    def arguments(self):
        """Everything that is neither a matrix nor a bias."""
        arguments = {"backend": "native", "ignore_index": self.ignore_index, **self.options}
        if self.labels:
            arguments["labels"] = make_labels(self.tokens, self.vocabulary, ignore_index=self.ignore_index, seed=self.seed)
        if self.token_weight:
            arguments["token_weight"] = make_token_weight(self.tokens, seed=self.seed)
        return arguments

    def loss(self, student_hidden, student_weight, teacher_hidden, teacher_weight, **arguments):
        """`distillation_loss` with every tensor where this call has it."""
        hidden = (matrix.view(*self.batch, -1) for matrix in (student_hidden, teacher_hidden))
        matrices = (next(hidden), student_weight, next(hidden), teacher_weight)
        for name in {"student_bias", "teacher_bias", "labels", "token_weight"} & set(arguments):
            vector = arguments[name]
            apart = torch.stack([torch.full_like(vector, math.nan if vector.is_floating_point() else -1), vector], -1)[:, 1]
            arguments[name] = apart if "bias" in name else apart.reshape(self.batch)
        if self.sampled:
            arguments["column_fraction"] = 1.0
        loss = distillation_loss(*(window.view(matrix) for window, matrix in zip(self.windows, matrices, strict=True)), **arguments)
        return loss.flatten() if arguments["reduction"] == "none" else loss

    def upstream(self):
        return torch.linspace(-1, 2, self.tokens) if self.options["reduction"] == "none" else 1.7

    def value(self):
        """The loss alone: the schedule that keeps no logits."""
        inputs = self.inputs()
        biases = {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias} if self.bias else {}
        with torch.no_grad():
            return self.loss(*inputs[:4], **biases, **self.arguments())

    def results(self):
        """The loss alone, the loss, and every gradient."""
        return [self.value(), *with_gradients(self.loss, self.inputs(), self.upstream(), **self.arguments()).values()]


windows = st.builds(Window, st.integers(0, 9), st.integers(0, 9), st.integers(0, 1), st.sampled_from([False, False, False, True]))


@st.composite
def calls(draw, tokens=TOKENS, vocabularies=VOCABULARIES):
    tokens, vocabulary = draw(tokens), draw(vocabularies)
    rows = draw(st.sampled_from([None, 1, 2, 3]))
    options = {
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "temperature": draw(st.sampled_from([0.7, 1.0, 2.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "kd_weight": draw(st.sampled_from([1.0, 0.35])),
        "z_loss_weight": draw(st.sampled_from([0.0, 0.05])),
        "student_logit_scale": draw(st.sampled_from([1.0, 0.6])),
        "teacher_logit_scale": draw(st.sampled_from([1.0, 1.3])),
        "student_softcap": draw(st.sampled_from([None, 25.0])),
        "teacher_softcap": draw(st.sampled_from([None, 30.0])),
    }
    labels = draw(st.booleans())
    if labels and vocabulary > 1:  # of one entry, the gradient of cross entropy cancels to nothing, and no rule measures what is left
        options["ce_weight"] = draw(st.sampled_from([0.0, 0.5]))
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.2]))
    if (options["z_loss_weight"] or options.get("ce_weight")) and draw(st.integers(0, 3)) == 0:
        options["kd_weight"] = 0.0
    return Call(
        batch=(tokens,) if rows is None else (rows, max(1, tokens // rows)),
        vocabulary=vocabulary,
        dims=(draw(DIMS), draw(DIMS)),
        dtypes=(draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))),
        windows=tuple(draw(windows) for _ in range(4)),
        bias=draw(st.booleans()),
        labels=labels,
        ignore_index=draw(st.sampled_from([-100, 0])),
        token_weight=draw(st.booleans()),
        chunk_tokens=draw(st.sampled_from([16, 48, native.CHUNK_TOKENS])),
        sampled=draw(st.sampled_from([False, False, True])),
        seed=draw(st.integers(0, 2**20)),
        options=options,
    )


# Several slices of the vocabulary, each enough work that threads are at it at the same time.
shared_calls = calls(tokens=st.integers(33, 150), vocabularies=st.integers(2305, 6000))


@contextmanager
def forced(isa, call):
    """Not a fixture: one would serve all examples of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "INSTRUCTION_SET", isa)
        patch.setattr(native, "CHUNK_TOKENS", call.chunk_tokens)  # so that few tokens are several chunks
        patch.setattr(worthwhile, "LEAST_TOKENS", 1)
        patch.setattr(worthwhile, "LEAST_VOCABULARY", 1)
        patch.setattr(worthwhile, "MOST_FRACTION", 1.0)
        yield patch


def check_layout(isa, call):
    with forced(isa, call) as patch:
        patch.setattr(accuracy, "distillation_loss", call.loss)  # only what is measured: reference and eager take matrices as made
        arguments = call.arguments()
        loss = check_loss(call.inputs(), upstream=call.upstream(), slack=SLACK, **arguments)["loss"]
        assert torch.equal(call.value(), loss)


@ISA
@settings(deadline=None, derandomize=True, max_examples=30)
@given(call=calls())
def test_random_layout_matches_reference_and_its_value_needs_no_gradients(isa, call):
    check_layout(isa, call)


@pytest.mark.exhaustive
@ISA
@settings(deadline=None, derandomize=True, max_examples=150)
@given(call=calls())
def test_many_random_layouts_match_reference_and_their_values_need_no_gradients(isa, call):
    check_layout(isa, call)


@ISA
@settings(deadline=None, derandomize=True, max_examples=10)
@given(call=shared_calls)
def test_random_layout_bits_do_not_depend_on_torch_threads(isa, call):
    before, results = torch.get_num_threads(), []
    try:
        with forced(isa, call):
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(call.results())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


@settings(deadline=None, derandomize=True, max_examples=6)
@given(four=st.lists(shared_calls, min_size=4, max_size=4))
def test_random_layout_bits_do_not_depend_on_concurrent_calls(four):
    alone = [call.results() for call in four]
    together = threading.Barrier(len(four))

    def run(call):
        together.wait(timeout=60)
        return [call.results() for _ in range(3)]

    with ThreadPoolExecutor(len(four)) as pool:
        for expected, repeated in zip(alone, pool.map(run, four), strict=True):
            assert all(torch.equal(*pair) for results in repeated for pair in zip(expected, results, strict=True))
