"""How many tokens a chunk holds, and what a call costs: pure functions of the problem, never of the memory that happens to be free.

The chunked schedule keeps, at any time, the float32 logits of one chunk of tokens, student's and teacher's; the tile-fused one keeps
none. Everything they allocate beyond gradients fits in `workspace_mib`; the rest of this file is arithmetic anyone can check by hand.
"""

from dataclasses import dataclass

from distill_kernels.call.problem import Problem
from distill_kernels.estimators.quantised import padded_dim

MIB = 2**20


@dataclass(frozen=True)
class Schedule:
    """How a backend goes through a problem, and what its kernel holds beside the logits of its chunk."""

    name: str = "chunked"
    reason: str = "the backend's only schedule"
    keeps_logits: bool = True  # of a chunk's tokens over the whole vocabulary
    most_tokens: int | None = None  # larger chunks would not be faster
    most_bytes: int | None = None  # nor would more memory for a chunk's tokens; `workspace_mib` alone limits what is fixed
    token_alignment: int = 1  # chunks are allocated in multiples of this
    in_flight: int = 1  # chunks at a time: one works while numbers of another are on their way to other ranks
    exchanged: int = 0  # numbers of each token that a rank tells every other, of a vocabulary in shards
    token_bytes: int = 0  # for each token of a chunk
    fixed_bytes: int = 0
    row_bytes: int = 0  # temporaries for each of `Plan.row_tokens` tokens; 0: the kernel has none


@dataclass(frozen=True)
class Plan:
    schedule: str  # "chunked": a chunk's logits are kept; "tile-fused": no logits are
    reason: str  # why that one
    chunk_tokens: int  # tokens that go through at a time
    chunks: int  # when no token is masked
    token_alignment: int  # what a kernel rounds a chunk's tokens up to
    row_tokens: int  # tokens for which the row kernel's own temporaries are held at a time
    workspace_bytes: int
    saved_bytes: int  # columns of dz kept from forward to backward
    quantised_bytes: int  # of both heads in 8 bits; none of it is the call's where prepared heads are passed
    gradient_bytes: int  # accumulators of the gradients, in the compute dtype
    cast_bytes: int  # the gradients once more in the inputs' dtype, where that is another
    eager_bytes: int  # what eager torch holds at its peak for the same loss, gradients left out
    forward_flops: int
    backward_flops: int
    exchanged_bytes: int = 0  # that each rank of a vocabulary in shards receives

    @property
    def peak_bytes(self) -> int:
        """Peak above the inputs: workspace, gradient accumulators, and the casts that replace them at the end; and quantised heads."""
        while_running = self.workspace_bytes + self.saved_bytes + self.gradient_bytes
        return self.quantised_bytes + max(while_running, self.gradient_bytes + self.cast_bytes)

    def __str__(self) -> str:
        def mib(count: float) -> str:
            return f"{count / MIB:,.1f} MiB"

        return "\n".join(
            [
                f"schedule    {self.schedule}: {self.reason}",
                f"chunks      {self.chunks:,} of {self.chunk_tokens:,} tokens",
                f"workspace   {mib(self.workspace_bytes)}",
                *([f"kept        {mib(self.saved_bytes)} from forward to backward"] if self.saved_bytes else []),
                *([f"quantised   {mib(self.quantised_bytes)} of heads, unless prepared ones are passed"] if self.quantised_bytes else []),
                f"gradients   {mib(self.gradient_bytes)} accumulated, {mib(self.cast_bytes)} cast",
                f"peak        {mib(self.peak_bytes)} above the inputs",
                f"eager       {mib(self.eager_bytes + self.gradient_bytes + self.cast_bytes)} above the inputs",
                *([f"exchanged   {mib(self.exchanged_bytes)} received of other ranks"] if self.exchanged_bytes else []),
                f"products    {self.forward_flops / 1e12:,.3f} TFLOP forward, {self.backward_flops / 1e12:,.3f} TFLOP backward",
            ]
        )


def keeps_logits(problem: Problem) -> tuple[bool, str]:
    """Whether the logits of a chunk outlive the tile that they are made on, and why."""
    if problem.swept:
        return False, f"the {problem.options.sweep} sweep sums what it makes and keeps no logits but those of a few columns, exact"
    if problem.gradient:
        return True, "gradients are made from logits once the log-sum-exps are known; keeping those saves 1S + 1T"
    if problem.divergence is not None and not problem.divergence.one_pass:
        return True, f"{problem.divergence.name} is summed once the log-sum-exps are known; keeping the logits saves 1S + 1T"
    if problem.stats:
        return True, "the stats are summed once the log-sum-exps are known; keeping the logits saves 1S + 1T"
    return False, "without gradients one pass over the heads sums everything, so no logits are kept"


