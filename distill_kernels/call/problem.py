"""One call, validated: what a backend and the planner need to know of it beyond its tensors, and the tensors, a row for each token.

Shapes: N tokens, V vocabulary, D_s and D_t the hidden sizes of student and teacher. `as_text` puts all of a problem that its tensors do not
say into a text, which is what torch's custom ops take, and `from_text` makes the problem again.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import operator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_kernels.call import worthwhile
from distill_kernels.call.options import DEFAULTS, ENGINE_NAMES, Options
from distill_kernels.divergences import Divergence, from_parameters

# On CPU: holds the logits of 90 tokens at V = 262,144 and of 180 at 129,280. Each pass over a head is shared by a chunk's tokens; with
# fewer, 16-bit heads wait for memory (benchmarks/results/workspace.csv).
WORKSPACE_MIB = 192
# On a GPU a chunk's d_weight is read and written once, 8·V·D_s bytes against 2·n·V·(3·D_s + D_t) flops of its products: with 3 TB/s to 700
# TFLOP/s and D_t = 2·D_s about 170/n of their time. This holds n = 800 tokens at V = 128,256.
ACCELERATOR_WORKSPACE_MIB = 1024

# Columns of a call's per-token results.
TERMS = ("divergence", "cross_entropy", "z_loss")
STATS = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement", "tail_mass")
TAIL_PROBABILITY = 1e-4  # `tail_mass` is the student's probability on entries to which the teacher gives less


class Tensors(NamedTuple):
    student_hidden: Tensor  # (N, D_s)
    student_weight: Tensor  # (V, D_s)
    student_bias: Tensor | None  # (V,)
    teacher_hidden: Tensor | None  # (N, D_t)
    teacher_weight: Tensor | None  # (V, D_t)
    teacher_bias: Tensor | None  # (V,)
    labels: Tensor | None  # (N,) int64, NO_LABEL where there is none
    coefficients: Tensor  # (N, 3) what each of TERMS is multiplied by; a row of zeros is skipped
    seed: Tensor | None = None  # () int64, of the columns that are sampled; None where none are
    # Of a quantised sweep; see `quantised.quantise` for the heads' rows and scales.
    student_quantised: Tensor | None = None  # (V, D_s padded)
    student_scales: Tensor | None = None  # (V, 3) float32
    teacher_quantised: Tensor | None = None  # (V, D_t padded)
    teacher_scales: Tensor | None = None  # (V, 3) float32


@dataclass(frozen=True)
class Problem:
    tokens: int
    vocabulary: int
    student_dim: int
    teacher_dim: int  # 0: there is no teacher
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    device: torch.device
    options: Options = DEFAULTS
    kd: bool = True  # which terms are asked for
    cross_entropy: bool = False
    z_loss: bool = False
    d_hidden: bool = True  # which gradients are
    d_weight: bool = True
    d_bias: bool = False
    deferred: bool = False  # gradients are made in backward
    keeps_dz: bool = False  # from the columns of dz that forward keeps
    stats: bool = False
    compact: bool = False  # some tokens may be masked
    listed: int = 0  # vocabulary entries that each token lists, at most: the loss is of those and of the sum of the others (`listed`)
    group: str = ""  # name of the process group whose ranks each have a shard of the vocabulary; "": it is whole
    shard_sizes: tuple[int, ...] = ()  # entries of each rank's shard, this one's `vocabulary`; () until the ranks have told each other
    shares_d_hidden: bool = False  # each rank is to get its own share of d_hidden, instead of the sum over all of them

    @classmethod
    def of(cls, tensors: Tensors, options: Options, **asked: Any) -> Problem:
        """The problem of these tensors; `asked`: all but their shapes, dtypes and device."""
        student, teacher = tensors.student_hidden, tensors.teacher_hidden
        return cls(
            tokens=student.shape[0],
            vocabulary=tensors.student_weight.shape[0],
            student_dim=student.shape[1],
            teacher_dim=0 if teacher is None else teacher.shape[1],
            student_dtype=student.dtype,
            teacher_dtype=student.dtype if teacher is None else teacher.dtype,
            device=student.device,
            options=options,
            **asked,
        )

    @property
    def divergence(self) -> Divergence | None:
        return self.options.divergence if self.kd else None

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.student_dtype, self.teacher_dtype)

    @property
    def workspace_mib(self) -> int:
        return workspace_mib(self.options, self.device)

    @property
    def gradient(self) -> bool:
        return self.d_hidden or self.d_weight or self.d_bias

    @property
    def whole_vocabulary(self) -> int:
        return sum(self.shard_sizes) if self.shard_sizes else self.vocabulary

    @property
    def largest_shard(self) -> Problem:
        """What is planned for, so that the ranks of a group go through the same chunks."""
        return replace(self, vocabulary=max(self.shard_sizes)) if self.shard_sizes else self

    @property
    def kept_columns(self) -> int:
        """Columns that a chunk's gradient products go over (at most, if chosen by the tolerance), and that correct a quantised sweep; 0:
        the exact products run."""
        pays = self.tokens >= worthwhile.LEAST_TOKENS and (self.d_hidden or self.d_weight or self.options.sweep is not None)
        return worthwhile.kept_columns(self.vocabulary, self.options.column_fraction) if pays else 0

    @property
    def swept(self) -> bool:
        """Whether logits are quantised: a sweep was asked for, and pays."""
        return self.options.sweep is not None and self.kept_columns > 0

    @property
    def can_keep_dz(self) -> bool:
        """Whether forward can keep the columns of dz that gradients made in backward go over: they take at most half of the workspace
        and leave room for the logits of 64 tokens (of the kept columns only, if a sweep is quantised), their number does not have to be
        found out, d_bias, which is of all columns, is not asked for, and the vocabulary is whole."""
        element, workspace = self.compute_dtype.itemsize, self.workspace_mib * 2**20
        kept_bytes = self.tokens * self.kept_columns * element
        logits_bytes = 64 * 2 * (self.kept_columns if self.swept else self.vocabulary) * element
        fits = 2 * kept_bytes <= workspace and kept_bytes + logits_bytes <= workspace
        gradient = self.d_hidden or self.d_weight
        excluded = self.options.gradient_tolerance or self.d_bias or self.group  # ranks of a group might not all have room
        return bool(gradient and self.kept_columns and fits and not excluded)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """dtype of logits, sums and gradient accumulators: float32, or float64 for float64 inputs."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def workspace_mib(options: Options, device: torch.device) -> int:
    """What was asked for, or the default of the device."""
    if options.workspace_mib is not None:
        return options.workspace_mib
    return WORKSPACE_MIB if device.type == "cpu" else ACCELERATOR_WORKSPACE_MIB


