"""The CUDA sweep under sanitizers, and mistakes that it could have: each, made in a copy of the sources, must be found out.

Found means: the emulation or a sanitizer refuses the run, two schedules differ in a bit, or a term is off by more than the tolerance rule
of `accuracy` allows.
"""

from typing import NamedTuple

import cuda_emulated
import pytest
from cuda_sweep_cases import Case, Refused, check, clamped, everything, make_case
from thinned import paired, some

pytestmark = pytest.mark.skipif(cuda_emulated.CXX is None, reason="there is no g++, which compiles the kernels for the emulation")

# Tokens of one block, and more stages than either ring holds; the second block of a cluster has no token.
RING = make_case(tokens=5, vocabulary=260, student_dim=136, teacher_dim=72)
LABELLED = everything(tokens=140, student_dim=40, teacher_dim=24)
TWO_SPLITS = make_case(tokens=9, vocabulary=300, splits=2)
CLAMPED = clamped(tokens=9)
BLOCKS = make_case(tokens=140, terms=("divergence",))


def copy_of_sources(folder, name=None, old="", new="", count=1):
    """A copy of csrc with one divergence, in one of whose files a text is replaced."""
    csrc = cuda_emulated.copy_of_sources(folder)
    cuda_emulated.replace(csrc / "cuda/sweep_launch.h", " X(reverse_kl) X(student_entropy)", "")
    (csrc / "generated/divergence_list.h").write_text("#define DK_FOR_EACH_DIVERGENCE(X) X(forward_kl)\n")
    if name is not None:
        cuda_emulated.replace(csrc / "cuda" / name, old, new, count)
    return csrc


@pytest.mark.parametrize("sanitizer, way", paired({"thread": "thread", "plain": "", "address": "address"}, [("wgmma", 2), ("mma", 1)]))
def test_copy_without_a_mistake_passes(way, sanitizer, tmp_path):
    csrc = copy_of_sources(tmp_path)
    for case in (RING, CLAMPED) if sanitizer == "thread" else (RING, CLAMPED, LABELLED, TWO_SPLITS, BLOCKS):
        check(case, *way, tmp_path, sanitizer=sanitizer, csrc=csrc)


class Mutant(NamedTuple):
    name: str
    old: str
    new: str
    way: tuple
    case: Case
    said: str = ""  # by whoever refuses it; empty: its terms may be wrong instead
    sanitizer: str = ""
    count: int = 1


