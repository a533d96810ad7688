"""The tile-fused sweep, csrc/cuda/sweep.cu: terms of a chunk straight from hidden states and heads, no logits in memory."""

from typing import NamedTuple

import torch

from distill_kernels.backends.cuda import extension, launch
from distill_kernels.backends.cuda.launch import ELEMENTS, Launcher, Limits, address, place
from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.schedule import chunked

ALIGNMENT = 16  # bytes: where rows begin, for copies of as many
MMA, WGMMA = 0, 1  # sweep.h: enum class Instructions
WGMMA_CAPABILITY = 90  # and no other: the instruction is of sm_90a
CLUSTERS = (4, 2, 1)
MOST_WAVES = 4  # of blocks, that a chip is filled with by splits


class SweepShape(NamedTuple):
    instructions: int
    cluster: int  # blocks of neighbouring tokens that read a head together
    blocks: int  # of tokens
    splits: int  # of the vocabulary
    split_entries: int


def why_not_swept(problem: Problem) -> str | None:
    """None if the sweep's products take these matrices, else why not; of a problem that keeps no logits."""
    models = [("student", problem.student_dtype, problem.student_dim)]
    models += [("teacher", problem.teacher_dtype, problem.teacher_dim)] if problem.teacher_dim else []
    for name, dtype, dim in models:
        if dtype not in (torch.bfloat16, torch.float16):
            return f"the sweep multiplies matrices of 16 bits, the {name}'s are {str(dtype).removeprefix('torch.')}"
        if dim * dtype.itemsize % ALIGNMENT:
            return f"the sweep copies 8 elements at a time, and the {name}'s hidden size {dim} is no multiple of them"
    return None


def sweep_shape(tokens: int, vocabulary: int, limits: Limits) -> SweepShape:
    """As many splits as make the last wave of blocks end soonest: a wave takes as long as a split has tiles."""
    rows, entries = extension.kernels.sweep_rows, extension.kernels.sweep_entries
    instructions = WGMMA if limits.capability == WGMMA_CAPABILITY else MMA
    blocks, tiles = -(-tokens // rows), -(-vocabulary // entries)
    # Four read a head once, and ask the L2 cache for 20 kB where one alone asks for 32. Blocks without a token, to fill a cluster, are few.
    fitting = [size for size in CLUSTERS if size <= blocks and -blocks % size * 8 <= blocks]
    cluster = fitting[0] if instructions == WGMMA else 1
    blocks = -(-blocks // cluster) * cluster

    def waves_of_tiles(splits):
        return -(-blocks * splits // limits.multiprocessors) * -(-tiles // splits)

    splits = min(range(1, max(1, min(tiles, _most_blocks(limits) // blocks)) + 1), key=waves_of_tiles)
    return SweepShape(instructions, cluster, blocks, splits, -(-tiles // splits) * entries)


def _most_blocks(limits: Limits) -> int:
    return MOST_WAVES * limits.multiprocessors


def workspace_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes of partial sums, at most: (for each token, and beside them)."""
    of_one = extension.kernels.sweep_token_bytes(1)
    of_split = extension.kernels.sweep_token_bytes(2) - of_one
    return of_one, of_split * extension.kernels.sweep_rows * _most_blocks(launch.limits(launch.index_of(problem.device)))


class Sweeper(Launcher):
    """The sweep of one call. A matrix whose rows do not begin at multiples of 16 bytes is copied: a head once for the call."""

    def __init__(self, problem: Problem, tensors: Tensors):
        super().__init__(problem, tensors)
        self.heads = tuple(None if head is None else _aligned(head) for head in (tensors.student_weight, tensors.teacher_weight))

    def sweep(self, chunk: chunked.Chunk):
        """Terms of a chunk."""
        tokens = len(chunk.student_hidden)
        shape = sweep_shape(tokens, self.problem.vocabulary, self.limits)
        hidden = tuple(None if matrix is None else _aligned(matrix) for matrix in (chunk.student_hidden, chunk.teacher_hidden))
        workspace = torch.empty(tokens * extension.kernels.sweep_token_bytes(shape.splits), dtype=torch.uint8, device=self.device)
        of_sweep = {
            "student": _multiplied(hidden[0], self.heads[0]),
            "teacher": _multiplied(hidden[1], self.heads[1]),
            "splits": shape.splits,
            "split_entries": shape.split_entries,
            "workspace": address(workspace),
            "instructions": shape.instructions,
            "cluster": shape.cluster,
        }
        extension.kernels.sweep(self.loss_of(chunk), of_sweep, self.divergence, self.parameters, **place(self.device))


def _multiplied(hidden, head):
    if hidden is None:
        return {"dim": 0, "element": 0, "hidden": 0, "hidden_stride": 0, "weight": 0, "weight_stride": 0}
    return {
        "dim": hidden.shape[1],
        "element": ELEMENTS[hidden.dtype],
        "hidden": address(hidden),
        "hidden_stride": hidden.stride(0),
        "weight": address(head),
        "weight_stride": head.stride(0),
    }


def _aligned(matrix):
    """The matrix if copies of 16 bytes can read it and rows do not overlap, else a copy."""
    stride = matrix.stride(0) * matrix.element_size()
    reads = matrix.stride(1) == 1 and stride % ALIGNMENT == 0 and matrix.stride(0) >= matrix.shape[1] and matrix.data_ptr() % ALIGNMENT == 0
    return matrix if reads else matrix.clone(memory_format=torch.contiguous_format)