# A problem as a text. Its words are a dict's: options of the engine and ASKED fields, where they are not the default.
ASKED = tuple(
    field.name
    for field in dataclasses.fields(Problem)
    if field.default is not dataclasses.MISSING and field.name not in ("options", "listed", "shard_sizes")
)
_ASKED_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Problem) if field.name in ASKED}
_SHAPING = ("column_fraction", "workspace_mib")  # numbers that decide shapes: constants of a graph, which is compiled anew for another
_VARIES = "number "  # with its place among those that vary: stands for a number in the text
_SOME_NUMBERS = (-1.2345678, 0.012345678, 0.12345678, 0.56789012, 1.2345678, 5.6789012, 12.345678, 123.45678)
_STAND_IN = 0.5  # for such a number, where it is not known and decides nothing: no shape depends on one


def as_text(problem: Problem) -> tuple[str, Tensor | None]:
    """(text, numbers) from which `from_text` makes the problem again.

    numbers (k,) float64 on CPU, or None: what changes from call to call of a compiled graph, for instance a scheduled temperature. In the
    text it would be a constant of the graph. As a float argument of a custom op it would be one too: torch's compiler keeps that of
    another call in its caches (pytorch/pytorch#197889). Tensors are always those of the call.
    """
    said: list[str] = []
    numbers: list[Any] = []
    for name, default in _ASKED_DEFAULTS.items():
        value = getattr(problem, name)
        if isinstance(default, bool):
            value = True if value else False  # noqa: SIM210, a branch, which a compiler guards, where it has a symbol for bool(value)
        if value != default:
            said.append(f"{name!r}: {value!r}")
    for name in ENGINE_NAMES:
        value = getattr(problem.options, name)
        if name == "divergence":
            if problem.kd:
                parameters = "".join([f"{_stated(parameter, numbers)}, " for parameter in value.parameters])
                said.append(f"'divergence': ({value.name!r}, ({parameters}))")
        elif name in _SHAPING:
            if value is not None:
                said.append(f"{name!r}: {_literal(value)}")
        elif _varies(value) or value != getattr(DEFAULTS, name):
            said.append(f"{name!r}: {_stated(value, numbers)}")
    if not numbers:
        return ", ".join(said), None
    one = torch.ones((), dtype=torch.float64, device="cpu")  # whatever the default device
    return ", ".join(said), torch.stack([one * number for number in numbers])


