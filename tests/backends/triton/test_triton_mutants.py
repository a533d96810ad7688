"""Mistakes that a kernel of the Triton backend could have are found: each is made in a copy of the backend, which must then fail.

A test that a kernel passes says little if a wrong kernel passes it too. Found means: `triton_guard` refuses the run, or the loss or a
gradient is off by more than the tolerance rule of `accuracy` allows.
"""

import importlib
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accuracy import (
    assert_as_good_as_eager,
    check_loss,
    eager_loss,
    eager_stats,
    eager_with_gradients,
    everything,
    make_inputs,
    make_labels,
)
from thinned import some

from distill_kernels import backends, distillation_loss, distillation_loss_and_stats, divergences, reference

triton = pytest.importorskip("triton")
guard = pytest.importorskip("triton_guard")

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="triton compiles here, for a GPU")

NAME = "distill_kernels.backends.triton"
SOURCES = Path(backends.__file__).parent / "triton"
NUMBERS = itertools.count()


@pytest.fixture
def backend_of(tmp_path, monkeypatch):
    """What backend="triton" is for this test: a copy of the backend, in one module of which a text was replaced."""
    name = f"triton_mutant_{next(NUMBERS)}"

    def make(module=None, old="", new="", count=1):
        folder = tmp_path / name
        folder.mkdir()
        for path in SOURCES.glob("*.py"):
            source = path.read_text()
            if path.stem == module:
                assert source.count(old) == count, f"{module}.py has {old!r} {source.count(old)} times, not {count}"
                source = source.replace(old, new)
            (folder / path.name).write_text(source.replace(NAME, name))
        monkeypatch.syspath_prepend(tmp_path)
        backend, load = importlib.import_module(name), backends.load
        # Two blocks of tokens with three splits of the vocabulary each, in the sweep of 21 tokens.
        monkeypatch.setattr(importlib.import_module(f"{name}.launch"), "INTERPRETED_MULTIPROCESSORS", 7)
        monkeypatch.setattr(backends, "load", lambda wanted: backend if wanted == "triton" else load(wanted))

    yield make
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def check_value(inputs, **options):
    """Of a loss without gradients, which is tile-fused."""
    biases = {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
    got = distillation_loss(*inputs[:4], **biases, backend="triton", **options)
    wide = inputs.to(torch.float64)
    truth = reference.distillation_loss(*wide[:4], student_bias=wide.student_bias, teacher_bias=wide.teacher_bias, **options)
    assert_as_good_as_eager("loss", got, eager_with_gradients(eager_loss, inputs, 1.0, **options)["loss"], truth)


def with_gaps(matrix):
    """The same matrix, five other elements between its rows."""
    wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + 5), 7.0)
    wide[:, :-5] = matrix
    return wide[:, :-5]


def clamped():
    """Inputs and options so cold that most tokens have entries below the floor."""
    options = {"temperature": 0.05, "temperature_squared": False, "labels": make_labels(21, 300), "ce_weight": 0.1, "label_smoothing": 0.1}
    return make_inputs("huge"), options


def chunked():
    check_loss(make_inputs("realistic", bias=True), backend="triton", **everything(21, 300))


def chunked_plain():
    check_loss(make_inputs("moderate"), backend="triton")


def chunked_three_passes():
    check_loss(make_inputs("moderate"), backend="triton", divergence=divergences.jensen_shannon(0.3))


def chunked_clamped():
    inputs, options = clamped()
    check_loss(inputs, backend="triton", **options)


def swept():
    check_value(make_inputs("realistic", bias=True), **everything(21, 300))


def swept_plain():
    check_value(make_inputs("moderate"))


def swept_with_gaps():
    inputs = make_inputs("moderate")
    check_value(inputs._replace(student_weight=with_gaps(inputs.student_weight), teacher_hidden=with_gaps(inputs.teacher_hidden)))


def swept_clamped():
    inputs, options = clamped()
    check_value(inputs, **options)


