"""The backend contract, and the choice among backends.

A backend is a module of this package with the functions of `Backend`. Adding one: write the module, and put its name in ORDER where
`auto` should consider it.

It imports `call`, `estimators` and `schedule`.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast

from torch import Tensor  # not torch itself, whose name here is a backend's

from distill_kernels.call.problem import Problem, Tensors
from distill_kernels.estimators import quantised
from distill_kernels.schedule.chunked import Chunk, Outputs, Saved
from distill_kernels.schedule.plan import Plan, Schedule, make_plan

# (chunk, listed, others), as `listed` defines them: writes the terms, returns (d_listed, d_others), or None where no gradient is asked for.
Loss = Callable[[Chunk, Tensor, Tensor], tuple[Tensor, Tensor] | None]


class Backend(Protocol):
    """What a module of this package has. `run_listed` may be missing: then the backend has no losses of listed entries."""

    __name__: str

    def describe(self) -> str:
        """What it is on this machine, for `doctor`."""

    def why_not(self, problem: Problem) -> str | None:
        """None if it can run the problem, else the reason in words."""

    def schedule(self, problem: Problem) -> Schedule:
        """What the planner must know of it."""

    def run(self, problem: Problem, tensors: Tensors) -> Outputs:
        """The terms of the loss, and the gradients of Σ coefficients · terms."""

    def multiply_kept(self, problem: Problem, saved: Saved) -> Outputs:
        """Those gradients alone, from what a run with problem.keeps_dz has kept."""

    def run_listed(self, problem: Problem, tensors: Tensors, ids: Tensor, loss: Loss) -> Outputs:
        """What `run` is, of entries that tokens list, ids (N, K): `loss` is called for each chunk."""


# Fastest first; but `cuda`, which has not been measured on any device, after what runs everywhere: `auto` never takes it.
ORDER = ("native", "triton", "torch", "cuda")


def load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"distill_kernels.backends.{name}"))  # a module has types of its own


def choose(problem: Problem) -> Backend:
    """The backend module that runs `problem`: the one that its options name, or with "auto" the first of ORDER that can.

    Raises ValueError for an unknown name, NotImplementedError with every backend's reason where none (or not the one named) can run.
    """
    name = problem.options.backend
    if name != "auto" and name not in ORDER:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, ORDER))}, got {name!r}")
    reasons = {}
    for candidate in ORDER if name == "auto" else (name,):
        if name == "auto" and candidate == "triton" and problem.device.type == "cpu":
            continue  # its interpreter is for tests, which name it
        backend = load(candidate)
        reasons[candidate] = backend.why_not(problem)
        if problem.listed and not hasattr(backend, "run_listed"):
            reasons[candidate] = "it has no kernels for entries that tokens list"
        if reasons[candidate] is None:
            return backend
    raise NotImplementedError("; ".join(f"backend {candidate!r} cannot run this: {reason}" for candidate, reason in reasons.items()))


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`quantised.quantise`, by the compiled kernel where there is one for it."""
    native: Any = load("native")
    if kind == "int8" and weight.device.type == "cpu" and native.instruction_sets():
        rows, scales = native.quantise(weight)
        return rows, scales
    return quantised.quantise(weight, kind)


def name_of(backend: Backend) -> str:
    return backend.__name__.rpartition(".")[2]


def plan(problem: Problem) -> Plan:
    """The plan of the backend that would run. A backward that keeps nothing repeats the forward products."""
    backend = choose(problem)
    problem = replace(problem, keeps_dz=problem.keeps_dz or (problem.deferred and problem.can_keep_dz))
    made = make_plan(problem, backend.schedule(problem))
    again = problem.deferred and not problem.keeps_dz
    return replace(made, backward_flops=made.forward_flops + made.backward_flops) if again else made
