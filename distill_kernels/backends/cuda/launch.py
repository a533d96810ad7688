"""Launches of the row kernel: its arguments from a problem, and how many blocks share a token's vocabulary."""

import functools
from typing import NamedTuple

import torch

from distill_kernels.backends.cuda import extension
from distill_kernels.call.problem import TAIL_PROBABILITY, Problem, Tensors
from distill_kernels.divergences import LOG_PROBABILITY_FLOOR
from distill_kernels.schedule import chunked

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # params.h: enum class Element
VECTOR = 4  # logits that are read together


class Limits(NamedTuple):
    """Of a device; see csrc/cuda/limits.h."""

    capability: int
    multiprocessors: int
    shared_bytes: int
    cluster: int
    threads: int


@functools.cache
def limits(index: int) -> Limits:
    return Limits(**extension.kernels.limits(index))


class RowShape(NamedTuple):
    cluster: int  # blocks to a token
    held_vectors: int  # of each model's logits that a block holds in shared memory; 0: it reads them again


def row_shape(tokens: int, vocabulary: int, models: int, limits: Limits) -> RowShape:
    """The smallest cluster whose shared memory holds a row, or one block if none does; more blocks while they find work and
    multiprocessors without any."""
    vectors = -(-vocabulary // VECTOR)
    fixed = extension.kernels.board_bytes + extension.kernels.edge_bytes
    room = max(0, limits.shared_bytes - fixed) // (4 * VECTOR * models)
    sizes = [2**i for i in range(limits.cluster.bit_length())]
    holding = [size for size in sizes if -(-vectors // size) <= room]
    cluster = holding[0] if holding else 1
    while 2 * cluster <= limits.cluster and 2 * cluster * tokens <= limits.multiprocessors and vectors >= 2 * cluster * limits.threads:
        cluster *= 2
    return RowShape(cluster, -(-vectors // cluster) if holding else 0)


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def index_of(device: torch.device) -> int:
    """Of a device that may be named without one; an emulation's is 0."""
    if device.type == "cpu":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def place(device: torch.device) -> dict:
    """Where a kernel is launched: of tensors on CPU, in an emulation."""
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    return {"device": index_of(device), "stream": stream}


class Launcher:
    """The row kernel of one call: what is the same for every chunk is prepared once."""

    def __init__(self, problem: Problem, tensors: Tensors):
        self.problem, self.device = problem, tensors.student_hidden.device
        # The kernels add biases in float32. Held here, for a launch has no more of them than addresses.
        self.biases = [None if bias is None else bias.float().contiguous() for bias in (tensors.student_bias, tensors.teacher_bias)]
        untempered = problem.cross_entropy or problem.z_loss
        options = problem.options
        scales = options.student_logit_scale, options.teacher_logit_scale
        softcaps = options.student_softcap, options.teacher_softcap
        student, teacher = (
            {"bias": address(bias), "scale": scale, "softcap": softcap or 0.0}
            for bias, scale, softcap in zip(self.biases, scales, softcaps, strict=True)
        )
        self.loss = {
            "vocabulary": problem.vocabulary,
            "student": student,
            "teacher": teacher,
            "inverse_temperature": 1.0 / problem.options.temperature,
            "label_smoothing": problem.options.label_smoothing,
            "floor": LOG_PROBABILITY_FLOOR,
            "tail_probability": TAIL_PROBABILITY,
            "has_teacher": problem.teacher_dim > 0,
            "untempered": untempered,
            "separate": untempered and problem.options.temperature != 1.0,
            "smoothing": problem.cross_entropy and problem.options.label_smoothing > 0,
        }
        divergence = problem.divergence
        self.divergence = -1 if divergence is None else extension.kernels.divergences.index(divergence.name)
        self.parameters = list(divergence.parameters) if divergence is not None else []
        self.limits = limits(index_of(self.device))

    def loss_of(self, chunk: chunked.Chunk) -> dict:
        return self.loss | {
            "tokens": len(chunk.coefficients),
            "labels": address(chunk.labels) if self.problem.cross_entropy else 0,
            "coefficients": address(chunk.coefficients),
            "terms": address(chunk.terms),
            "stats": address(chunk.stats),
        }

    def rows(self, chunk: chunked.Chunk, student_logits, teacher_logits, dz, dz_scale):
        """Terms, stats and dz (n, V) of a chunk from its logits, bare products (n, V) float32."""
        shape = row_shape(len(student_logits), self.problem.vocabulary, 2 if self.problem.teacher_dim else 1, self.limits)
        of_rows = {
            "student_logits": address(student_logits),
            "teacher_logits": address(teacher_logits),
            "dz": address(dz),
            "dz_element": ELEMENTS[torch.float32 if dz is None else dz.dtype],
            "dz_scale": address(dz_scale),
            "held_vectors": shape.held_vectors,
            "cluster": shape.cluster,
            "threads": self.limits.threads,
        }
        extension.kernels.rows(self.loss_of(chunk), of_rows, self.divergence, self.parameters, **place(self.device))
