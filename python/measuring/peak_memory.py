"""Peak memory of a step, measured in a process of its own, where nothing else has been allocated or cached."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")


def above(step: Callable[[], object], device: torch.device) -> int | None:
    """Bytes from what is in use before the step to the peak during it; None where the system does not tell.

    To be called in a process of its own, once inputs exist and a small step has paid for thread pools and code.
    """
    if device.type != "cpu":
        memory = torch.get_device_module(device)
        memory.synchronize(device)
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
        step()
        memory.synchronize(device)
        return int(memory.max_memory_allocated(device)) - int(before)
    if not STATUS.exists():
        return None
    # What imports and the warm-up needed at their peak is forgotten, where the kernel allows it.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmHWM"), _memory("VmRSS")
    step()
    peak = _memory("VmHWM")
    # A peak that did not rise may be one from before the step. The kernel counts pages in batches, so tiny steps may seem to free some.
    return None if peak == before[0] > before[1] else max(0, peak - before[1])


def in_own_process(module: str, *arguments: str) -> Any:
    """What `python -m module THREADS arguments...` prints, which is JSON; as many threads as here."""
    command = [sys.executable, "-m", module, str(torch.get_num_threads()), *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _memory(field: str) -> int:
    """Bytes. getrusage's ru_maxrss would not do: a child process starts from its parent's."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field)) * 1024