def chunked_student_clamped_once():
    inputs = make_inputs("moderate", bias=True)
    inputs.student_bias[5] = -2e4  # in the first tile of several
    check_loss(inputs, backend="triton")


def chunked_teacher_clamped_once():
    inputs = make_inputs("moderate", bias=True)
    inputs.teacher_bias[5] = -2e4
    check_loss(inputs, backend="triton", divergence="reverse_kl")


def chunked_untempered_clamped():
    options = {"temperature": 4.0, "student_logit_scale": 20.0, "labels": make_labels(21, 300), "ce_weight": 0.1, "label_smoothing": 0.1}
    check_loss(make_inputs("huge"), backend="triton", **options)


def chunked_cold():
    # Of the nine tokens that count each has four splits, and three of them share out the vocabulary: the last is empty.
    check_loss(make_inputs("realistic"), backend="triton", **everything(21, 300) | {"temperature": 0.5})


def chunked_float16():
    # The gradients of the logits are rounded to float16 before their products, which eager does not do.
    check_loss(make_inputs("moderate", dtype=torch.float16), backend="triton", slack=2)


def stats():
    inputs = make_inputs("realistic")
    _, got = distillation_loss_and_stats(*inputs[:4], backend="triton")
    _, truth = reference.distillation_terms(*inputs.to(torch.float64)[:4])
    eager = eager_stats(inputs)
    for name, value in truth.items():
        assert_as_good_as_eager(name, getattr(got, name), eager[name], value)