def _varies(value: Any) -> bool:
    """Whether a number is not a constant of the graph that is being compiled: the compiler cannot say of all of these whether it is one of
    them. To ask is no guard. Where other guards leave a number little room it is taken for a constant, and the graph is compiled anew."""
    if not torch.compiler.is_compiling() or isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # Here, for it takes sympy with it, a third of the time that importing this package would take. A compiler has it loaded.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not all(statically_known_true(value != other) for other in _SOME_NUMBERS)


def _stated(value: Any, numbers: list[Any]) -> str:
    """As a Python literal; a number that varies is appended to `numbers`."""
    if _varies(value):
        numbers.append(value)
        return f"'{_VARIES}{len(numbers) - 1}'"
    return _literal(value)


def _literal(value: Any) -> str:
    """A compiler's symbol becomes the number that it stands for, which it guards."""
    if isinstance(value, float):
        return f"{float(value)!r}"
    return f"{operator.index(value)!r}" if isinstance(value, int) else f"{value!r}"


def from_text(text: str, numbers: Tensor | None, tensors: Tensors, listed: int = 0) -> Problem:
    """The problem that was stated, of these tensors. While a graph is traced the values of `numbers` are not known, and stood in for."""
    asked, options = _parsed(text)
    if numbers is None:
        body = from_parameters(*options["divergence"]).body if "divergence" in options else None
        return Problem.of(tensors, _constant_options(text, body), listed=listed, **asked)
    values = numbers.tolist() if type(numbers) is Tensor else [_STAND_IN] * len(numbers)
    return Problem.of(tensors, _options(options, values), listed=listed, **asked)


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(asked, options), as they are said."""
    said = ast.literal_eval(f"{{{text}}}")
    asked = {name: said.pop(name) for name in ASKED if name in said}
    return asked, said


@functools.lru_cache(maxsize=256)
def _constant_options(text: str, body: Any) -> Options:
    """body: of the divergence that has the name in the text now, for a user may register another under it."""
    return _options(_parsed(text)[1], [])


def _options(said: dict[str, Any], numbers: list[float]) -> Options:
    options = {name: _filled(value, numbers) for name, value in said.items() if name != "divergence"}
    if "divergence" in said:
        name, parameters = said["divergence"]
        options["divergence"] = from_parameters(name, [_filled(parameter, numbers) for parameter in parameters])
    return Options(**options)


def _filled(value: Any, numbers: list[float]) -> Any:
    return numbers[int(value.removeprefix(_VARIES))] if isinstance(value, str) and value.startswith(_VARIES) else value


@functools.lru_cache(maxsize=256)
def text_with(text: str, **changed: Any) -> str:
    """The text of the same problem but for some options or ASKED fields; its numbers stay the same."""
    said = ast.literal_eval(f"{{{text}}}") | changed
    return ", ".join(f"{name!r}: {value!r}" for name, value in said.items())
