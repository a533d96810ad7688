"""What machine this is, and what its card says of itself beside every timing."""

import importlib.metadata
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable

import torch

import distill_kernels
from benchmarks import record
from benchmarks.gpu_suite import bundle
from benchmarks.gpu_suite.journal import emit
from distill_kernels.backends.cuda import extension

PEERS = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy"}  # what is imported, what is installed


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if has_gpu() else "cpu")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def card() -> dict:
    """Clock (MHz), temperature (degrees Celsius) and power (W) at this moment; nothing where they cannot be read."""
    if not has_gpu():
        return {}
    try:
        return {"sm_mhz": torch.cuda.clock_rate(), "celsius": torch.cuda.temperature(), "watts": torch.cuda.power_draw() / 1e3}
    except Exception as error:  # noqa: BLE001  (whatever the library of the driver raises: a timing is worth having without it)
        return {"card": f"{type(error).__name__}: {error}"[:100]}


def machine() -> None:
    """One record: versions, the card, whether the compiled extension is there, the peers; `why_not` is why nothing can be measured."""
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__, "cpu": record.processor()}
    found |= {"gpu": None, "extension": extension.MISSING or "loaded", "bundle": bundle.describe()}
    if has_gpu():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": properties.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
        }
        if extension.kernels is not None:
            found["limits"] = extension.kernels.limits(0)
    for module, distribution in PEERS.items():
        here = importlib.util.find_spec(module) is not None
        found[distribution] = _version(distribution) if here else "not installed"
    found["doctor"] = {name: reason or "ready" for name, reason in distill_kernels.doctor().items()}
    emit(kind="machine", **found, **card())


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def seconds(step: Callable) -> float:
    """Of one call: between two events on a GPU's stream."""
    if not has_gpu():
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


LEAST_ROUNDS, MOST_ROUNDS = 3, 30


def in_turns(
    steps: dict[str, Callable],
    budget: float,
    each: Callable[[dict[str, list[float]]], None] = lambda samples: None,
    most: int = MOST_ROUNDS,
) -> dict[str, list[float]]:
    """Seconds of every step, each in its turn, for `budget` seconds but LEAST_ROUNDS at least. `each` gets them after the first round, the
    third and the last, so that a stage which is cut off has said something."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for done in range(1, most + 1):
        for name, step in steps.items():
            samples[name].append(seconds(step))
        last = done == most or (done >= LEAST_ROUNDS and time.perf_counter() - begin >= budget)
        if last or done in (1, LEAST_ROUNDS):
            each(samples)
        if last:
            break
    return samples


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return low, middle, high