def quantised(**options):
    """A quantised sweep, against the torch backend's; the columns drawn say whether the scores are right."""
    inputs = make_inputs("realistic", 21, 150, 24, 40, bias=True)
    biases = {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
    made = []
    for name in ("torch", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs[:2]]
        loss, stats = distillation_loss_and_stats(
            *leaves, *inputs[2:4], **biases, sweep="int8", column_fraction=0.3, seed=3, sweep_tolerance=None, backend=name, **options
        )
        made.append([loss.detach(), *torch.autograd.grad(loss, leaves), stats.divergence_error, stats.logsumexp_error])
    for truth, got in zip(*made, strict=True):
        assert (got - truth).abs().max() <= 2e-5 * truth.abs().max()


def quantised_with_everything():
    quantised(divergence="reverse_kl", **{name: value for name, value in everything(21, 150).items() if name != "label_smoothing"})


def quantised_below_the_floor():
    for student, teacher, recomputed in ((-3e4, 12.0, 1), (12.0, -3e4, 1), (-math.inf, -math.inf, 0)):
        inputs = make_inputs("moderate", 21, 150, 24, 40, bias=True)
        inputs.student_bias[5], inputs.teacher_bias[5] = student, teacher
        biases = {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
        options = {"sweep": "int8", "column_fraction": 0.3, "seed": 3, "sweep_tolerance": 1e6}  # which only an infinite error exceeds
        _, stats = distillation_loss_and_stats(*inputs[:4], **biases, backend="triton", **options)
        assert stats.recomputed == recomputed and stats.divergence.isfinite().all()


CASES = (
    chunked, chunked_plain, chunked_three_passes, chunked_clamped, chunked_student_clamped_once, chunked_teacher_clamped_once,
    chunked_untempered_clamped, chunked_cold, chunked_float16, stats,
    swept, swept_plain, swept_with_gaps, swept_clamped, quantised, quantised_with_everything,
    quantised_below_the_floor,
)  # fmt: skip


class Mutant(NamedTuple):
    case: callable  # what finds it
    module: str
    old: str
    new: str
    count: int = 1


MUTANTS = {
    # Masks.
    "logits loaded beyond the vocabulary": Mutant(
        chunked, "rows", "mask=there[:, None] & inside[None, :], other=0.0", "mask=there[:, None], other=0.0"
    ),
    "logits loaded beyond the tokens": Mutant(
        chunked, "rows", "mask=there[:, None] & inside[None, :], other=0.0", "mask=inside[None, :], other=0.0"
    ),
    "bias loaded beyond the vocabulary": Mutant(
        swept, "elementwise", "tl.load(bias + entries, mask=inside, other=0.0)", "tl.load(bias + entries)"
    ),
    "padding counted in the sum of exp": Mutant(
        chunked, "tiles", "tl.sum(tl.where(inside[None, :], tl.exp(log_q), 0.0), 1)", "tl.sum(tl.exp(log_q), 1)"
    ),
    "padding counted in the divergence": Mutant(
        chunked_three_passes, "tiles", "tl.where(inside[None, :], added_value, 0.0)", "added_value", 2
    ),
    "dz stored beyond the tokens": Mutant(
        chunked, "rows", "mask=there[:, None] & inside[None, :])\n", "mask=inside[None, :] & (rows >= 0)[:, None])\n"
    ),
    "hidden states loaded beyond the tokens": Mutant(
        swept, "sweep", "mask=(rows < tokens)[:, None] & inside[None, :]", "mask=inside[None, :]"
    ),
    "head loaded beyond the vocabulary": Mutant(
        swept, "sweep", "mask=(entries < vocabulary)[None, :] & inside[:, None]", "mask=inside[:, None]"
    ),
    "tail of the depth not masked": Mutant(swept, "sweep", "inside = k + depth < dim", "inside = depth < DEPTH"),
    # Places.
    "splits of the rows overlap by one entry": Mutant(
        chunked_plain, "launch", "self.divided // splits), configuration.block)\n", "self.divided // splits), configuration.block) - 1\n"
    ),
    "splits of the sweep overlap by one entry": Mutant(swept_plain, "launch", "configuration.entries)\n", "configuration.entries) - 1\n"),
    "split and block of the sweep swapped": Mutant(swept, "sweep", "block, split = tl.program_id", "split, block = tl.program_id"),
    "every split writes the first one's sums": Mutant(chunked, "tiles", "* splits + split, value", "* splits, value"),
    "sums laid out with a wrong stride": Mutant(chunked_plain, "tiles", "* splits + split, value", "* (splits - 1) + split, value"),
    "every split writes the terms": Mutant(chunked, "rows", "if tl.program_id(1) == 0:", "if tl.program_id(1) >= 0:"),
    "totals in the memory of the statistics": Mutant(
        chunked_three_passes, "launch", '"totals": self._new(TOTALS, tokens, values["splits"])', '"totals": values["partial"]'
    ),
    "gradient of the neighbouring tile": Mutant(
        chunked, "rows", "at_row = dz + rows.to(tl.int64)[:, None] * vocabulary + entries[None, :]",
        "at_row = dz + rows.to(tl.int64)[:, None] * vocabulary + (entries - BLOCK)[None, :]",
    ),
    "label one entry off in the cross entropy": Mutant(
        chunked, "tiles", "tl.where(entries[None, :] == label[:, None], z, 0.0)", "tl.where(entries[None, :] + 1 == label[:, None], z, 0.0)"
    ),
    "label one entry off in the gradient": Mutant(
        chunked, "tiles", "entries[None, :] == label[:, None], label_push", "entries[None, :] + 1 == label[:, None], label_push"
    ),
    "rows of a head taken to lie side by side": Mutant(
        swept_with_gaps, "sweep", "entries.to(tl.int64)[None, :] * weight_stride", "entries.to(tl.int64)[None, :] * dim"
    ),
    "rows of hidden states taken to lie side by side": Mutant(
        swept_with_gaps, "sweep", "rows.to(tl.int64)[:, None] * hidden_stride", "rows.to(tl.int64)[:, None] * dim"
    ),
    "last split not merged": Mutant(chunked_plain, "tiles", "(columns < splits)", "(columns < splits - 1)"),
    "last sum not written": Mutant(chunked_plain, "tiles", "tl.static_range(len(statistics))", "tl.static_range(len(statistics) - 1)"),
    # Arithmetic.
    "running sum not rescaled": Mutant(chunked_plain, "tiles", "sum_q = sum_q * tl.exp(-grown_q) +", "sum_q = sum_q +"),
    "running divergence not renormalised": Mutant(
        chunked_plain, "tiles", "value, slope = RENORMALISE(value, slope, excess_p, excess_q)", "value, slope = value, slope"
    ),
    "merged divergence not renormalised": Mutant(
        swept_plain, "tiles", "values, slopes = RENORMALISE(values, slopes, excess_p, excess_q)", "values, slopes = values, slopes"
    ),
    "nothing renormalised from no maximum": Mutant(
        chunked_cold, "tiles", "excess_q = tl.where(max_q == LOWEST, 0.0, grown_q)", "excess_q = grown_q"
    ),
    "empty split renormalised": Mutant(chunked_cold, "tiles", "tl.where(maxima_q == LOWEST, 0.0, (max_q", "tl.where(False, 0.0, (max_q"),
    "first of the places of maxima lost": Mutant(stats, "tiles", "top = tl.where(here > maximum, place, top)", "top = place"),
    "temperature left out of the merge": Mutant(
        chunked, "tiles", "tl.exp((maxima - maximum[:, None]) * inverse_temperature)", "tl.exp(maxima - maximum[:, None])"
    ),
    "gradient of float16 not scaled": Mutant(chunked_float16, "rows", "scale *= tl.load(dz_scale)", "scale *= 1.0"),
    "tail of the student and not of the teacher": Mutant(stats, "tiles", "tl.where(p < TAIL, q, 0.0)", "tl.where(q < TAIL, q, 0.0)"),
    "first place of every split's maxima": Mutant(
        stats, "tiles", "tl.min(tl.where(maxima_q == max_q[:, None], tops_q, -LOWEST), 1)", "tl.min(tops_q, 1)"
    ),
    "slope of the softcap left out": Mutant(chunked, "tiles", "dz *= 1.0 - ratio * ratio", "dz *= 1.0"),
    "float32 products in tf32": Mutant(swept, "launch", '"PRECISION": _precision()', '"PRECISION": "tf32"'),
    # The quantised sweep.
    "8-bit rows loaded beyond the tokens": Mutant(
        quantised, "quantised_sweep", "mask=there[:, None] & inner[None, :], other=0.0", "mask=inner[None, :], other=0.0"
    ),
    "8-bit head loaded beyond the vocabulary": Mutant(
        quantised, "quantised_sweep", "mask=inside[None, :] & inner[:, None], other=0.0", "mask=inner[:, None], other=0.0"
    ),
    "scores of every block in the first one's row": Mutant(
        quantised, "quantised_sweep", "squares += block.to(tl.int64) * vocabulary", "squares += 0"
    ),
    "scores of a tile's parts swapped": Mutant(
        quantised, "quantised_sweep", "tile.shape[1] // 2)).permute((0, 2, 1)))", "tile.shape[1] // 2)).flip(1).permute((0, 2, 1)))"
    ),
    "padding counted in the swept sums": Mutant(
        quantised, "quantised_sweep", "mass = tl.where(inside[None, :], mass, 0.0)", "mass += 0.0"
    ),
    "scale of the head's rows left out": Mutant(
        quantised, "quantised_sweep", "* row_scale[:, None] * head_scale[None, :]", "* row_scale[:, None]"
    ),
    "label's own column scored by nothing": Mutant(
        quantised_with_everything, "quantised_sweep", "entries[None, :] == label[:, None], label_square[:, None]",
        "entries[None, :] == label[:, None], 0.0 * label_square[:, None]",
    ),
    "list of columns taken for the first ones": Mutant(
        quantised, "listed_columns", "entries = tl.load(columns + at, mask=inside, other=0)", "entries = at.to(tl.int64)"
    ),
    "difference not weighted": Mutant(quantised, "kept_columns", "s0 += tl.sum(weight * d0, 1)", "s0 += tl.sum(d0, 1)"),
    "surely kept columns counted as uncertain": Mutant(
        quantised, "kept_columns", "uncertain = weight * (weight - 1.0)", "uncertain = weight * weight"
    ),
    "moments laid out in another order": Mutant(quantised, "swept", "MATRIX = (0, 1, 2, 3, 1, 4,", "MATRIX = (0, 1, 2, 3, 1, 5,"),
    "kept gradient not weighted": Mutant(
        quantised, "kept_columns", "made *= tl.load(weights + at, mask=inside, other=0.0)[None, :]", "made *= 1.0"
    ),
    "label of the kept gradient one column off": Mutant(
        quantised_with_everything, "kept_columns", "tl.load(columns + at, mask=inside, other=-1), label", "at, label"
    ),
    "untempered sums of the tempered softmax": Mutant(
        quantised_with_everything, "quantised_sweep", "untempered_sum if SEPARATE else student_sum", "student_sum"
    ),
    "entries below the floor not counted": Mutant(
        quantised_below_the_floor, "quantised_sweep", "below_sum += _summed(below, inside, STATS)", "below_sum += 0.0"
    ),
    "entries below the student's floor alone counted": Mutant(
        quantised_below_the_floor, "quantised_sweep", " | ((log_p < FLOOR) & (q > 0.0))", ""
    ),
    "entries that no model gives mass counted": Mutant(quantised_below_the_floor, "quantised_sweep", "& (p > 0.0)", "& (p >= 0.0)"),
    # The floor.
    "log-probabilities not raised to the floor": Mutant(
        chunked_clamped, "elementwise", "tl.where(log_probability < FLOOR, FLOOR, log_probability)", "log_probability"
    ),
    "totals not taken below the floor": Mutant(
        chunked_clamped, "rows", "end = tl.where(tl.max((clamped & there).to(tl.int32), 0) != 0, end, begin)", "end = begin"
    ),
    "totals not taken below the floor in the sweep": Mutant(
        swept_clamped, "sweep", "end = tl.where(tl.max((clamped & there).to(tl.int32), 0) != 0, end, begin)", "end = begin"
    ),
    "totals never made": Mutant(chunked_three_passes, "launch", "if self.wants_totals:", "if False:", 2),
    "smallest logit of the last tile only": Mutant(
        chunked_student_clamped_once, "tiles", "minimum = tl.minimum(minimum, tl.min(", "minimum = tl.minimum(-LOWEST, tl.min("
    ),
    "floor of the teacher forgotten": Mutant(
        chunked_teacher_clamped_once, "tiles", "clamped = clamped | ((min_p - max_p)", "clamped = clamped & ((min_p - max_p)"
    ),
    "floor of the untempered softmax forgotten": Mutant(
        chunked_untempered_clamped, "tiles", "clamped = clamped | (min_q - max_q - log_sum_bare < FLOOR)", "clamped = clamped"
    ),
    "gradient of a label below the floor": Mutant(
        chunked_untempered_clamped, "tiles", "(label < NO_LABEL) | (bare < FLOOR)", "label < NO_LABEL"
    ),
    "gradient of entries below the floor": Mutant(chunked_clamped, "tiles", "slope = tl.where(bare_q < FLOOR, 0.0, slope)", "slope += 0.0"),
}  # fmt: skip


def run(case):
    guard.install()
    with guard.check(), guard.poisoned_allocations():
        case()


@pytest.mark.usefixtures("sampling_pays")
@pytest.mark.parametrize("case", some({case.__name__: case for case in CASES}, 3))
def test_copy_without_a_mistake_passes(case, backend_of):
    backend_of()
    run(case)


# With every third there is then one at least of each module, and of each kind of case.
KEPT = (
    "log-probabilities not raised to the floor", "difference not weighted", "merged divergence not renormalised",
    "tail of the student and not of the teacher", "rows of a head taken to lie side by side", "gradient of a label below the floor",
)  # fmt: skip


@pytest.mark.usefixtures("sampling_pays")
@pytest.mark.parametrize("mutant", some(MUTANTS, 3, also=KEPT))
def test_mistake_is_found(mutant, backend_of):
    backend_of(*mutant[1:])
    with pytest.raises(AssertionError) as found:
        run(mutant.case)
    print(found.type.__name__, str(found.value)[:200])
