"""A vocabulary in shards: each rank of a process group holds some rows of both heads, and all of them hold all tokens.

A rank computes what it can from its own rows. What a token's loss and gradient ask of the whole vocabulary is a few numbers, as if the
ranks were parts of one row kernel: they are gathered by all ranks, and put together by each in the order of the ranks. So every rank has
the same bits, and the same from run to run, and one exchange does for what would be a sum after a maximum. Of each token a rank says

    to every other rank   its maxima and sums of exponentials of both models, for the log-sum-exps; once those are known, its sums of
                          divergence, slopes, cross entropy and stats: `Schedule.exchanged` numbers of 4 bytes (8 in float64) in all
    in a sum of all       its share of d_hidden, D_s numbers; only where that gradient is asked for

while another chunk is worked on (`chunked`). The gradient of a rank's rows of the head is its own. Before the first chunk the ranks compare
what they were called with (`join`).

Columns of sampled gradients (`columns`) are drawn by each rank from its own, as many of them as its share of the vocabulary says. A product
over the vocabulary is the sum of the shards' products, so the estimate of the sum is as unbiased as that of each.
"""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from distill_kernels.call.options import ENGINE_NAMES
from distill_kernels.call.problem import Problem, Tensors

# By their names of torch 2.13, or those before; None in a torch that was built without them, which has no groups either.
_all_gather: Any = getattr(distributed, "all_gather_single", None) or getattr(distributed, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(distributed, "reduce_scatter_single", None) or getattr(distributed, "reduce_scatter_tensor", None)
Result = TypeVar("Result")
# Fields of a problem that are each rank's own.
_OWN = ("vocabulary", "device", "group", "shard_sizes", "options")
_PLACES = 16  # of a tensor's entries, that are compared to see whether all ranks hold the same tokens
# How far an entry may be off: ranks may have run the models each for itself, and rounded otherwise.
_TOLERANCE = 0.1
# Fields of a problem by what a caller knows them as.
_WORDS = {
    "tokens": "number of tokens",
    "compact": "labels or token_weight, or none,",
    "d_hidden": "student_hidden.requires_grad",
    "d_weight": "student_weight.requires_grad",
    "d_bias": "student_bias.requires_grad",
    "group": "process_group",
    "kd": "kd_weight",
    "z_loss": "z_loss_weight",
    "cross_entropy": "ce_weight",
    "shares_d_hidden": "sequence_parallel",
}
_HINT = (
    ". Ranks that share a vocabulary have the same tokens, or gather them, if sequence_parallel=True; a head that is sharded over "
    "data-parallel ranks is whole inside of the wrapped module's forward: call the loss there"
)


@dataclass(frozen=True)
class Shards:
    group: "distributed.ProcessGroup"
    rank: int
    ranks: int
    sizes: tuple[int, ...] = ()  # entries of each rank; () before they have told each other

    @classmethod
    def of(cls, problem: Problem) -> "Shards | None":
        """None if the vocabulary is whole."""
        return cls.in_group(problem.group, tuple(problem.shard_sizes)) if problem.group else None

    @classmethod
    def in_group(cls, name: str, sizes: tuple[int, ...] = ()) -> "Shards":
        resolve: Any = distributed.distributed_c10d._resolve_process_group
        group = resolve(name)
        return cls(group, distributed.get_rank(group), distributed.get_world_size(group), sizes)

    @property
    def begin(self) -> int:
        """The first entry of this rank's."""
        return sum(self.sizes[: self.rank])

    def gather(self, values: Tensor) -> Generator[None, None, Tensor]:
        """Returns (ranks, ...), every rank's values (...). It yields once, while they are on their way."""
        values = values.contiguous()
        everyone = values.new_empty(self.ranks, *values.shape)
        work = _all_gather(everyone.view(-1, *values.shape[1:]), values, group=self.group, async_op=True)
        yield
        work.wait()
        return everyone

    def add_up(self, values: Tensor) -> Generator[None, None, None]:
        """Puts the sum of every rank's values in their place. It yields once, while they are on their way."""
        work = distributed.all_reduce(values, group=self.group, async_op=True)
        yield
        work.wait()

    def scatter_sum(self, values: Tensor) -> Tensor:
        """Of the sum of every rank's values (ranks · n, ...), this rank's part (n, ...)."""
        own = values.new_empty(len(values) // self.ranks, *values.shape[1:])
        _reduce_scatter(own, values.contiguous(), group=self.group)
        return own


def waited_for(exchange: Generator[None, None, Result]) -> Result:
    """What an exchange returns."""
    while True:
        try:
            next(exchange)
        except StopIteration as done:
            made: Result = done.value
            return made


def join(problem: Problem, tensors: Tensors, backend: str) -> Problem:
    """The problem with the sizes of all ranks' shards; as it is where the vocabulary is whole.

    Every rank says what it was called with, in a message whose size does not depend on that, and waits for the others. Raises ValueError,
    on every rank, if one was called with other options, another backend, other shapes or other tokens: all of labels and masks is
    compared, weights and normaliser to five digits, and of hidden states some entries of tokens that count.
    """
    shards = Shards.of(problem)
    if shards is None:
        return problem
    options = {field.name: getattr(problem, field.name) for field in fields(problem) if field.name not in _OWN}
    options |= {name: getattr(problem.options, name) for name in ENGINE_NAMES}
    options |= {"backend": backend, "workspace_mib": problem.workspace_mib}
    options["divergence"] = (problem.options.divergence.name, problem.options.divergence.parameters) if problem.kd else None
    options |= {f"{name}, or none,": tensor is None for name, tensor in tensors._asdict().items()}
    exact = {"labels": _checksum(tensors.labels), "mask": _checksum((tensors.coefficients != 0).long())}
    close = {"token_weight, num_items or weight of a term": (_weighted_sums(tensors.coefficients), 1e-5)}
    close |= {name: (_sampled(tensors, name), _TOLERANCE) for name in ("student_hidden", "teacher_hidden")}
    device = problem.device
    words = torch.tensor([problem.vocabulary, *map(_digest, options.values())], dtype=torch.int64, device=device)
    parts = [words, torch.stack([*exact.values()]).to(device), *(numbers.view(torch.int64) for numbers, _ in close.values())]
    said = waited_for(shards.gather(torch.cat(parts))).cpu()
    words, sums, *numbers = said.split([len(part) for part in parts], 1)
    for i, name in enumerate(options, 1):
        _refuse(words[:, i] != words[0, i], f"called with another {_WORDS.get(name, name)} than rank 0")
    for i, name in enumerate(exact):
        _refuse(sums[:, i] != sums[0, i], f"called with another {name} than rank 0{_HINT}")
    for (name, (_, tolerance)), of_rank in zip(close.items(), numbers, strict=True):
        of_rank = of_rank.contiguous().view(torch.float64)
        other = ~torch.isclose(of_rank, of_rank[:1], rtol=tolerance, atol=0.0, equal_nan=True)
        most = 0 if tolerance < _TOLERANCE else _PLACES // 2
        _refuse(other.sum(1) > most, f"called with another {name} than rank 0{_HINT}")
    return replace(problem, shard_sizes=tuple(words[:, 0].tolist()))


def _checksum(integers: Tensor | None) -> Tensor:
    """() int64: a sum in which every place has a weight of its own, modulo 2⁶⁴."""
    if integers is None:
        return torch.zeros((), dtype=torch.int64)
    places = torch.arange(1, integers.numel() + 1, device=integers.device)
    return ((places * 0x2545F4914F6CDD1D | 1) * (integers.reshape(-1) + 1)).sum()


def _weighted_sums(coefficients: Tensor) -> Tensor:
    """(3,) float64: of each term, with weights from 1 to 2 that differ by token."""
    places = torch.arange(len(coefficients), device=coefficients.device, dtype=torch.float64)
    return ((1 + places * 0.6180339887498949 % 1)[:, None] * coefficients.double()).sum(0)


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little", signed=True)


def _sampled(tensors: Tensors, name: str) -> Tensor:
    """(_PLACES,) float64: entries of tokens that count, from all over a matrix (N, D); 0 where there are none."""
    matrix = getattr(tensors, name)
    counts = (tensors.coefficients != 0).any(-1).cumsum(0)
    nothing = tensors.coefficients.new_zeros(_PLACES, dtype=torch.float64)
    if matrix is None or not matrix.numel():
        return nothing
    places = torch.arange(_PLACES, device=matrix.device)
    # The tokens that count first, last and between: a search, for how many there are is known on the device only.
    rows = torch.searchsorted(counts, 1 + places * (counts[-1] - 1).clamp(min=0) // (_PLACES - 1)).clamp(max=len(matrix) - 1)
    return torch.where(counts[-1] > 0, matrix[rows, places * matrix.shape[1] // _PLACES].double(), nothing)


def _refuse(differ: Tensor, how: str) -> None:
    if differ.any():
        ranks = differ.nonzero().squeeze(-1).tolist()
        raise ValueError(f"process group: rank {' and '.join(map(str, ranks))} {how}")
