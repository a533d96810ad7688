"""Right or not, before anything is timed: one way through the kernels in each process, against the float64 reference.

The problem is larger than any buffer that a kernel goes round in: three chunks and more, and a last one that is not full.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import distill_kernels
from benchmarks.gpu_suite.journal import emit
from benchmarks.gpu_suite.stages import CHUNKS
from benchmarks.gpu_suite.work.machine import device, has_gpu
from benchmarks.gpu_suite.work.verdicts import OURS, Bounds, verdict
from distill_kernels import reference
from distill_kernels.call import worthwhile

STEEPNESS = 3.0  # standard deviation of the logits: what matters most of a softmax is a few entries
UPSTREAM = 1.7
FRACTION = 0.25  # of the columns, where they are sampled
Sizes = tuple[int, int, int, int]  # tokens, vocabulary, student_dim, teacher_dim
MODELS = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")


def right(name: str, sizes: Sizes, least_chunks: int) -> None:
    """name: "BACKEND chunked" or "BACKEND columns" (loss, both gradients) or "BACKEND sweep" (value alone); after commas, what is special.
    """
    way, *special = name.split(", ")
    backend, kind = way.split(" ")
    dtype = torch.float32 if "float32" in special or not multiplies_16_bits() else torch.bfloat16
    tensors = problem_of(sizes, dtype)
    options = everything(sizes) if "everything" in special else {}
    cluster = next((int(word.split(" ")[1]) for word in special if word.startswith("cluster")), None)
    found: dict[str, Any] = {"case": name, "sizes": sizes, "dtype": str(dtype)}
    if (why := why_not(backend)) is not None:
        emit(kind="verdict", **found, verdict="NOT HERE", why=why)
        return
    with mock.patch.multiple(worthwhile, LEAST_TOKENS=1, LEAST_VOCABULARY=1):
        if kind == "sweep":
            found |= value_alone(tensors, options, backend, cluster)
        else:
            sampled = {"column_fraction": FRACTION, "seed": 0} if kind == "columns" else {}
            found |= with_gradients(sizes, tensors, options | sampled, backend, cluster)
            if found["chunks"] < least_chunks:
                found |= {"verdict": "FAIL", "why": f"it goes through in {found['chunks']} chunks, {least_chunks} are wanted"}
    emit(**found)


def why_not(backend: str) -> str | None:
    """Why a backend cannot run here, in words; Triton's runs on CPU tensors, too, in the interpreter of a dry run."""
    return distill_kernels.doctor()[backend] if has_gpu() or backend == "cuda" else None


def multiplies_16_bits() -> bool:
    """Triton's interpreter multiplies bfloat16 tiles as if their bits were integers, so a dry run has float32 ones."""
    return has_gpu()


