"""The tokens go through a backend's kernel a chunk at a time, so that logits exist for one chunk only: the chunked schedule.

For each chunk a kernel makes both models' logits in a workspace that every chunk reuses, the loss terms, the gradient of the logits
in their place, and from it d_hidden of the chunk and its share of d_weight: 3S + 1T products in all, S and T being one student- and
one teacher-head product. Tokens whose coefficients are all zero are left out before anything is multiplied.

The tile-fused schedule comes this way too, with larger chunks, kernels that keep no logits, and no gradients: 1S + 1T.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from distill_kernels import memory
from distill_kernels.plan import Plan, even_chunks
from distill_kernels.problem import STATS, TERMS, Problem, Tensors
from distill_kernels.products import relative_error


class Outputs(NamedTuple):
    terms: torch.Tensor  # (N, 3)
    d_hidden: torch.Tensor  # (N, D_s), or (0,) where not asked for
    d_weight: torch.Tensor  # (V, D_s), likewise
    d_bias: torch.Tensor  # (V,), likewise
    stats: torch.Tensor  # (N, 6), likewise
    gradient_error: torch.Tensor  # (2,) predicted of d_hidden and d_weight, relative, if they are sampled and stats are wanted, else (0,)


class Chunk(NamedTuple):
    """What a chunk kernel reads, and where it writes; all that is written is contiguous and of the compute dtype."""

    student_hidden: torch.Tensor  # (n, D_s)
    teacher_hidden: torch.Tensor | None  # (n, D_t)
    labels: torch.Tensor | None  # (n,) int64, contiguous, negative where there is none
    coefficients: torch.Tensor  # (n, 3) contiguous
    terms: torch.Tensor  # (n, 3) written
    stats: torch.Tensor | None  # (n, 6) written
    d_hidden: torch.Tensor | None  # (n, D_s) written
    d_weight: torch.Tensor | None  # (V, D_s) written by the first chunk, added to by the others
    d_bias: torch.Tensor | None  # (V,) likewise
    index: int
    variance: torch.Tensor | None  # (2,) added to: predicted squared error of d_hidden and d_weight; None: not wanted

    @property
    def first(self) -> bool:
        return self.index == 0


def empty_outputs(problem: Problem, like: torch.Tensor) -> Outputs:
    """Tensors of the outputs' shapes and dtypes, unwritten."""

    def new(wanted, *shape):
        return memory.empty(*(shape if wanted else (0,)), like=like, dtype=problem.compute_dtype)

    return Outputs(
        new(True, problem.tokens, len(TERMS)),
        new(problem.d_hidden, problem.tokens, problem.student_dim),
        new(problem.d_weight, problem.vocabulary, problem.student_dim),
        new(problem.d_bias, problem.vocabulary),
        new(problem.stats, problem.tokens, len(STATS)),
        new(problem.stats and problem.kept_columns, 2),
    )


def run(problem: Problem, tensors: Tensors, plan: Plan, kernel: Callable[[Chunk], None], compact: bool | None = None) -> Outputs:
    """Runs `kernel` over every chunk of the tokens that count; `compact` False: of all, the kernel zeroing what does not count."""
    outputs = empty_outputs(problem, tensors.student_hidden)
    active = None
    count = problem.tokens
    if problem.compact if compact is None else compact:
        active = (tensors.coefficients != 0).any(-1).nonzero().squeeze(-1)
        count = active.numel()
        for per_token in (outputs.terms, outputs.d_hidden, outputs.stats):
            per_token.zero_()
    if count == 0:
        outputs.d_weight.zero_()
        outputs.d_bias.zero_()

    variance = outputs.gradient_error.zero_() if outputs.gradient_error.numel() else None
    if problem.kept_columns:
        outputs.d_weight.zero_()  # most rows are of no chunk
    size = even_chunks(count, plan.chunk_tokens, plan.token_alignment)
    for begin in range(0, count, size):
        end = min(begin + size, count)
        tokens = slice(begin, end) if active is None else active[begin:end]

        def read(tensor, tokens=tokens):
            return None if tensor is None else tensor[tokens]

        def written(tensor, wanted, tokens=tokens):
            """Where the kernel writes a per-token output: in place if the chunk's tokens are neighbours."""
            if not wanted:
                return None
            return tensor[tokens] if active is None else tensor.new_empty(len(tokens), *tensor.shape[1:])

        chunk = Chunk(
            read(tensors.student_hidden),
            read(tensors.teacher_hidden),
            read(tensors.labels),
            tensors.coefficients[tokens].contiguous(),
            written(outputs.terms, True),
            written(outputs.stats, problem.stats),
            written(outputs.d_hidden, problem.d_hidden),
            outputs.d_weight if problem.d_weight else None,
            outputs.d_bias if problem.d_bias else None,
            index=begin // size,
            variance=variance,
        )
        kernel(chunk)
        if active is not None:
            for output, part in ((outputs.terms, chunk.terms), (outputs.stats, chunk.stats), (outputs.d_hidden, chunk.d_hidden)):
                if part is not None:
                    output[tokens] = part
    if variance is not None:
        squares = torch.stack([gradient.square().sum() for gradient in (outputs.d_hidden, outputs.d_weight)])
        variance.copy_(relative_error(variance, squares))
    return outputs
