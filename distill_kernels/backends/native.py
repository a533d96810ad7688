"""The native backend: a chunk's products and everything between them on CPU, compiled from csrc/cpu.

The kernels multiply straight from the heads as they lie in memory, float32 or 16-bit, and accumulate in float32; csrc/cpu/chunk.inc
says how. Where no gradient is asked for they keep no logits. They run on the widest instruction set of the processor at hand, and on
torch's threads.
"""

import math

import torch

from distill_kernels import memory
from distill_kernels.call.problem import TAIL_PROBABILITY, Problem, Tensors
from distill_kernels.divergences import BUILT_IN, LOG_PROBABILITY_FLOOR
from distill_kernels.estimators import quantised
from distill_kernels.estimators.sampling import Sampler, sampled_bytes
from distill_kernels.listed import listed_bytes
from distill_kernels.schedule import chunked
from distill_kernels.schedule.plan import Schedule, keeps_logits, make_plan

try:
    from distill_kernels import _native
except ImportError as error:
    _native, MISSING = None, str(error)

# "" lets the extension choose; a name of instruction_sets() forces that one, for tests and benchmarks.
INSTRUCTION_SET = ""
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # params.h: enum class Element
NO_MATRIX = (0, 0, 0)
CHUNK_TOKENS = 192  # of the chunked schedule: then products no longer wait for memory, and more would be fresh pages to clear
# Of the tile-fused schedule on up to eight threads: a thousand tokens and more share each pass over the heads.
SWEEP_BYTES = 32 * 2**20
MOST_VOCABULARY = 2**31 - 1  # vocabulary entries are 32-bit in vector registers


def instruction_sets() -> list[str]:
    """Those that the build and this processor both have, widest first."""
    return [] if _native is None else _native.instruction_sets()


def describe() -> str:
    chosen, *others = instruction_sets() or ["nothing"]
    return f"compiled kernels for {chosen}" + (f", also {' and '.join(others)}" if others else "")


def why_not(problem: Problem) -> str | None:
    if _native is None:
        return f"the compiled extension is missing ({MISSING}); install a C++17 compiler and install distill_kernels again"
    if problem.device.type != "cpu":
        return f"it runs on CPU tensors, these are on {problem.device}"
    if problem.compute_dtype is not torch.float32:
        return "it computes in float32, and float64 inputs want float64"
    if problem.vocabulary > MOST_VOCABULARY:
        return f"its vocabularies have at most {MOST_VOCABULARY} entries"
    if problem.divergence is not None and problem.divergence.name not in _native.divergences:
        return f"it has the built-in divergences compiled in ({', '.join(BUILT_IN)}), and {problem.divergence.name} is not one of them"
    if problem.group:
        return "its kernels go over whole vocabularies; those of the triton and torch backends over shards, too"
    if problem.options.sweep == "fp8":
        return "it sweeps in int8, which CPUs multiply; there is no float8 arithmetic in them"
    return None


def schedule(problem: Problem) -> Schedule:
    """Its scratch, and the chunk's gathered rows. Above eight threads it grows with their number."""
    # Linear in the tokens, but for hidden states that are padded to whole panels: the least chunk's padding bounds every other's.
    least, panel, threads = _native.token_alignment, _native.panel, torch.get_num_threads()
    keeps, reason = keeps_logits(problem)
    share = (_scratch_bytes(problem, 2 * panel, threads, keeps) - _scratch_bytes(problem, panel, threads, keeps)) // panel
    fixed, fixed_of_few = (_scratch_bytes(problem, least, count, keeps) - least * share for count in (threads, 1))
    gathered = problem.student_dim * (problem.student_dtype.itemsize + 4) + problem.teacher_dim * problem.teacher_dtype.itemsize
    sampled_token_bytes, sampled_fixed_bytes = sampled_bytes(problem, library=False)
    if problem.swept:
        sampled_token_bytes += 4 * problem.kept_columns * (problem.teacher_dim > 0)  # its logits; the student's become dz
        sampled_fixed_bytes += 8 * problem.vocabulary // quantised.PILOT_FRACTION
    limited = keeps or problem.swept
    return Schedule(
        name="swept" if problem.swept else "chunked" if keeps else "tile-fused",
        reason=reason,
        keeps_logits=keeps,
        most_tokens=CHUNK_TOKENS if limited else None,
        most_bytes=None if limited else SWEEP_BYTES - fixed_of_few,  # so that chunks are the same on any number of threads
        token_alignment=_native.token_alignment,
        token_bytes=share + gathered + sampled_token_bytes + listed_bytes(problem),
        fixed_bytes=fixed + sampled_fixed_bytes,
    )


