"""Calls whose heads are divided over the ranks of a process group by rows: which group that is, this rank's rows, and all ranks' tokens."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor

from distill_kernels.api.losses.inputs import Inputs
from distill_kernels.call.options import Options, is_mesh
from distill_kernels.call.shards import Shards, waited_for

HEADS = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
HIDDEN = ("student_hidden", "teacher_hidden")
OF_TOKENS = (*HIDDEN, "labels", "token_weight")


class Spread(NamedTuple):
    group: str  # its name; "": the vocabulary is whole
    tokens: bool  # whether those are divided over the ranks as well


def localised(inputs: Inputs, options: Options) -> tuple[Inputs, Spread]:
    """The inputs with this rank's part of every DTensor, and how the call is spread over ranks.

    Raises ValueError, in words, for DTensors that are not laid out as the loss wants them.
    """
    group = options.process_group.get_group() if is_mesh(options.process_group) else options.process_group
    local: dict[str, Tensor] = {}
    for name in HEADS:
        tensor = getattr(inputs, name)
        if _is_dtensor(tensor):
            local[name], of_head = _rows(name, tensor)
            if of_head is not None and group not in (None, of_head):
                raise ValueError(f"{name} is a DTensor whose rows are divided over another group than the other heads, or process_group")
            group = of_head or group
    of_tokens = {name: tensor for name in OF_TOKENS if _is_dtensor(tensor := getattr(inputs, name))}
    tokens_divided = {name: _tokens_divided(name, tensor, group) for name, tensor in of_tokens.items()}
    if any(tokens_divided.values()) and not all(tokens_divided.values()):
        divided, whole = (", ".join(name for name, value in tokens_divided.items() if value is wanted) for wanted in (True, False))
        raise ValueError(f"the tokens of {divided} are divided over ranks and those of {whole} are not; wanted all alike")
    local |= {name: tensor.to_local() for name, tensor in of_tokens.items()}
    sequence_parallel = options.sequence_parallel or any(tokens_divided.values())
    if sequence_parallel and group is None:
        raise ValueError(
            "the tokens are divided over ranks but the heads are not: that is data parallelism, where each rank calls the loss with its "
            "own tokens and, for num_items, the number of tokens that all ranks learn from, divided by the number of ranks if gradients "
            "are averaged over them"
        )
    return replace(inputs, **local) if local else inputs, Spread("" if group is None else group.group_name, sequence_parallel)


def _is_dtensor(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or type(tensor) is Tensor or not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _rows(name: str, tensor: Any) -> "tuple[Tensor, distributed.ProcessGroup | None]":
    """This rank's rows of a head or bias, and the group that they are divided over; None if every rank has all."""
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(sharded) > 1 or any(not tensor.placements[dim].is_shard(0) for dim in sharded):
        raise ValueError(
            f"{name} is a DTensor with placements {tensor.placements}, wanted Shard(0), rows of the vocabulary, in one dimension of the "
            "mesh and Replicate() in all others"
        )
    _refuse_replicated_gradient(name, tensor, sharded)
    return tensor.to_local(), tensor.device_mesh.get_group(sharded[0]) if sharded else None


def _tokens_divided(name: str, tensor: Any, group: Any) -> bool:
    """Whether over the ranks that share the vocabulary; over others each has its own, as in data parallelism."""
    last = tensor.dim() - 1 if name in HIDDEN else tensor.dim()
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if any(not any(tensor.placements[dim].is_shard(of) for of in range(last)) for dim in sharded):
        raise ValueError(f"{name} is a DTensor with placements {tensor.placements}, wanted Replicate(), or Shard of its tokens")
    shared = [dim for dim in range(tensor.device_mesh.ndim) if group is not None and tensor.device_mesh.get_group(dim) == group]
    _refuse_replicated_gradient(name, tensor, [*sharded, *shared])
    return any(dim in shared for dim in sharded) or (bool(sharded) and group is None)


def _refuse_replicated_gradient(name: str, tensor: Any, divided: list[int]) -> None:
    """A gradient would say that it is alike on ranks where each has that of its own tokens."""
    alike = [dim for dim in range(tensor.device_mesh.ndim) if dim not in divided and tensor.device_mesh.size(dim) > 1]
    if alike and tensor.requires_grad and tensor.device_mesh.ndim > 1:
        raise ValueError(
            f"{name} is a DTensor that is replicated over dimension {alike[0]} of its mesh, whose ranks each make a gradient of their own: "
            "pass its local tensor and a process_group, and average gradients over the other dimension, or call the loss in a module "
            "that fully_shard wraps over it"
        )


def all_tokens(inputs: Inputs, group: str) -> Inputs:
    """The inputs with the tokens of all ranks, one row for each, those of the first rank first.

    The gradient of gathered hidden states is scattered while it is added up over ranks. Raises ValueError, on every rank, unless all ranks
    have as many tokens.
    """
    shards = Shards.in_group(group)
    given: dict[str, Tensor | None] = {name: getattr(inputs, name) for name in OF_TOKENS}
    sizes = [-1 if tensor is None else tensor.numel() * tensor.element_size() for tensor in given.values()]
    said = torch.tensor([inputs.tokens.numel(), *sizes], device=inputs.student_hidden.device)
    counts, *of_ranks = waited_for(shards.gather(said)).T.tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"the ranks of the process group have {counts} tokens; wanted as many on each")
    for name, sizes in zip(OF_TOKENS, of_ranks, strict=True):
        if len(set(sizes)) > 1:
            ranks = [rank for rank, size in enumerate(sizes) if size != sizes[0]]
            raise ValueError(f"process group: rank {' and '.join(map(str, ranks))} called with another {name}, or none, than rank 0")
    gathered = {}
    for name, tensor in given.items():
        if tensor is not None:
            by_token = tensor.reshape(-1, tensor.shape[-1]) if name in HIDDEN else tensor.reshape(-1)
            gathered[name] = _Gathered.apply(by_token, shards)
    return replace(inputs, **gathered)


def own_tokens(values: Tensor, shape: torch.Size, group: str) -> Tensor:
    """This rank's part (...) of what was made for all tokens (N,)."""
    own: Tensor = _Own.apply(values, Shards.in_group(group))
    return own.view(shape)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return waited_for(shards.gather(values)).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shards.scatter_sum(gradient), None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return values.chunk(shards.ranks)[shards.rank].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return waited_for(ctx.shards.gather(gradient)).flatten(0, 1), None
