"""One call, validated: shapes, dtypes, devices and options, checked before any work and refused in words.

`Problem` is what a backend and the planner need to know of a call beyond its tensors; `Tensors` are the tensors, flattened to one
row for each token. Shapes: N tokens, V vocabulary, D_s and D_t the hidden sizes of student and teacher.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from distill_kernels.call import worthwhile
from distill_kernels.divergences import Divergence

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
SWEEPS = (None, "int8", "fp8")
# On CPU: holds the logits of 90 tokens at V = 262,144 and of 180 at 129,280. Each pass over a head is shared by a chunk's tokens; with
# fewer, 16-bit heads wait for memory (benchmarks/results/workspace.csv).
WORKSPACE_MIB = 192
# On a GPU a chunk's d_weight is read and written once, 8·V·D_s bytes against 2·n·V·(3·D_s + D_t) flops of its products: with 3 TB/s to 700
# TFLOP/s and D_t = 2·D_s about 170/n of their time. This holds n = 800 tokens at V = 128,256.
ACCELERATOR_WORKSPACE_MIB = 1024
VOCAB_MISMATCH = ("error", "truncate")

# Columns of a call's per-token results.
TERMS = ("divergence", "cross_entropy", "z_loss")
STATS = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement", "tail_mass")
TAIL_PROBABILITY = 1e-4  # `tail_mass` is the student's probability on entries to which the teacher gives less


class Tensors(NamedTuple):
    student_hidden: torch.Tensor  # (N, D_s)
    student_weight: torch.Tensor  # (V, D_s)
    student_bias: torch.Tensor | None  # (V,)
    teacher_hidden: torch.Tensor | None  # (N, D_t)
    teacher_weight: torch.Tensor | None  # (V, D_t)
    teacher_bias: torch.Tensor | None  # (V,)
    labels: torch.Tensor | None  # (N,) int64, NO_LABEL where there is none
    coefficients: torch.Tensor  # (N, 3) what each of TERMS is multiplied by; a row of zeros is skipped
    seed: torch.Tensor | None = None  # () int64, of the columns that are sampled; None where none are
    # Of a quantised sweep; see `quantised.quantise` for the heads' rows and scales.
    student_quantised: torch.Tensor | None = None  # (V, D_s padded)
    student_scales: torch.Tensor | None = None  # (V, 3) float32
    teacher_quantised: torch.Tensor | None = None  # (V, D_t padded)
    teacher_scales: torch.Tensor | None = None  # (V, 3) float32


@dataclass(frozen=True)
class Problem:
    tokens: int
    vocabulary: int
    student_dim: int
    teacher_dim: int  # 0: there is no teacher
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    device: torch.device
    divergence: Divergence | None  # None: no such term
    cross_entropy: bool
    z_loss: bool
    temperature: float = 1.0
    label_smoothing: float = 0.0
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    d_hidden: bool = True  # which gradients are asked for
    d_weight: bool = True
    d_bias: bool = False
    column_fraction: float = 0.0  # of the vocabulary that gradient products go over, at most; 0: all of it
    gradient_tolerance: float = 0.0  # relative error that the fraction is chosen by; 0: it is the fraction
    sweep: str = ""  # "int8" or "fp8": logits are quantised, and sums over them corrected by the columns kept; "": they are exact
    sweep_tolerance: float = math.inf  # standard error in nats, root mean square over a chunk, above which it is computed exactly
    keeps_dz: bool = False  # sampled gradients are made in backward, from the columns of dz that forward keeps
    listed: int = 0  # vocabulary entries that each token lists, at most: the loss is of those and of the sum of the others (`listed`)
    stats: bool = False
    compact: bool = False  # some tokens may be masked
    group: str = ""  # name of the process group whose ranks each have a shard of the vocabulary; "": it is whole
    shard_sizes: tuple[int, ...] = ()  # entries of each rank's shard, this one's `vocabulary`; () until the ranks have told each other
    shares_d_hidden: bool = False  # each rank is to get its own share of d_hidden, instead of the sum over all of them
    workspace_mib: int = WORKSPACE_MIB

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.student_dtype, self.teacher_dtype)

    @property
    def gradient(self) -> bool:
        return self.d_hidden or self.d_weight or self.d_bias

    @property
    def whole_vocabulary(self) -> int:
        return sum(self.shard_sizes) if self.shard_sizes else self.vocabulary

    @property
    def largest_shard(self) -> "Problem":
        """What is planned for, so that the ranks of a group go through the same chunks."""
        return replace(self, vocabulary=max(self.shard_sizes)) if self.shard_sizes else self

    @property
    def kept_columns(self) -> int:
        """Columns that a chunk's gradient products go over (at most, if chosen by the tolerance), and that correct a quantised sweep; 0:
        the exact products run."""
        pays = self.tokens >= worthwhile.LEAST_TOKENS and (self.d_hidden or self.d_weight or self.sweep != "")
        return worthwhile.kept_columns(self.vocabulary, self.column_fraction) if pays else 0

    @property
    def swept(self) -> bool:
        """Whether logits are quantised: a sweep was asked for, and pays."""
        return self.sweep != "" and self.kept_columns > 0

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
        excluded = self.gradient_tolerance or self.d_bias or self.group  # ranks of a group might not all have room
        return bool(gradient and self.kept_columns and fits and not excluded)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """dtype of logits, sums and gradient accumulators: float32, or float64 for float64 inputs."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def workspace(workspace_mib: int | None, device: torch.device) -> int:
    """What was asked for, or the default of the device. Raises TypeError or ValueError unless it is None or a positive int."""
    if workspace_mib is None:
        return WORKSPACE_MIB if device.type == "cpu" else ACCELERATOR_WORKSPACE_MIB
    integer("workspace_mib", workspace_mib, least=1)
    return workspace_mib