MMA, WGMMA, CLUSTER = ("mma", 1), ("wgmma", 1), ("wgmma", 2)
MUTANTS = {
    # The ring of mma.sync.
    "one copy fewer waited for": Mutant("sweep_mma.cu", "wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>", MMA, RING),
    "stage read while others still copy": Mutant(
        "sweep_mma.cu", "      __syncthreads();  // the stage", "      // the stage", MMA, RING, "data race", "thread"
    ),
    "stage written that is still read": Mutant(
        "sweep_mma.cu", "written = written + 1 == kStages ? 0 : written + 1", "written = written + 1 == kStages - 1 ? 0 : written + 1",
        MMA, RING,
    ),
    "end of a dimension lost": Mutant("sweep_mma.cu", "k < dim; k += kDepth", "k + kDepth <= dim; k += kDepth", MMA, RING),
    "parts of a row in each other's place": Mutant("sweep_mma.cu", "part ^ (row / 2", "part | (row / 2", MMA, RING),
    "hidden states read beyond the tokens": Mutant(
        "sweep_mma.cu", "first_row + row < rows && k < dim", "first_row + row < rows + 64 && k < dim", MMA, RING,
        "heap-buffer-overflow", "address",
    ),
    "sums merged before they are there": Mutant(
        "sweep_mma.cu", "  __syncthreads();\n  write_sums", "  write_sums", MMA, BLOCKS, "data race", "thread"
    ),
    # Barriers, copies and products of wgmma.
    "full stage of the wrong parity": Mutant("sweep_wgmma.cu", "turn.stage, turn.parity);", "turn.stage, turn.parity ^ 1);", WGMMA, RING),
    "empty stage of the wrong parity": Mutant(
        "sweep_wgmma.cu", "turn.stage, turn.parity ^ 1);", "turn.stage, turn.parity);", WGMMA, RING, "deadlock"
    ),
    "parity of the first round for ever": Mutant("sweep_wgmma.cu", "    parity ^= 1;\n", "", WGMMA, RING),
    "barriers that the copy engine was not told of": Mutant(
        "sweep_wgmma.cu", "    publish_barriers();\n", "", WGMMA, RING, "the copy engine was not told of"
    ),
    "sums not handed over": Mutant("sweep_wgmma.cu", "      fence_sums();\n", "", WGMMA, RING, "no fence has handed over"),
    "products not committed": Mutant("sweep_wgmma.cu", "      commit_products();\n", "", WGMMA, RING),
    "last products not waited for": Mutant("sweep_wgmma.cu", "wait_for_products<0>", "wait_for_products<1>", WGMMA, RING),
    "stage released that is still read": Mutant(
        "sweep_wgmma.cu", "wait_for_products<1>();  //", "wait_for_products<2>();  //", WGMMA, RING, "data race", "thread"
    ),
    "stage never released": Mutant("sweep_wgmma.cu", "      if (before >= 0) release(before);\n", "", WGMMA, RING, "deadlock"),
    "fewer bytes expected than come": Mutant(
        "sweep_wgmma.cu", "arrive_and_expect(full, kStageBytes)", "arrive_and_expect(full, kHiddenBytes)", WGMMA, RING
    ),
    "head not at the ring's end of the hidden states": Mutant(
        "sweep_wgmma.cu", "return hidden(stage) + kHiddenBytes", "return hidden(stage) + kHiddenBytes / 2", WGMMA, BLOCKS
    ),
    "sums of the tile before": Mutant("sweep_wgmma.cu", "k + part > 0", "true", WGMMA, RING),
    "eight rows further on at the wrong place": Mutant("wgmma.cuh", "uint64_t(1024 >> 4) << 32", "uint64_t(512 >> 4) << 32", WGMMA, RING),
    "tiles not said to be swizzled": Mutant("wgmma.cuh", " | uint64_t(1) << 62", "", WGMMA, RING, "not swizzled"),
    "both groups multiply the first tokens": Mutant(
        "sweep_wgmma.cu", "thread / kGroup * kWgmmaRows * kRowBytes", "thread / kThreads * kWgmmaRows * kRowBytes", WGMMA, BLOCKS
    ),
    "head copied beyond the vocabulary": Mutant(
        "sweep_wgmma.cu", "sweep.loss.vocabulary, model.dim", "sweep.loss.vocabulary + 1, model.dim", WGMMA, RING, "heap-buffer-overflow",
        "address",
    ),
    "sums merged before all have theirs": Mutant(
        "sweep_wgmma.cu", "    barrier_of_threads<WgmmaParts::kThreads>();\n", "", WGMMA, BLOCKS, "data race", "thread"
    ),
    # Clusters.
    "every block copies the first share": Mutant("sweep_wgmma.cu", "at + rank * share", "at", CLUSTER, BLOCKS),
    "stage empty when its own block has read it": Mutant(
        "sweep_wgmma.cu", "cluster * (WgmmaParts::kThreads / 32)", "WgmmaParts::kThreads / 32 + 0 * cluster", CLUSTER, RING
    ),
    "others not told of a stage that was read": Mutant(
        "sweep_wgmma.cu", "if (unsigned(thread % 32) < cluster)", "if (unsigned(thread % 32) < 1)", CLUSTER, RING, "deadlock"
    ),
    "block ends while others arrive at its barriers": Mutant(
        "sweep_wgmma.cu", "  cluster_arrive();  // no block ends while another still arrives at its barriers\n  cluster_wait();\n", "",
        CLUSTER, RING,
    ),
    # What both have.
    "rows beyond the vocabulary counted": Mutant("sweep.cuh", "take_statistics<true>", "take_statistics<false>", MMA, RING),
    "sums of another row": Mutant("sweep.cuh", "words + row * Parts::kThreads", "words + 0 * row * Parts::kThreads", MMA, BLOCKS),
    "holders of a row mistaken": Mutant("sweep.cuh", "row % 8 * 4 + i % 4", "row % 8 + i % 4 * 8", WGMMA, BLOCKS),
    "every split in the place of the first": Mutant("sweep.cuh", "sweep.splits + place.split,", "sweep.splits,", MMA, TWO_SPLITS),
    "label that stands for none": Mutant("sweep.cuh", "return label < 0 ? -1 : int(label)", "return int(label)", MMA, LABELLED),
    "last split not merged": Mutant("sweep.cu", "split < takes.sweep.splits;", "split < takes.sweep.splits - 1;", MMA, TWO_SPLITS),
    "nothing below the floor": Mutant(
        "sweep.cu", "merged_token.clamped = wants_totals<Divergence>(merged_token, loss)", "merged_token.clamped = false", MMA, CLAMPED
    ),
    "no second pass": Mutant("sweep.cuh", "if (Takes::kAll) return true;", "return Takes::kAll;", MMA, CLAMPED),
}  # fmt: skip


# With every third there is then one at least of each file, and of each sanitizer.
KEPT = (
    "hidden states read beyond the tokens", "sums merged before all have theirs", "tiles not said to be swizzled",
    "rows beyond the vocabulary counted",
)  # fmt: skip


@pytest.mark.parametrize("mutant", some(MUTANTS, 3, also=KEPT))
def test_mistake_is_found(mutant, tmp_path):
    csrc = copy_of_sources(tmp_path, mutant.name, mutant.old, mutant.new, mutant.count)
    with pytest.raises((Refused, AssertionError)) as found:
        check(mutant.case, *mutant.way, tmp_path, sanitizer=mutant.sanitizer, csrc=csrc)
    assert not mutant.said or (found.type is Refused and mutant.said in str(found.value)), str(found.value)[:1000]
