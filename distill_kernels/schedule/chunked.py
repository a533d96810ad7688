"""The tokens go through a backend's kernel a chunk at a time, so that logits exist for one chunk only: the chunked schedule.

For each chunk a kernel makes both models' logits in a workspace that every chunk reuses, the loss terms, the gradient of the logits
in their place, and from it d_hidden of the chunk and its share of d_weight: 3S + 1T products in all, S and T being one student- and
one teacher-head product. Tokens whose coefficients are all zero are left out before anything is multiplied.

The tile-fused schedule comes this way too, with larger chunks, kernels that keep no logits, and no gradients: 1S + 1T.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from distill_kernels import memory
from distill_kernels.call.problem import STATS, TERMS, Problem, Tensors
from distill_kernels.call.shards import Shards, waited_for
from distill_kernels.estimators.sampling import relative_error
from distill_kernels.schedule.plan import Plan, even_chunks


class Outputs(NamedTuple):
    terms: torch.Tensor  # (N, 3)
    d_hidden: torch.Tensor  # (N, D_s), or (0,) where not asked for
    d_weight: torch.Tensor  # (V, D_s), likewise
    d_bias: torch.Tensor  # (V,), likewise
    stats: torch.Tensor  # (N, 6), likewise
    gradient_error: torch.Tensor  # (2,) predicted of d_hidden and d_weight, relative, if they are sampled and stats are wanted, else (0,)
    errors: torch.Tensor  # (N, 2) of a quantised sweep, else (0,): standard errors of the divergence and of the untempered log-sum-exp
    recomputed: torch.Tensor  # (1,) int64 likewise: chunks that were computed exactly in the end
    # What sampled gradients are made of in backward; (0,) both where that is not so.
    kept_dz: torch.Tensor  # (padded tokens · K,) of each chunk in its turn, as the backend's kernels lay it out
    kept_columns: torch.Tensor  # (chunks, K) int64


class Chunk(NamedTuple):
    """What a chunk kernel reads, and where it writes; all that is written is contiguous and of the compute dtype."""

    student_hidden: torch.Tensor  # (n, D_s)
    teacher_hidden: torch.Tensor | None  # (n, D_t)
    labels: torch.Tensor | None  # (n,) int64, contiguous, negative where there is none
    coefficients: torch.Tensor  # (n, 3) contiguous
    tokens: slice | torch.Tensor  # which of the call's they are
    terms: torch.Tensor  # (n, 3) written
    stats: torch.Tensor | None  # (n, 6) written
    d_hidden: torch.Tensor | None  # (n, D_s) written
    d_weight: torch.Tensor | None  # (V, D_s) written by the first chunk, added to by the others; by all where columns are sampled
    d_bias: torch.Tensor | None  # (V,) written by the first chunk, added to by the others; by all of a quantised sweep
    index: int
    variance: torch.Tensor | None  # (2,) added to: predicted squared error of d_hidden and d_weight; None: not wanted
    errors: torch.Tensor | None  # (n, 2) written; None: no quantised sweep
    recomputed: torch.Tensor | None  # (1,) added to, likewise
    kept_dz: torch.Tensor | None  # (padded n · K,) written; None: not kept beyond the chunk
    kept_columns: torch.Tensor | None  # (K,) likewise

    @property
    def first(self) -> bool:
        return self.index == 0


def empty_outputs(problem: Problem, like: torch.Tensor, plan: Plan | None) -> Outputs:
    """Tensors of the outputs' shapes and dtypes, unwritten. The plan is needed where `problem.keeps_dz`."""

    def new(wanted, *shape, dtype=problem.compute_dtype):
        return memory.empty(*(shape if wanted else (0,)), like=like, dtype=dtype)

    now = not problem.keeps_dz
    kept, padded, chunks = 0, 0, 0
    if problem.keeps_dz:
        kept, chunks = problem.kept_columns, plan.chunks
        padded = -(-problem.tokens // plan.token_alignment) * plan.token_alignment
    return Outputs(
        new(True, problem.tokens, len(TERMS)),
        new(problem.d_hidden and now, problem.tokens, problem.student_dim),
        new(problem.d_weight and now, problem.vocabulary, problem.student_dim),
        new(problem.d_bias, problem.vocabulary),
        new(problem.stats, problem.tokens, len(STATS)),
        new(problem.stats and problem.kept_columns and problem.gradient and now, 2),
        new(problem.swept, problem.tokens, 2),
        new(problem.swept, 1, dtype=torch.int64),
        new(problem.keeps_dz, padded * kept),
        new(problem.keeps_dz, chunks, kept, dtype=torch.int64),
    )


def compacts(problem: Problem) -> bool:
    """Whether masked tokens are left out: how many there are is known on the device only, and a graph that is being captured cannot wait to
    read it."""
    return problem.compact and not (problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


# A chunk's work, or a generator that does it and yields while numbers of other ranks are on their way.
Kernel = Callable[[Chunk], Iterator | None]


def run(problem: Problem, tensors: Tensors, plan: Plan, kernel: Kernel, compact: bool | None = None) -> Outputs:
    """Runs `kernel` over every chunk of the tokens that count; `compact` False: of all, the kernel zeroing what does not count.

    Of a vocabulary in shards, d_hidden is added up over the ranks unless `problem.shares_d_hidden`."""
    shards = Shards.of(problem)
    outputs = empty_outputs(problem, tensors.student_hidden, plan)
    compact = problem.compact if compact is None else compact
    if compact:
        for per_token in (outputs.terms, outputs.d_hidden, outputs.stats, outputs.errors):
            per_token.zero_()
    variance = outputs.gradient_error.zero_() if outputs.gradient_error.numel() else None
    outputs.recomputed.zero_()
    if problem.kept_columns:
        outputs.d_weight.zero_()  # most rows are of no chunk
    if problem.swept:
        outputs.d_bias.zero_()
    adds_up = shards is not None and problem.d_hidden and not problem.shares_d_hidden
    chunk_kernel = _adding_up(kernel, shards) if adds_up else kernel
    if _over_chunks(tensors, plan.chunk_tokens, plan.token_alignment, chunk_kernel, compact, outputs, variance) == 0:
        outputs.d_weight.zero_()
        outputs.d_bias.zero_()
    if variance is not None:
        squares = torch.stack([gradient.square().sum() for gradient in (outputs.d_hidden, outputs.d_weight)])
        if shards is not None:
            of_weight = waited_for(shards.gather(torch.stack([*variance, squares[1]]))).sum(0)
            variance, squares[1] = of_weight[:2], of_weight[2]
            if problem.shares_d_hidden:
                squares[0] = torch.nan  # nobody has the sum whose error it would be
        outputs.gradient_error.copy_(relative_error(variance, squares))
    return outputs


def _adding_up(kernel: Kernel, shards: Shards) -> Kernel:
    def sharded(chunk: Chunk):
        yield from kernel(chunk)
        yield from shards.add_up(chunk.d_hidden)

    return sharded


class Saved(NamedTuple):
    """What the gradients are made of in backward, if forward had Problem.keeps_dz."""

    student_hidden: torch.Tensor  # (N, D_s)
    student_weight: torch.Tensor  # (V, D_s)
    coefficients: torch.Tensor  # (N, 3) of forward, which they are those of
    upstream: torch.Tensor  # (N,) multiplies a token's
    kept_dz: torch.Tensor  # as in Outputs
    kept_columns: torch.Tensor
    compact: bool  # whether forward left out masked tokens

    def chunk_tokens(self, alignment: int) -> int:
        """Of the forward's plan: the only such number that makes as many chunks."""
        return even_chunks(len(self.student_hidden), -(-len(self.student_hidden) // len(self.kept_columns)), alignment)


def multiply_kept(problem: Problem, saved: Saved, token_alignment: int, kernel: Callable[[Chunk, torch.Tensor], None]) -> Outputs:
    """The gradients alone, a chunk of the forward's at a time: kernel(chunk, upstream (n,))."""
    outputs = empty_outputs(replace(problem, keeps_dz=False, stats=False), saved.student_hidden, None)
    if saved.compact:
        outputs.d_hidden.zero_()
    outputs.d_weight.zero_()
    read = Tensors(*(getattr(saved, name, None) for name in Tensors._fields))
    both = outputs._replace(kept_dz=saved.kept_dz, kept_columns=saved.kept_columns)
    chunk_tokens = saved.chunk_tokens(token_alignment)
    _over_chunks(read, chunk_tokens, token_alignment, lambda chunk: kernel(chunk, saved.upstream[chunk.tokens]), saved.compact, both, None)
    return outputs


def _over_chunks(tensors: Tensors, chunk_tokens, token_alignment, kernel, compact: bool, outputs: Outputs, variance) -> int:
    """Runs `kernel` over the chunks; returns the tokens that went through.

    Chunks whose kernels yield are in work two at a time, each taking a step while the other's numbers are on their way; the earlier one
    is always ahead, so that what they add up is added in the order of the chunks.
    """
    in_work = []

    def advance():
        """A step of each chunk in turn, up to the first that is done."""
        for work in in_work:
            if _step(work):
                in_work.remove(work)
                written_back(work[0])
                return

    def written_back(chunk):
        if active is not None:
            for name in ("terms", "stats", "d_hidden", "errors"):
                if getattr(chunk, name) is not None:
                    getattr(outputs, name)[chunk.tokens] = getattr(chunk, name)

    active = None
    count = len(tensors.student_hidden)
    if compact:
        active = (tensors.coefficients != 0).any(-1).nonzero().squeeze(-1)
        count = active.numel()
    size = even_chunks(count, chunk_tokens, token_alignment)
    columns = outputs.kept_columns
    for begin in range(0, count, size):
        end = min(begin + size, count)
        tokens = slice(begin, end) if active is None else active[begin:end]
        index = begin // size
        kept = columns[index] if columns.numel() else None

        def read(tensor, tokens=tokens):
            return None if tensor is None else tensor[tokens]

        def written(tensor, tokens=tokens):
            """Where the kernel writes a per-token output: in place if the chunk's tokens are neighbours."""
            if not tensor.numel():
                return None
            return tensor[tokens] if active is None else tensor.new_empty(len(tokens), *tensor.shape[1:])

        chunk = Chunk(
            read(tensors.student_hidden),
            read(tensors.teacher_hidden),
            read(tensors.labels),
            tensors.coefficients[tokens].contiguous(),
            tokens,
            written(outputs.terms),
            written(outputs.stats),
            written(outputs.d_hidden),
            outputs.d_weight if outputs.d_weight.numel() else None,
            outputs.d_bias if outputs.d_bias.numel() else None,
            index=index,
            variance=variance,
            errors=written(outputs.errors),
            recomputed=outputs.recomputed if outputs.recomputed.numel() else None,
            kept_dz=None if kept is None else outputs.kept_dz[begin * len(kept) :],
            kept_columns=kept,
        )
        work = chunk, kernel(chunk) or iter(())
        if _step(work):
            written_back(chunk)
            continue
        in_work.append(work)
        while len(in_work) == IN_WORK:
            advance()
    while in_work:
        advance()
    return count


IN_WORK = 2  # chunks at a time, of kernels that yield


def _step(work: tuple[Chunk, Iterator]) -> bool:
    """Whether the chunk is done."""
    done = object()
    return next(work[1], done) is done