def finite_number(name, value, *, above=None, least=None, most=None, optional=False):
    """Raises TypeError or ValueError unless `value` is a finite Python number within the bounds (or None where `optional`)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number{' or None' if optional else ''}, got {type(value).__name__}")
    wanted = " and".join(
        f" {word} {bound:g}" for word, bound in (("above", above), ("at least", least), ("at most", most)) if bound is not None
    )
    inside = (above is None or value > above) and (least is None or value >= least) and (most is None or value <= most)
    if not -math.inf < value < math.inf or not inside:  # by comparison, which a compiler can trace
        raise ValueError(f"{name} must be a finite number{wanted}, got {value!r}")
    if value != 0 and not 1e-18 <= abs(value) <= 1e18:  # so that its square is a normal float32
        raise ValueError(f"{name} must be 0 or of a magnitude between 1e-18 and 1e18, got {value!r}")


def integer(name, value, *, least=None):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def backend_name(value):
    if not isinstance(value, str):
        raise TypeError(f"backend must be a name, got {type(value).__name__}")


def one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_sweep(sweep, column_fraction):
    one_of("sweep", sweep, SWEEPS)
    if sweep is not None and (column_fraction is None or column_fraction == "auto"):
        raise ValueError(
            f"sweep={sweep!r} is corrected by the columns that are computed exactly: pass column_fraction=0.08 or another number, "
            f"got {column_fraction!r}"
        )


def check_options(
    *, temperature, kd_weight, ce_weight, z_loss_weight, label_smoothing, student_logit_scale, teacher_logit_scale, student_softcap,
    teacher_softcap, reduction, vocab_mismatch, column_fraction, gradient_tolerance, seed, sweep, sweep_tolerance, workspace_mib,
    ignore_index,
):  # fmt: skip
    """Raises for an option that is not of the contract, and NotImplementedError for one that is but cannot be served yet."""
    finite_number("temperature", temperature, above=0)
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight), ("z_loss_weight", z_loss_weight)):
        finite_number(name, value, least=0)
    if kd_weight == ce_weight == z_loss_weight == 0:
        raise ValueError("kd_weight, ce_weight and z_loss_weight are all 0: there is nothing to compute")
    finite_number("label_smoothing", label_smoothing, least=0, most=1)
    for name, value in (("student_logit_scale", student_logit_scale), ("teacher_logit_scale", teacher_logit_scale)):
        finite_number(name, value)
    for name, value in (("student_softcap", student_softcap), ("teacher_softcap", teacher_softcap)):
        finite_number(name, value, above=0, optional=True)
    one_of("reduction", reduction, REDUCTIONS)
    one_of("vocab_mismatch", vocab_mismatch, VOCAB_MISMATCH)
    integer("ignore_index", ignore_index)
    if workspace_mib is not None:
        integer("workspace_mib", workspace_mib, least=1)
    if seed is not None:
        integer("seed", seed, least=0)
        if seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {seed}")
    if column_fraction == "auto":
        finite_number("gradient_tolerance", gradient_tolerance, above=0)
    elif gradient_tolerance is not None:
        raise ValueError(f'gradient_tolerance is for column_fraction="auto", but column_fraction is {column_fraction!r}')
    elif column_fraction is not None:
        finite_number("column_fraction", column_fraction, above=0, most=1)
    finite_number("sweep_tolerance", sweep_tolerance, above=0, optional=True)
    check_sweep(sweep, column_fraction)

def check_sharded(column_fraction, sweep, vocab_mismatch):
    """Raises NotImplementedError for options that need the whole vocabulary on one rank."""
    if column_fraction == "auto":
        raise NotImplementedError('column_fraction="auto" is not available for a vocabulary in shards; pass a number')
    if sweep is not None:
        raise NotImplementedError("a quantised sweep is not available for a vocabulary in shards; pass sweep=None")
    if vocab_mismatch != "error":
        raise NotImplementedError('vocab_mismatch="truncate" is not available for a vocabulary in shards; truncate the heads before')


def check_matrix(name, tensor, dim=None):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if (dim is None and tensor.dim() < 1) or (dim is not None and tensor.dim() != dim):
        raise ValueError(
            f"{name} must have {'at least 1 dimension' if dim is None else f'{dim} dimensions'}, got shape {tuple(tensor.shape)}"
        )


def autocast_dtype(tensor):
    """The dtype in which a linear layer would take this tensor here."""
    device = tensor.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and tensor.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if casts else tensor.dtype


def check_head(prefix, hidden, weight, bias):
    """Hidden states, head and bias of one model fit together. `prefix` of their names: "student_", "teacher_" or none."""
    check_matrix(f"{prefix}hidden", hidden)
    if hasattr(weight, "ds_shape") and weight.shape != weight.ds_shape:
        raise ValueError(
            f"{prefix}weight is a parameter of shape {tuple(weight.ds_shape)} of which DeepSpeed's ZeRO-3 has left {tuple(weight.shape)} "
            "here; call the loss, and its backward, under deepspeed.zero.GatheredParameters, or inside of the engine's forward"
        )
    check_matrix(f"{prefix}weight", weight, 2)
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden has {hidden.shape[-1]} features (shape {tuple(hidden.shape)}) but {prefix}weight has "
            f"{weight.shape[1]} columns (shape {tuple(weight.shape)}); wanted hidden (..., D) and weight (V, D)"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{prefix}weight is empty: shape {tuple(weight.shape)} (a sharded head has to be gathered first)")
    if autocast_dtype(hidden) != autocast_dtype(weight):
        raise TypeError(
            f"{prefix}hidden is {hidden.dtype} but {prefix}weight is {weight.dtype}; cast one, or call under torch.autocast, "
            "which casts both (float64 excepted)"
        )
    if bias is not None:
        check_matrix(f"{prefix}bias", bias, 1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{prefix}bias has {bias.shape[0]} entries but {prefix}weight has {weight.shape[0]} rows")


def check_tokens(name, tensor, shape, dtypes, wanted):
    """A tensor with one entry for each token."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have one entry for each token, shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_devices(tensors: dict):
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError("all tensors must be on one device, got " + ", ".join(f"{name} on {device}" for name, device in devices.items()))


