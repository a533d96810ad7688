"""The Triton kernels compiled ahead of time, for GPUs that need not be there, and what can be read off the machine code.

`launches` makes the backend's own launcher say what it would launch, on tensors without storage, and compiles exactly that: the same
specialisations and options. It needs a process without TRITON_INTERPRET, and one process for each target, because Triton keeps what it
compiled by device.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from distill_kernels.backends.triton import launch, quantised_sweep, sweep
from distill_kernels.call.options import DENSE_NAMES, Options
from distill_kernels.call.problem import STATS, TERMS, Problem, Tensors
from distill_kernels.divergences import Divergence
from distill_kernels.estimators.correction import Model
from distill_kernels.estimators.quantised import KINDS, PILOT_FRACTION, padded_dim
from distill_kernels.schedule import chunked

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CONFIGURED_AS = {"sm_89": "sm_80"}  # the backend's configurations of other names
SAID: dict[str, str] = {}  # by the assembler, which is not asked again about what has been compiled
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor or compute unit: technical specifications in the CUDA C++ Programming Guide, and in AMD's CDNA 3 ISA."""

    multiprocessors: int
    registers: int  # of 32 bits, vector registers on AMD
    unit: int  # of registers that a warp is given
    partitions: int
    warps: int
    programs: int
    shared: int  # bytes
    shared_program: int  # most for one
    reserved: int  # of shared memory, for each program


LIMITS = {
    "sm_80": Limits(108, 65536, 256, 4, 64, 32, 164 * 1024, 99 * 1024, 1024),  # 163 KiB a program; 8.6, 8.9 and 12.x have 99
    "sm_89": Limits(128, 65536, 256, 4, 48, 24, 100 * 1024, 99 * 1024, 1024),
    "sm_90": Limits(132, 65536, 256, 4, 64, 32, 228 * 1024, 227 * 1024, 1024),
    "sm_100": Limits(148, 65536, 256, 4, 64, 32, 228 * 1024, 227 * 1024, 1024),
    "gfx942": Limits(304, 131072, 512, 4, 32, 32, 64 * 1024, 64 * 1024, 0),
}


class _NoDriver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    kernel: object
    grid: tuple
    values: dict
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def compile(self):
        """(what Triton compiled, what the assembler said)."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            made = self.kernel.warmup(**self.values, grid=self.grid, **self.options)
        return made, SAID.setdefault(made.hash, said.getvalue())


def select(target: str):
    """From here on this process compiles for `target`."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: there is nothing to compile")
    triton.knobs.nvidia.dump_ptxas_log = True
    driver.set_active(_NoDriver(TARGETS[target]))


