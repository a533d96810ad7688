"""Heads whose rows are divided over the ranks of a process group: which group that is, and this rank's rows."""

import torch.distributed as distributed
from torch import Tensor


def group_name(process_group) -> str:
    """"" for None. Raises TypeError or ValueError unless it is a process group, or a device mesh of one dimension, of this rank's."""
    if process_group is None:
        return ""
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError("process_group was passed, but torch.distributed is not initialised; call init_process_group first")
    if isinstance(process_group, distributed.DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group is a device mesh of {process_group.ndim} dimensions, wanted the one that the vocabulary is divided over, "
                'for instance mesh["vocabulary"]'
            )
        process_group = process_group.get_group()
    if not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or a device mesh, got {type(process_group).__name__}")
    return process_group.group_name
