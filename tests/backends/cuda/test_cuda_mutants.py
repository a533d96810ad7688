"""The CUDA kernels of rows and columns under sanitizers, and mistakes that they could have: each, made in a copy, must be found out.

Found means: the emulation or a sanitizer refuses the run, two schedules differ, or a result is off by more than FOUND; results are of
magnitudes between 0.01 and 100.
"""

import os
import re
import shutil
import subprocess
from typing import NamedTuple

import cuda_emulated
import numpy
import pytest
from thinned import some

DRIVER = cuda_emulated.EMULATION / "rows_driver.cpp"
FOUND = 5e-5
INSTANCE = "template void launch_rows<{}>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);\n"
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}


def copy_of_sources(folder, name=None, old="", new="", count=1):
    """A copy of csrc with the divergences of the driver alone, in one of whose files a text is replaced."""
    csrc = cuda_emulated.copy_of_sources(folder)
    instances = "".join(map(INSTANCE.format, ("forward_kl", "alpha_beta", "no_divergence")))
    (csrc / "cuda/rows_kl.cu").write_text(f'#include "rows.cuh"\nnamespace distill_kernels::cuda {{\n{instances}}}\n')
    if name is not None:
        cuda_emulated.replace(csrc / "cuda" / name, old, new, count)
    return csrc


def run(csrc, folder, sanitizer="", seeds=(0, 1, 2, 3)):
    """(exit status, what it said, results) of the driver with the kernels of these sources."""
    program = cuda_emulated.program(DRIVER, ("rows_kl", "columns"), sanitizer, csrc)
    # Where the addresses of a process are drawn at random over too wide a range, the race detector does not start.
    alone = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    results = folder / f"results{sanitizer}"
    command = [*alone, str(program), str(results), *map(str, seeds)]
    made = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=600)
    return made.returncode, made.stderr, numpy.fromfile(results, numpy.float32) if made.returncode == 0 else None


@pytest.mark.parametrize("sanitizer", some({"plain": "", "address": "address", "thread": "thread"}, ["plain", "address"]))
def test_kernels_run_clean_and_give_the_same_bits_under_every_schedule(sanitizer, tmp_path):
    status, said, results = run(copy_of_sources(tmp_path), tmp_path, sanitizer, seeds=(0, 1, 2, 3, 4, 6) if sanitizer == "" else (0, 3))
    assert status == 0, said
    assert len(results) > 10000 and numpy.isfinite(results).all()


class Mutant(NamedTuple):
    name: str
    old: str
    new: str
    count: int = 1
    sanitizer: str = ""
    said: str = ""  # by whoever finds it