def _scratch_bytes(problem: Problem, tokens: int, threads: int, keeps_logits: bool) -> int:
    """The kernel's own count of its scratch for a chunk of `tokens`, a multiple of the alignment."""
    sizes = {"tokens": tokens, "stride": tokens, **_nothing(problem, keeps_logits)}
    return 4 * _native.chunk_scratch_floats(sizes, threads, INSTRUCTION_SET)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantised.quantise` to int8, in one pass over the rows."""
    weight = _by_rows(weight)
    rows, dim = weight.shape
    out = memory.empty(rows, quantised.padded_dim(dim), like=weight, dtype=torch.int8)
    scales = torch.empty(rows, 3, dtype=torch.float32)
    _native.quantise_rows(*_matrix(weight), rows, dim, out.data_ptr(), scales.data_ptr(), torch.get_num_threads(), INSTRUCTION_SET)
    return out, scales


def run(problem: Problem, tensors: Tensors) -> chunked.Outputs:
    plan = make_plan(problem, schedule(problem))
    if problem.swept:
        return _run_swept(problem, tensors, plan)
    keeps = plan.schedule == "chunked"
    call = Call(problem, plan.chunk_tokens, keeps)
    logits = [
        memory.empty(problem.vocabulary, plan.chunk_tokens, like=call.scratch, dtype=torch.float32) if wanted else None
        for wanted in (keeps, keeps and problem.teacher_dim)
    ]
    heads = _heads(tensors)
    sampler = Sampler(problem, tensors, plan)
    scores = torch.empty(problem.vocabulary, dtype=torch.float32) if sampler.kept else None

    def kernel(chunk: chunked.Chunk):
        kernels = call.of(chunk, *_models(chunk, heads, logits), scores)
        if sampler.kept:
            kernels.run(_native.Stage.scores)
            sampler.gradients(chunk, scores, kernels)
        else:
            kernels.run(_native.Stage.whole)

    return chunked.run(problem, tensors, plan, kernel)


def _run_swept(problem, tensors, plan):
    # Before there is anything else: the pilot makes logits of one token on its way.
    pilot, trust = quantised.pilot(problem, tensors), quantised.Trust(problem, tensors)
    call = Call(problem, plan.chunk_tokens, keeps_logits=False)
    shape = problem.kept_columns * (problem.teacher_dim > 0), plan.chunk_tokens
    logits = None, memory.empty(*shape, like=call.scratch, dtype=torch.float32)
    copies = (tensors.student_quantised, tensors.student_scales), (tensors.teacher_quantised, tensors.teacher_scales)
    heads = _heads(tensors)
    sampler = Sampler(problem, tensors, plan)
    scores = torch.empty(problem.vocabulary, dtype=torch.float32)

    def kernel(chunk: chunked.Chunk):
        kernels = SweptKernels(call, *call.arguments(chunk, *_models(chunk, heads, logits), scores), chunk, trust)
        kernels.sweep(copies, pilot)
        sampler.gradients(chunk, scores, kernels)

    return chunked.run(problem, tensors, plan, kernel)


def run_listed(problem: Problem, tensors: Tensors, ids: torch.Tensor, loss) -> chunked.Outputs:
    plan = make_plan(problem, schedule(problem))
    keeps = plan.schedule == "chunked"
    call = Call(problem, plan.chunk_tokens, keeps)
    logits = memory.empty(problem.vocabulary, plan.chunk_tokens, like=call.scratch, dtype=torch.float32) if keeps else None
    head, _ = _heads(tensors)

    def kernel(chunk: chunked.Chunk):
        kernels = call.of(chunk, (_by_rows(chunk.student_hidden), *head, logits), None, None)
        own = ids[chunk.tokens]
        entries, places = own.reshape(-1).sort(stable=True)  # negative ones, which are none, before all that a block looks for
        made, others = own.new_empty(own.shape, dtype=torch.float32), own.new_empty(len(own), 3, dtype=torch.float32)
        lists = len(entries), entries.data_ptr(), places.data_ptr(), own.shape[1], made.data_ptr(), others.data_ptr()
        kernels.run(_native.Stage.listed, listed=(*lists, 0, 0))
        gradients = loss(chunk, made, others)
        if problem.gradient:
            gradients = [gradient.contiguous() for gradient in gradients]
            kernels.run(_native.Stage.listed_gradients, listed=(*lists, *map(_address, gradients)))

    return chunked.run(problem, tensors, plan, kernel)


def _heads(tensors):
    """(weight, bias) of student and teacher as the kernels read them, or None."""
    pairs = (tensors.student_weight, tensors.student_bias), (tensors.teacher_weight, tensors.teacher_bias)
    return [None if weight is None else (_by_rows(weight), None if bias is None else bias.float().contiguous()) for weight, bias in pairs]


def _models(chunk, heads, logits):
    hidden = chunk.student_hidden, chunk.teacher_hidden
    return [None if rows is None else (_by_rows(rows), *head, space) for rows, head, space in zip(hidden, heads, logits, strict=True)]


def multiply_kept(problem: Problem, saved: chunked.Saved) -> chunked.Outputs:
    alignment = schedule(problem).token_alignment
    call = Call(problem, saved.chunk_tokens(alignment), keeps_logits=False)
    weight = _by_rows(saved.student_weight)

    def kernel(chunk: chunked.Chunk, upstream: torch.Tensor):
        kernels = call.of(chunk, (_by_rows(chunk.student_hidden), weight, None, None), None, None)
        padded = upstream.new_zeros(kernels.stride)
        padded[: len(upstream)] = upstream
        kept = chunk.kept_dz[: len(chunk.kept_columns) * kernels.stride].view(-1, kernels.stride)
        kernels.multiply(chunk, kept * padded, chunk.kept_columns, None)

    return chunked.multiply_kept(problem, saved, alignment, kernel)


class Call:
    """What the chunks of a call share: arguments, scratch, and the number of threads, read once, for the scratch is sized by it."""

    def __init__(self, problem: Problem, chunk_tokens: int, keeps_logits: bool):
        self.problem, self.common, self.threads = problem, _nothing(problem, keeps_logits), torch.get_num_threads()
        floats = _scratch_bytes(problem, chunk_tokens, self.threads, keeps_logits) // 4
        self.scratch = memory.empty(floats, like=torch.empty(0), dtype=torch.float32)

    def of(self, chunk: chunked.Chunk, student, teacher, scores) -> "Kernels":
        """student, teacher: (hidden, weight, bias, space for logits) or None."""
        return Kernels(self, *self.arguments(chunk, student, teacher, scores))

    def arguments(self, chunk, student, teacher, scores):
        """What the extension is called with, and the tensors whose addresses that has."""
        tokens = len(chunk.student_hidden)

        def model(name, tensors):
            hidden, weight, bias, logits = tensors
            addresses = {"hidden": _matrix(hidden), "weight": _matrix(weight), "bias": _address(bias), "logits": _address(logits)}
            return self.common[name] | addresses

        arguments = self.common | {
            "tokens": tokens,
            "stride": -(-tokens // _native.token_alignment) * _native.token_alignment,  # what is beyond the tokens is computed, and costs
            "student": model("student", student),
            "labels": _address(chunk.labels) if self.problem.cross_entropy else 0,
            "coefficients": _address(chunk.coefficients),
            "terms": _address(chunk.terms),
            "stats": _address(chunk.stats),
            "d_hidden": _address(chunk.d_hidden),
            "d_weight": _address(chunk.d_weight),
            "d_bias": _address(chunk.d_bias),
            "scores": _address(scores),
            "first": chunk.first,
        }
        if teacher is not None:
            arguments["teacher"] = model("teacher", teacher)
        return arguments, (chunk, student, teacher, scores)


class Kernels:
    """A chunk's kernels; those that `sampling` asks for, too."""

    def __init__(self, call: Call, arguments: dict, tensors):
        self.call, self.arguments, self.stride = call, arguments, arguments["stride"]
        self.tensors = tensors  # whose addresses the arguments have: some are copies that nobody else holds

    def run(self, stage, **changed):
        _native.run_chunk(self.arguments | changed, self.call.scratch.data_ptr(), self.call.threads, INSTRUCTION_SET, stage)

    @staticmethod
    def draw(scores, kept, uniform):
        units, columns = torch.empty(len(scores), dtype=torch.int64), torch.empty(kept, dtype=torch.int64)
        weights = torch.empty(kept, dtype=torch.float32)
        addresses = (tensor.data_ptr() for tensor in (units, columns, weights))
        _native.draw_columns(scores.data_ptr(), len(scores), kept, int(uniform), *addresses)
        return columns, weights

    def gather(self, columns, weights, out):
        self.run(_native.Stage.gather, kept=(len(columns), columns.data_ptr(), weights.data_ptr(), out.data_ptr(), 0))

    def multiply(self, chunk, dz, columns, squares):
        self.run(_native.Stage.multiply, kept=(len(columns), columns.data_ptr(), 0, dz.data_ptr(), _address(squares)))

    def exact(self, chunk):
        self.run(_native.Stage.gradients, d_bias=0)  # that came with the scores


class SweptKernels(Kernels):
    """Those of a chunk whose logits are quantised: `gather` first corrects the sums by the exact logits of the columns."""

    def __init__(self, call: Call, arguments: dict, tensors, chunk, trust: quantised.Trust):
        super().__init__(call, arguments, tensors)
        self.chunk, self.trust = chunk, trust

    def sweep(self, copies, pilot):
        for name, (rows, scales) in zip(("student", "teacher"), copies, strict=True):
            if rows is not None:
                self.arguments[name] |= {"quantised": (rows.data_ptr(), rows.shape[1], scales.data_ptr())}
        self.arguments |= {"errors": _address(self.chunk.errors)}
        self.run(_native.Stage.sweep, pilot=(len(pilot), pilot.data_ptr()))

    def gather(self, columns, weights, out):
        chunk, problem = self.chunk, self.call.problem
        self.arguments |= {"student": self.arguments["student"] | {"logits": out.data_ptr()}}  # which become dz where they are
        self.run(_native.Stage.correct, kept=(len(columns), columns.data_ptr(), weights.data_ptr(), 0, 0))
        hidden = chunk.student_hidden, chunk.teacher_hidden
        if self.trust.exceeds(chunk, *(None if rows is None else quantise(rows)[1] for rows in hidden)):
            self.run(_native.Stage.exact)
            chunk.errors.zero_()
            chunk.recomputed.add_(1)
        if not problem.gradient:
            return
        super().gather(columns, weights, out)
        if chunk.d_bias is not None:
            dz = out[: len(columns) * self.stride].view(len(columns), -1)
            chunk.d_bias.index_add_(0, columns, dz[:, : len(chunk.terms)].sum(1))


def _nothing(problem: Problem, keeps_logits: bool) -> dict:
    """A chunk's arguments without tensors: an address of 1 stands for one that is there, and will be. What is there decides how the
    kernels lay out their scratch, so it has to be the same when they run."""
    divergence = problem.divergence

    def model(dim, dtype, scale, softcap):
        matrix = (1, ELEMENTS[dtype], dim) if dim else NO_MATRIX
        logits, swept = int(keeps_logits and dim > 0), int(problem.swept and dim > 0)
        fixed = {"bias": 0, "dim": dim, "scale": scale, "softcap": softcap or 0.0}
        return {"hidden": matrix, "weight": matrix, "logits": logits, "quantised": (swept, quantised.padded_dim(dim), swept)} | fixed

    return {
        "vocabulary": problem.vocabulary,
        "student": model(problem.student_dim, problem.student_dtype, problem.options.student_logit_scale, problem.options.student_softcap),
        "teacher": model(problem.teacher_dim, problem.teacher_dtype, problem.options.teacher_logit_scale, problem.options.teacher_softcap),
        "labels": 0,
        "coefficients": 0,
        "terms": 0,
        "stats": 0,
        "d_hidden": int(problem.d_hidden and not problem.keeps_dz),
        "d_weight": int(problem.d_weight and not problem.keeps_dz),
        "scores": 0,
        "kept": (problem.kept_columns, 0, 0, 0, 0),
        "pilot": (0, 0),
        "errors": 0,
        "d_bias": int(problem.d_bias),
        "first": True,
        "divergence": -1 if divergence is None else _native.divergences.index(divergence.name),
        "parameters": () if divergence is None else divergence.parameters,
        "temperature": problem.options.temperature,
        "label_smoothing": problem.options.label_smoothing,
        "log_probability_floor": LOG_PROBABILITY_FLOOR,
        "tail_log_probability": math.log(TAIL_PROBABILITY),
        "untempered": problem.cross_entropy or problem.z_loss,
    }


def _by_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with the elements of a row side by side; a copy only if they are not."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _matrix(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), ELEMENTS[tensor.dtype], tensor.stride(0)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
