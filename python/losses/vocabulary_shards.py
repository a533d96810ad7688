"""Calls whose heads are divided over the ranks of a process group by rows: which group that is, this rank's rows, and all ranks' tokens."""

from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor

from distill_kernels.call.shards import Shards, waited_for

HEADS = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
HIDDEN = ("student_hidden", "teacher_hidden")
OF_TOKENS = (*HIDDEN, "labels", "token_weight")


class Spread(NamedTuple):
    group: str  # its name; "": the vocabulary is whole
    tokens: bool  # whether those are divided over the ranks as well


def localised(arguments: dict[str, Any], process_group, sequence_parallel: bool) -> tuple[dict[str, Any], Spread]:
    """The call's arguments with this rank's part of every DTensor, and how the call is spread over ranks.

    Raises TypeError or ValueError, in words, for what is no group, and for DTensors that are not laid out as the loss wants them.
    """
    check(process_group, sequence_parallel)
    group = process_group.get_group() if _is_mesh(process_group) else process_group
    local = dict(arguments)
    for name in HEADS:
        if _is_dtensor(local.get(name)):
            local[name], of_head = _rows(name, local[name])
            if of_head is not None and group not in (None, of_head):
                raise ValueError(f"{name} is a DTensor whose rows are divided over another group than the other heads, or process_group")
            group = of_head or group
    tokens_divided = {name: _tokens_divided(name, local[name], group) for name in OF_TOKENS if _is_dtensor(local.get(name))}
    if any(tokens_divided.values()) and not all(tokens_divided.values()):
        divided, whole = (", ".join(name for name, value in tokens_divided.items() if value is wanted) for wanted in (True, False))
        raise ValueError(f"the tokens of {divided} are divided over ranks and those of {whole} are not; wanted all alike")
    for name in tokens_divided:
        local[name] = local[name].to_local()
    sequence_parallel = sequence_parallel or any(tokens_divided.values())
    if sequence_parallel and group is None:
        raise ValueError(
            "the tokens are divided over ranks but the heads are not: that is data parallelism, where each rank calls the loss with its "
            "own tokens and, for num_items, the number of tokens that all ranks learn from, divided by the number of ranks if gradients "
            "are averaged over them"
        )
    return local, Spread("" if group is None else group.group_name, sequence_parallel)


def check(process_group, sequence_parallel):
    """Raises TypeError or ValueError unless they are a process group, a device mesh of one dimension or None, and a bool."""
    if not isinstance(sequence_parallel, bool):
        raise TypeError(f"sequence_parallel must be True or False, got {sequence_parallel!r}")
    if _is_mesh(process_group) and process_group.ndim != 1:
        raise ValueError(
            f"process_group is a device mesh of {process_group.ndim} dimensions, wanted the one that the vocabulary is divided over, for "
            'instance mesh["vocabulary"]'
        )
    is_group = distributed.is_available() and isinstance(process_group, distributed.ProcessGroup)
    if process_group is not None and not _is_mesh(process_group) and not is_group:
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or a device mesh, or None, got {type(process_group).__name__}"
        )


def _is_mesh(process_group) -> bool:
    return distributed.is_available() and isinstance(process_group, distributed.DeviceMesh)


def _is_dtensor(tensor) -> bool:
    if not isinstance(tensor, Tensor) or type(tensor) is Tensor or not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _rows(name: str, tensor) -> "tuple[Tensor, distributed.ProcessGroup | None]":
    """This rank's rows of a head or bias, and the group that they are divided over; None if every rank has all."""
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(sharded) > 1 or any(not tensor.placements[dim].is_shard(0) for dim in sharded):
        raise ValueError(
            f"{name} is a DTensor with placements {tensor.placements}, wanted Shard(0), rows of the vocabulary, in one dimension of the "
            "mesh and Replicate() in all others"
        )
    _refuse_replicated_gradient(name, tensor, sharded)
    return tensor.to_local(), tensor.device_mesh.get_group(sharded[0]) if sharded else None


def _tokens_divided(name: str, tensor, group) -> bool:
    """Whether over the ranks that share the vocabulary; over others each has its own, as in data parallelism."""
    last = tensor.dim() - 1 if name in HIDDEN else tensor.dim()
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if any(not any(tensor.placements[dim].is_shard(of) for of in range(last)) for dim in sharded):
        raise ValueError(f"{name} is a DTensor with placements {tensor.placements}, wanted Replicate(), or Shard of its tokens")
    shared = [dim for dim in range(tensor.device_mesh.ndim) if group is not None and tensor.device_mesh.get_group(dim) == group]
    _refuse_replicated_gradient(name, tensor, [*sharded, *shared])
    return any(dim in shared for dim in sharded) or (bool(sharded) and group is None)


def _refuse_replicated_gradient(name: str, tensor, divided):
    """A gradient would say that it is alike on ranks where each has that of its own tokens."""
    alike = [dim for dim in range(tensor.device_mesh.ndim) if dim not in divided and tensor.device_mesh.size(dim) > 1]
    if alike and tensor.requires_grad and tensor.device_mesh.ndim > 1:
        raise ValueError(
            f"{name} is a DTensor that is replicated over dimension {alike[0]} of its mesh, whose ranks each make a gradient of their own: "
            "pass its local tensor and a process_group, and average gradients over the other dimension, or call the loss in a module "
            "that fully_shard wraps over it"
        )


def all_tokens(arguments: dict[str, Any], group: str) -> dict[str, Any]:
    """The call's arguments with the tokens of all ranks, one row for each, those of the first rank first.

    The gradient of gathered hidden states is scattered while it is added up over ranks. Raises ValueError, on every rank, unless all ranks
    have as many tokens.
    """
    shards = Shards.in_group(group)
    hidden = arguments["student_hidden"]
    given = [-1 if arguments.get(name) is None else arguments[name].numel() * arguments[name].element_size() for name in OF_TOKENS]
    said = waited_for(shards.gather(torch.tensor([hidden.shape[:-1].numel(), *given], device=hidden.device))).T.tolist()
    if len(set(said[0])) > 1:
        raise ValueError(f"the ranks of the process group have {said[0]} tokens; wanted as many on each")
    for name, sizes in zip(OF_TOKENS, said[1:], strict=True):
        if len(set(sizes)) > 1:
            ranks = [rank for rank, size in enumerate(sizes) if size != sizes[0]]
            raise ValueError(f"process group: rank {' and '.join(map(str, ranks))} called with another {name}, or none, than rank 0")
    gathered = dict(arguments)
    for name in OF_TOKENS:
        tensor = arguments.get(name)
        if tensor is not None:
            by_token = tensor.reshape(-1, tensor.shape[-1]) if name in HIDDEN else tensor.reshape(-1)
            gathered[name] = _Gathered.apply(by_token, shards)
    return gathered


def own_tokens(values: Tensor, shape: torch.Size, group: str) -> Tensor:
    """This rank's part (...) of what was made for all tokens (N,)."""
    return _Own.apply(values, Shards.in_group(group)).view(shape)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, shards):
        ctx.shards = shards
        return waited_for(shards.gather(values)).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.shards.scatter_sum(gradient), None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, shards):
        ctx.shards = shards
        return values.chunk(shards.ranks)[shards.rank].clone()

    @staticmethod
    def backward(ctx, gradient):
        return waited_for(ctx.shards.gather(gradient)).flatten(0, 1), None