MUTANTS = {
    # Sums.
    "running sum not rescaled": Mutant("statistics.cuh", "s.q.sum *= exp((before_q - s.q.maximum) * inverse);", ";"),
    "untempered sum not rescaled": Mutant("statistics.cuh", "s.sum_untempered *= exp(before_q - s.q.maximum);", "{}"),
    "running divergence not renormalised": Mutant("statistics.cuh", "s.value = brought.value;", ";"),
    "merged divergence not renormalised": Mutant("statistics.cuh", "into.value = a.value + b.value;", "into.value += other.value;"),
    "nothing renormalised from no maximum": Mutant("statistics.cuh", "from == kLowest ? 0.0f : (to", "from == 1.0f ? 0.0f : (to"),
    "temperature left out of the merge": Mutant(
        "statistics.cuh", "exp((into.maximum - high) * inverse_temperature)", "exp(into.maximum - high)"
    ),
    "places of maxima lost": Mutant(
        "statistics.cuh", "other.maximum > into.maximum || (other.maximum == into.maximum && other.top < into.top)", "true"
    ),
    "of equal maxima the one that was taken first": Mutant("statistics.cuh", "(high > before || entry(i) < softmax.top)", "high > before"),
    "tail of the student and not of the teacher": Mutant(
        "statistics.cuh", "p < loss.tail_probability ? q", "q < loss.tail_probability ? q"
    ),
    "lost step of the butterfly": Mutant("rows.cuh", "int lanes = 16;", "int lanes = 8;"),
    "last warp not merged": Mutant("rows.cuh", "lane < blockDim.x / 32 ?", "lane < blockDim.x / 32 - (blockDim.x > 32) ?"),
    "last block not merged": Mutant("rows.cuh", "lane < cluster_size() ?", "lane < cluster_size() - 1 ?"),
    "the first block merged in the place of each": Mutant("rows.cuh", "shared_of(&board.of_block, lane)", "shared_of(&board.of_block, 0)"),
    "a block's sums merged into those of one warp": Mutant(
        "rows.cuh", "if (lane == 0) board.of_block = sums;", "board.of_block = sums;", sanitizer="thread", said="data race"
    ),
    # The floor.
    "log-probabilities not raised to the floor": Mutant(
        "statistics.cuh", "return log_probability < floor ? floor : log_probability;", "return log_probability + 0.0f * floor;"
    ),
    "smallest logit lost": Mutant("statistics.cuh", "into.minimum = fminf(into.minimum, other.minimum);", ";"),
    "floor of the untempered softmax forgotten": Mutant(
        "statistics.cuh", "m.clamped |= s.q.minimum - s.q.maximum", "m.clamped &= s.q.minimum - s.q.maximum"
    ),
    "floor of the teacher forgotten": Mutant("statistics.cuh", "m.clamped |= (s.p.minimum", "m.clamped &= (s.p.minimum"),
    "gradient of entries below the floor": Mutant("statistics.cuh", "(bare_q < loss.floor ? 0.0f : slope)", "slope"),
    "totals not taken below the floor": Mutant(
        "statistics.cuh", "return m.clamped && (kActive<Divergence> || loss.smoothing);", "return m.clamped && false;"
    ),
    "totals never taken": Mutant("statistics.cuh", "(kActive<Divergence> && !Divergence::one_pass)) return true;", "false) return true;"),
    # Labels, options, gradient.
    "label one entry off in the cross entropy": Mutant("statistics.cuh", "entry(i) == label) s", "entry(i) + 1 == label) s"),
    "label one entry off in the gradient": Mutant("statistics.cuh", "if (entry == label) dz", "if (entry + 1 == label) dz"),
    "slope of the softcap left out": Mutant("statistics.cuh", "dz *= 1.0f - ratio * ratio;", "dz *= 1.0f + 0.0f * ratio;"),
    "dz not scaled": Mutant("rows.cuh", "rows.dz_scale == nullptr ? 1.0f : load(rows.dz_scale)", "1.0f"),
    "tokens that do not count computed": Mutant("rows.cuh", "if (!counts(coefficients)) {", "if (false) {"),
    # Places.
    "entries of no whole vector left out": Mutant("rows.cuh", "thread < kMostEdges ?", "thread < 0 ?"),
    "last entries of no whole vector left out": Mutant("rows.cuh", "thread < kMostEdges ?", "thread < slice.first ?"),
    "vectors left over by the shares": Mutant("rows.cuh", "(slice.count + int(cluster_size()) - 1) / int", "slice.count / int"),
    "rows taken to begin at whole vectors": Mutant("rows.cuh", "min(int(-slice.row & (kEntries - 1)), vocabulary)", "0", said="unaligned"),
    "teacher held in the student's place": Mutant(
        "rows.cuh", "place(held_vectors + vector - slice.begin)", "place(vector - slice.begin)", 2
    ),
    "read beyond the row": Mutant(
        "rows.cuh",
        "(vocabulary - slice.first) / kEntries;",
        "(vocabulary - slice.first + 3) / kEntries;",
        sanitizer="address",
        said="heap-buffer-overflow",
    ),
    "held beyond the block's shared memory": Mutant(
        "rows.h",
        "rows.held_vectors * of_vector + kRowEdgeBytes",
        "rows.held_vectors * of_vector - 16",
        sanitizer="address",
        said="heap-buffer-overflow",
    ),
    # Order.
    "sums of warps read before they are there": Mutant(
        "rows.cuh", "  if (lane == 0) board.of_warp[warp] = sums;\n  __syncthreads();\n", "  if (lane == 0) board.of_warp[warp] = sums;\n"
    ),
    "sums of warps raced for": Mutant(
        "rows.cuh",
        "  if (lane == 0) board.of_warp[warp] = sums;\n  __syncthreads();\n",
        "  if (lane == 0) board.of_warp[warp] = sums;\n",
        sanitizer="thread",
        said="data race",
    ),
    "sums of blocks read before they are there": Mutant("rows.cuh", "  cluster_arrive();\n  cluster_wait();\n", ""),
    "a block gone before its sums are read": Mutant("rows.cuh", "if (cluster_size() > 1) cluster_wait();", ";", said=""),
    "barrier that some threads leave out": Mutant(
        "rows.cuh",
        "  if (lane == 0) board.of_warp[warp] = sums;\n  __syncthreads();\n",
        "  if (lane == 0) { board.of_warp[warp] = sums; __syncthreads(); }\n",
        said="deadlock|barrier",
    ),
    "terms written by every thread": Mutant(
        "rows.cuh", "cluster_rank() == 0 && threadIdx.x == 0;", "true;", sanitizer="thread", said="data race"
    ),
    # Columns.
    "rows overwritten and not added to": Mutant("columns.cu", "sum(load(to + i), load(from + i))", "load(from + i)"),
    "kept columns not weighted": Mutant("columns.cu", "dz * (load(gather.weights + i) / divisor)", "dz / divisor"),
    "columns of the first block alone": Mutant("columns.cu", "(gather.kept + kBlockColumns - 1) / kBlockColumns", "1"),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """The results without a mistake."""
    folder = tmp_path_factory.mktemp("right")
    status, said, results = run(copy_of_sources(folder), folder)
    assert status == 0, said
    return results


# With every third there is then one at least of each file, and of each sanitizer.
KEPT = ("a block's sums merged into those of one warp", "held beyond the block's shared memory")


@pytest.mark.parametrize("mutant", some(MUTANTS, 3, also=KEPT))
def test_mistake_is_found(mutant, right, tmp_path):
    seeds = (0, 1, 2, 3) if mutant.sanitizer == "" else (1, 2)
    status, said, results = run(copy_of_sources(tmp_path, *mutant[:4]), tmp_path, mutant.sanitizer, seeds)
    if status != 0:
        assert re.search(mutant.said or "refused", said), said[-2000:]
        return
    assert mutant.said == "", f"it ran, and nobody said {mutant.said!r}"
    assert not numpy.isfinite(results).all() or numpy.abs(results - right).max() > FOUND