def check_teacher(tensors: dict):
    """The teacher is a constant here; a gradient that silently stayed zero would be worse than an error."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, but the teacher gets no gradient here: run the teacher under torch.no_grad() and call "
                f"teacher.requires_grad_(False), or pass {name}.detach()"
            )


def shared_vocabulary(student_weight, teacher_weight, vocab_mismatch):
    """Rows of the heads that both have, or ValueError if they differ and were not said to be cut."""
    rows = student_weight.shape[0], teacher_weight.shape[0]
    if rows[0] != rows[1] and vocab_mismatch == "error":
        raise ValueError(
            f"student_weight has {rows[0]} rows but teacher_weight has {rows[1]}; if the first {min(rows)} entries mean the same tokens, "
            'pass vocab_mismatch="truncate" to compare those, renormalised'
        )
    return min(rows)


NO_LABEL = torch.iinfo(torch.int64).min  # stands for ignore_index below the public API, where no label can be mistaken for it


def check_labels(name, labels, vocabulary):
    """Labels (N,) index the vocabulary or are NO_LABEL. It reads them, which elsewhere than on CPU would wait for the device."""
    if labels is None or labels.device.type != "cpu":
        return
    wrong = labels[((labels < 0) & (labels != NO_LABEL)) | (labels >= vocabulary)]
    if wrong.numel():
        raise ValueError(f"{name} must be at least 0 and below the vocabulary size {vocabulary}, or ignore_index, got {int(wrong[0])}")
