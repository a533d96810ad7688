"""The tile-fused CUDA sweep in the emulation: its terms are the reference's, by mma.sync and by wgmma with the copy engine.

Each case runs in several schedules, of which the driver compares the bits: asynchronous copies and products happen as early or as late as
they may, and threads and blocks run in another order.
"""

import cuda_emulated
import pytest
import torch
from cuda_sweep_cases import ENTRIES, ROWS, WAYS, Refused, check, clamped, everything, make_case, run
from thinned import paired

pytestmark = pytest.mark.skipif(cuda_emulated.CXX is None, reason="there is no g++, which compiles the kernels for the emulation")


def with_gaps(matrix):
    """The same matrix, eight other elements between its rows: they begin at multiples of 16 bytes all the same."""
    wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + 8), torch.nan)
    wide[:, :-8] = matrix
    return wide[:, :-8]


def of_neighbours_in_a_wider_matrix():
    case = make_case(divergence="reverse_kl")
    return case._replace(inputs=case.inputs._replace(**{name: with_gaps(getattr(case.inputs, name)) for name in case.inputs._fields[:4]}))


def of_two_dtypes():
    case = make_case(vocabulary=129)
    half = case.inputs._replace(teacher_hidden=case.inputs.teacher_hidden.half(), teacher_weight=case.inputs.teacher_weight.half())
    return case._replace(inputs=half)


def without_a_teacher(**changes):
    case = make_case(**{"labels": True} | changes)
    return case._replace(inputs=case.inputs._replace(teacher_hidden=None, teacher_weight=None, teacher_bias=None))


def with_tokens_that_do_not_count():
    """Nor do they reach others: some hold NaN, some infinity, one has entries below the floor."""
    case = make_case(tokens=140, labels=True, label_smoothing=0.1)
    weights = torch.ones(140)
    weights[::3] = 0
    case.inputs.student_hidden[::3] = torch.nan
    case.inputs.teacher_hidden[3] = torch.inf
    case.inputs.student_hidden[6] = 3e4
    return case._replace(weights=weights)


def clamped_in_one_block():
    """One token of the second block alone has an entry below the floor."""
    case = make_case(tokens=150, vocabulary=200, bias=True, splits=2, labels=True, label_smoothing=0.1, temperature=0.5)
    case.inputs.student_hidden[140] *= 4e3
    return case


CASES = {
    "everything": everything(),
    # Many turns of either ring, a split of them all, each of whose tiles ends within a stage.
    "long": make_case(tokens=5, vocabulary=520, student_dim=200, teacher_dim=264),
    "one tile in three splits": make_case(tokens=130, vocabulary=7, splits=3, dtype=torch.float16, divergence="reverse_kl"),
    "fewest": make_case(tokens=1, vocabulary=2, student_dim=8, teacher_dim=8, family="grid"),
    "whole tiles": make_case(tokens=2 * ROWS, vocabulary=2 * ENTRIES, student_dim=64, teacher_dim=128, splits=2),
    "gaps": of_neighbours_in_a_wider_matrix(),
    "two dtypes": of_two_dtypes(),
    "cross entropy alone": without_a_teacher(terms=("cross_entropy", "z_loss"), label_smoothing=0.2, temperature=3.0),
    "entropy": without_a_teacher(divergence="student_entropy", temperature=0.7, splits=2),
    "clamped": clamped(),
    "clamped in one block": clamped_in_one_block(),
    "clamped, reverse": clamped(tokens=9, divergence="reverse_kl", dtype=torch.float16),
    "tokens that do not count": with_tokens_that_do_not_count(),
}


@pytest.mark.parametrize("case, way", paired(CASES, WAYS))
def test_terms_are_those_of_the_reference(case, way, tmp_path):
    check(case, *way, tmp_path)


def test_four_blocks_share_a_head(tmp_path):
    check(make_case(tokens=390, splits=2, labels=True), "wgmma", 4, tmp_path)


def test_splits_change_next_to_nothing(tmp_path):
    case = CASES["long"]
    (one, *_), (three, *_) = (run(case._replace(splits=splits), "mma", 1, tmp_path) for splits in (1, 3))
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-6)


def test_divergence_of_two_passes_is_refused(tmp_path):
    with pytest.raises(Refused, match="keeps no logits, and sums of jensen_shannon"):
        run(make_case(divergence="jensen_shannon"), "mma", 1, tmp_path)


@pytest.mark.parametrize("instructions, cluster", [*WAYS, ("wgmma", 4)], ids=str)
def test_bytes_are_those_of_the_closed_form(instructions, cluster, tmp_path):
    case = make_case(tokens=390, vocabulary=300, student_dim=72, teacher_dim=136, splits=2, terms=("divergence",))
    read, written = run(case, instructions, cluster, tmp_path, schedules=(0,))[1:]
    tokens, vocabulary, splits, dims = 390, 300, case.splits, 72 + 136
    products = (-(-tokens // (ROWS * cluster)) * vocabulary + -(-vocabulary // ENTRIES) * tokens) * dims * 2  # as sweep.cuh has them
    statistics, merged, lanes = 11 * 4, 11 * 4, 32
    # The first coefficient of a token by each lane, all by the one that ends it; its splits' sums; whether it needs totals, by each lane.
    merging = tokens * (lanes * 4 + 3 * 4 + statistics * splits + lanes)
    # Whether a block has such a token, by each of its warps, of all tokens of its cluster.
    asking = (8 if instructions == "mma" else 12) * splits * cluster * tokens
    assert read == products + merging + asking
    assert written == tokens * (statistics * splits + merged + 3 * 4)