def problem_of(sizes: Sizes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tokens, vocabulary, student_dim, teacher_dim = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made = {"student_hidden": normal(tokens, student_dim), "student_weight": normal(vocabulary, student_dim) * STEEPNESS / student_dim**0.5}
    made |= {
        "teacher_hidden": normal(tokens, teacher_dim),
        "teacher_weight": normal(vocabulary, teacher_dim) * STEEPNESS / teacher_dim**0.5,
    }
    return {key: value.to(device(), dtype) for key, value in made.items()}


def everything(sizes: Sizes) -> dict[str, Any]:
    tokens, vocabulary, _, _ = sizes
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[1::5] = -100
    biases = torch.randn(2, vocabulary, generator=generator).to(device())
    return {
        "divergence": "reverse_kl", "labels": labels.to(device()), "temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.4,
        "z_loss_weight": 0.01, "label_smoothing": 0.1, "student_logit_scale": 0.8, "teacher_logit_scale": 1.3, "student_softcap": 15.0,
        "teacher_softcap": 20.0, "token_weight": torch.rand(tokens, generator=generator).to(device()) + 0.5,
        "student_bias": biases[0], "teacher_bias": biases[1],
    }  # fmt: skip


def truth_of(tensors: dict[str, torch.Tensor], options: dict[str, Any], gradient: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    wide = {key: value.double() for key, value in tensors.items()}
    leaves = [wide[key].requires_grad_(gradient) for key in MODELS[:2]]
    value = reference.distillation_loss(**wide, **options)
    return value.detach(), list(torch.autograd.grad(value * UPSTREAM, leaves)) if gradient else []


def with_gradients(sizes: Sizes, tensors: dict, options: dict, backend: str, cluster: int | None) -> dict:
    dtype, estimated = tensors["student_hidden"].dtype, "column_fraction" in options
    own = {key: options[key] for key in ("column_fraction", "seed") if key in options}
    true_value, truths = truth_of(tensors, {key: value for key, value in options.items() if key not in own}, gradient=True)
    made = {key: value.clone().requires_grad_(key in MODELS[:2]) for key, value in tensors.items()}
    workspace, chunks = in_chunks(sizes, dtype, backend, own.get("column_fraction"))
    with forced(row_cluster=cluster):
        asked = options | {"backend": backend, "workspace_mib": workspace}
        value, stats = distill_kernels.distillation_loss_and_stats(**made, **asked) if estimated else (None, None)
        value = distill_kernels.distillation_loss(**made, **asked) if value is None else value
        gradients = torch.autograd.grad(value * UPSTREAM, [made[key] for key in MODELS[:2]])
    bounds = estimate(OURS[dtype], stats.gradient_error.max().item()) if estimated else OURS[dtype]
    return verdict(value.detach(), gradients, true_value, truths, bounds).record() | {"chunks": chunks, "workspace_mib": workspace}


# An estimate errs as it predicts, to this factor: by no more, and by no less, as it would without its weights.
OF_PREDICTED = 1.5
ESTIMATED_VALUE = 1e-2  # a quantised sweep estimates the value, too


def estimate(bounds: Bounds, predicted: float) -> Bounds:
    return Bounds(ESTIMATED_VALUE, predicted * OF_PREDICTED, float("inf"), predicted / OF_PREDICTED)


def value_alone(tensors: dict, options: dict, backend: str, cluster: int | None) -> dict:
    true_value, _ = truth_of(tensors, options, gradient=False)
    with torch.no_grad(), forced(sweep_cluster=cluster):
        value = distill_kernels.distillation_loss(**tensors, **options, backend=backend)
    return verdict(value, [], true_value, [], OURS[tensors["student_hidden"].dtype]).record()


def in_chunks(sizes: Sizes, dtype: torch.dtype, backend: str, fraction: float | None) -> tuple[int, int]:
    """(workspace_mib, chunks): the largest workspace with more than CHUNKS of them, for tokens that are masked make them fewer."""
    asked = {"dtype": dtype, "device": device(), "backend": backend, "column_fraction": fraction}
    workspace = distill_kernels.plan(*sizes, **asked, workspace_mib=2**20).workspace_bytes // 2**20
    while workspace > 1:
        workspace = max(1, workspace * 9 // 10)
        chunks = distill_kernels.plan(*sizes, **asked, workspace_mib=workspace).chunks
        if chunks > CHUNKS:
            return workspace, chunks
    return 1, distill_kernels.plan(*sizes, **asked, workspace_mib=1).chunks


@contextlib.contextmanager
def forced(row_cluster: int | None = None, sweep_cluster: int | None = None) -> Iterator[None]:
    """While it lasts the cuda backend divides its work among clusters of so many blocks, whatever it would choose."""
    from distill_kernels.backends.cuda import launch, sweep

    with contextlib.ExitStack() as patched:
        if row_cluster is not None:
            patched.enter_context(mock.patch.object(launch, "row_shape", _row_shape(row_cluster, launch.row_shape)))
        if sweep_cluster is not None:
            patched.enter_context(mock.patch.object(sweep, "sweep_shape", _sweep_shape(sweep_cluster, sweep.sweep_shape)))
        yield


def _row_shape(cluster: int, chosen: Callable) -> Callable:
    def row_shape(tokens: int, vocabulary: int, models: int, limits: Any) -> Any:
        from distill_kernels.backends.cuda.launch import VECTOR

        vectors = -(-vocabulary // VECTOR)
        alone = chosen(1, vocabulary, models, limits._replace(cluster=1, shared_bytes=0))  # one block, nothing held
        most = chosen(10**9, vocabulary, models, limits)  # the smallest cluster that holds the row
        held = -(-vectors // cluster) if most.held_vectors and cluster >= most.cluster else 0
        return alone._replace(cluster=cluster, held_vectors=held)

    return row_shape


def _sweep_shape(cluster: int, chosen: Callable) -> Callable:
    def sweep_shape(tokens: int, vocabulary: int, limits: Any) -> Any:
        from distill_kernels.backends.cuda import extension

        blocks = -(-tokens // extension.kernels.sweep_rows)
        return chosen(tokens, vocabulary, limits)._replace(cluster=cluster, blocks=-(-blocks // cluster) * cluster)

    return sweep_shape