def _of_columns(problem: Problem) -> str:
    if not problem.kept_columns:
        return ""
    most = "at most " if problem.options.gradient_tolerance else ""
    kept = f"{most}{problem.kept_columns} of {problem.vocabulary} columns, drawn for each chunk"
    until = ", and kept for backward" if problem.keeps_dz else ""
    if problem.swept:
        return f"; sums are corrected by, and gradients go over, {kept}{until}: fewer tokens to a chunk draw better, more multiply faster"
    return f"; gradients go over {kept}{until}: fewer tokens to a chunk draw better, more multiply faster"


def even_chunks(tokens: int, most: int, alignment: int) -> int:
    """Tokens to a chunk, at most `most`: chunks of one size, rather than a last one with a few tokens."""
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // (chunks * alignment))) * alignment


def make_plan(problem: Problem, schedule: Schedule) -> Plan:
    """Raises ValueError if `workspace_mib` cannot hold one token (or one aligned group of tokens)."""
    element = problem.compute_dtype.itemsize
    logits_bytes = problem.vocabulary * element * (2 if problem.teacher_dim else 1) if schedule.keeps_logits else 0
    token_bytes = (logits_bytes + schedule.token_bytes) * schedule.in_flight
    alignment = schedule.token_alignment
    kept = problem.kept_columns
    saved_token_bytes = kept * element if problem.keeps_dz else 0
    left = problem.workspace_mib * MIB - schedule.fixed_bytes - problem.tokens * saved_token_bytes
    # For the row kernel's temporaries a quarter, or what the smallest chunk leaves, but at least one token's.
    row_tokens = max(1, min(left // 4, left - alignment * token_bytes) // schedule.row_bytes) if schedule.row_bytes else 0
    left -= row_tokens * schedule.row_bytes
    most = left // token_bytes // alignment * alignment
    if most < 1:
        needed = -(-(schedule.fixed_bytes + problem.tokens * saved_token_bytes + schedule.row_bytes + alignment * token_bytes) // MIB)
        raise ValueError(
            f"workspace_mib={problem.workspace_mib} cannot hold the {'logits' if schedule.keeps_logits else 'sums'} of {alignment} "
            f"token{'s' * (alignment > 1)} at vocabulary size {problem.vocabulary}; it needs at least {needed}"
        )
    if schedule.most_tokens is not None:
        most = min(most, schedule.most_tokens)
    if schedule.most_bytes is not None:
        most = min(most, max(1, schedule.most_bytes // token_bytes // alignment) * alignment)
    chunk_tokens = even_chunks(problem.tokens, most, alignment)
    row_tokens = min(row_tokens, chunk_tokens)
    chunks = max(1, -(-problem.tokens // chunk_tokens))

    student_values = problem.tokens * problem.student_dim * problem.d_hidden
    head_values = problem.vocabulary * (problem.student_dim * problem.d_weight + problem.d_bias)
    gradient_values = student_values + head_values
    quantised_values = sum(padded_dim(dim) + 12 for dim in (problem.student_dim, problem.teacher_dim) if dim)
    forward_columns = problem.vocabulary + kept * problem.swept
    # Eager torch, float32 logits: both models' logits and log-softmaxes forward; then both log-softmaxes, the pointwise divergence
    # and two gradients of that size. Five buffers at once either way with a teacher, three without.
    eager_buffers = 5 if problem.teacher_dim else 3
    # All others' numbers; and of a sum, by rings: each part of it once on its way to the rank that adds it up last, and once from there.
    others = max(0, len(problem.shard_sizes) - 1)
    passes = (1 if problem.shares_d_hidden else 2) * others / max(1, len(problem.shard_sizes))
    exchanged_values = problem.tokens * (schedule.exchanged * others + passes * problem.student_dim * problem.d_hidden)
    return Plan(
        schedule=schedule.name,
        reason=schedule.reason + _of_columns(problem),
        chunk_tokens=chunk_tokens,
        chunks=chunks,
        token_alignment=alignment,
        row_tokens=row_tokens,
        workspace_bytes=chunk_tokens * token_bytes + schedule.fixed_bytes + row_tokens * schedule.row_bytes,
        saved_bytes=-(-problem.tokens // alignment) * alignment * saved_token_bytes + (chunks * kept * 8 if problem.keeps_dz else 0),
        quantised_bytes=quantised_values * problem.vocabulary * problem.swept,
        gradient_bytes=gradient_values * element,
        cast_bytes=gradient_values * problem.student_dtype.itemsize if problem.student_dtype.itemsize < element else 0,
        eager_bytes=eager_buffers * problem.tokens * problem.vocabulary * element,
        forward_flops=2 * problem.tokens * forward_columns * (problem.student_dim + problem.teacher_dim),
        backward_flops=2 * problem.tokens * (kept or problem.vocabulary) * problem.student_dim * (problem.d_hidden + problem.d_weight),
        exchanged_bytes=int(exchanged_values * element),
    )