def rows_of(module: str, *arguments: str) -> list[dict]:
    """What `python -m module arguments` prints, a JSON object a line, in a process that compiles and keeps nothing of it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        ran = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment | {"TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    if ran.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}: {ran.stderr[-3000:]}")
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def problem(tokens, vocabulary, student_dim, teacher_dim, dtype, divergence: Divergence | None, **asked) -> Problem:
    """Of no divergence where there is None, and of no gradients but those asked for. asked: options of the loss, or fields of Problem."""
    options = {name: asked.pop(name) for name in DENSE_NAMES if name in asked}
    options |= {} if divergence is None else {"divergence": divergence}
    asked = {"d_hidden": False, "d_weight": False, "kd": divergence is not None} | asked
    return Problem(tokens, vocabulary, student_dim, teacher_dim, dtype, dtype, torch.device("meta"), Options.of(**options), **asked)


@contextlib.contextmanager
def standing_for(target: str):
    """Whatever the launcher and the planner ask of a device is answered for `target`."""
    with (
        mock.patch.object(launch, "architecture", lambda device: CONFIGURED_AS.get(target, target)),
        mock.patch.object(launch, "multiprocessors", lambda device: LIMITS[target].multiprocessors),
    ):
        yield


def launches(
    target: str, problem: Problem, *, fused=False, tile: sweep.Configuration | quantised_sweep.Configuration | None = None, bias=False
) -> list[Launch]:
    """What the backend would launch for a chunk of all tokens: the row kernels, or `fused` the sweep, or if it is swept the quantised one
    and what corrects it; the sweeps with `tile` if it is given."""
    made = []
    tensors, chunk = _chunk(problem, bias)

    def record(kernel, grid, values, **options):
        made.append(Launch(kernel, grid, {name: values[name] for name in kernel.arg_names}, options))

    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.object(launch, "_launch", record))
        patched.enter_context(standing_for(target))
        if tile is not None:
            patched.enter_context(mock.patch.object(quantised_sweep if problem.swept else sweep, "configuration", lambda *asked: tile))
        launcher = launch.Launcher(problem, tensors)
        if problem.swept:
            _launch_swept(launcher, problem, tensors, chunk)
        elif fused:
            list(launcher.sweep(chunk))  # generators, which yield for other ranks
        elif problem.listed:
            _launch_listed(launcher, problem)
        else:
            logits = [_new(problem.tokens, problem.vocabulary) if dim else None for dim in (problem.student_dim, problem.teacher_dim)]
            list(launcher.rows(chunk, *logits, *_dz(problem, logits[0])))
    return made


def _dz(problem, logits):
    """dz and its scale, or None each."""
    if not problem.gradient:
        return None, None
    narrow = problem.student_dtype.itemsize == 2
    dz = _new(problem.tokens, problem.vocabulary, dtype=problem.student_dtype) if narrow else logits
    return dz, _new(1) if problem.student_dtype is torch.float16 else None


def _new(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def _chunk(problem, bias) -> tuple[Tensors, chunked.Chunk]:
    """Without storage."""

    def head(dim, dtype):
        if dim == 0:
            return None, None, None
        weight = _new(problem.vocabulary, dim, dtype=dtype)
        return _new(problem.tokens, dim, dtype=dtype), weight, _new(problem.vocabulary, dtype=dtype) if bias else None

    student_hidden, student_weight, student_bias = head(problem.student_dim, problem.student_dtype)
    teacher_hidden, teacher_weight, teacher_bias = head(problem.teacher_dim, problem.teacher_dtype)
    labels = _new(problem.tokens, dtype=torch.int64) if problem.cross_entropy else None
    coefficients = _new(problem.tokens, len(TERMS))
    tensors = Tensors(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, labels, coefficients)
    stats = _new(problem.tokens, len(STATS)) if problem.stats else None
    read = {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden, "labels": labels, "coefficients": coefficients}
    chunk = chunked.Chunk(**dict.fromkeys(chunked.Chunk._fields) | read | {"terms": _new(problem.tokens, len(TERMS)), "stats": stats})
    return tensors, chunk


def _launch_swept(launcher, problem, tensors, chunk):
    """As backends.triton.swept does."""
    tokens, kept = problem.tokens, problem.kept_columns

    def model(prefix):
        dim = padded_dim(getattr(problem, f"{prefix}_dim"))
        rows, head = (_new(count, dim, dtype=KINDS[problem.options.sweep][0]) for count in (tokens, problem.vocabulary))
        bias = getattr(tensors, f"{prefix}_bias")
        parts = getattr(problem.options, f"{prefix}_logit_scale"), getattr(problem.options, f"{prefix}_softcap")
        return Model(None, None, None if bias is None else bias.float(), rows, _new(tokens, 3), head, _new(problem.vocabulary, 3), *parts)

    student, teacher = model("student"), model("teacher") if problem.teacher_dim else None

    def both(columns):
        return [None if one is None else launcher.swept_logits(one, columns) for one in (student, teacher)]

    references = launcher.references(*both(_new(-(-problem.vocabulary // PILOT_FRACTION), dtype=torch.int64)))
    launcher.quantised_sweep(chunk, student, teacher, references)
    columns, weights = _new(kept, dtype=torch.int64), _new(kept)
    x, y = _new(tokens, kept), None if teacher is None else _new(tokens, kept)
    launcher.differences(x, y, *both(columns), weights, references)
    launcher.kept_gradient(chunk, x, y, columns, weights, _new(7, tokens), _new(tokens, kept))


def _launch_listed(launcher, problem):
    """As backends.triton.run_listed does."""
    logits, ids = _new(problem.tokens, problem.vocabulary), _new(problem.tokens, problem.listed, dtype=torch.int64)
    listed, others = launcher.listed(logits, ids)
    launcher.listed_gradient(logits, ids, listed, others, torch.empty_like(listed), _new(problem.tokens, 2), *_dz(problem, logits))


def occupancy(target: str, registers: int, shared: int, warps: int) -> tuple[float, str]:
    """(share of the warps that a multiprocessor can hold, what limits it)."""
    limits = LIMITS[target]
    threads = TARGETS[target].warp_size
    a_warp = -(-max(1, registers) * threads // limits.unit) * limits.unit
    by = {
        "registers": limits.registers // limits.partitions // a_warp * limits.partitions // warps,
        "warps": limits.warps // warps,
        "programs": limits.programs,
        "shared memory": limits.shared // max(1, -(-(shared + limits.reserved) // 128) * 128),
    }
    limiter = min(by, key=by.get)
    return by[limiter] * warps / limits.warps, limiter


def measure(target: str, launch: Launch) -> dict:
    """What the machine code says of a launch."""
    made, said = launch.compile()
    shared, warps = made.metadata.shared, made.metadata.num_warps
    found = (_measure_amd if TARGETS[target].backend == "hip" else _measure_nvidia)(made, said)
    share, limiter = occupancy(target, found["registers"], shared, warps)
    return found | {"shared": shared, "warps": warps, "occupancy": share, "limiter": limiter}


def _measure_nvidia(made, said):
    ptx = made.asm["ptx"]

    def number(pattern):
        matches = re.findall(pattern, said)
        return int(matches[-1]) if matches else 0

    kinds = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma.sync": r"\bmma\.sync", "fma": r"\bfma\."}
    loads = re.findall(r"\bld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[a-z](\d+)", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x[0-9a-f]+|\d+)", ptx)
    widths = Counter(int(count or 1) * int(bits) // 8 for count, bits in loads) + Counter(int(width, 0) for width in copies)
    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "matrix": next((kind for kind, pattern in kinds.items() if re.search(pattern, ptx)), "none"),
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\S*\.global", ptx)),
        "load_bytes": max(widths, default=0),
    }


def _measure_amd(made, _said):
    code = made.asm["amdgcn"]

    def number(name):
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    words = {"": 4, "x2": 8, "x3": 12, "x4": 16}
    widths = [words[count] for count in re.findall(r"(?:global|buffer)_load_dword(x\d)?\b", code)]
    return {
        "registers": number("vgpr_count"),
        "spill_stores": 4 * number("vgpr_spill_count"),
        "spill_loads": number("private_segment_fixed_size"),
        "matrix": "mfma" if "v_mfma" in code else "fma" if re.search(r"v_(pk_)?fma", code) else "none",
        "tma_loads": 0,
        "load_bytes": max(widths, default=0),
    }
