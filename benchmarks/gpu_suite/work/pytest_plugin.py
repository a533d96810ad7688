"""Says what becomes of each test the moment it is known, keeps this process's share of them, and ends a process that a GPU was lost to."""

import faulthandler
import json
import os
from collections import Counter

import pytest

from benchmarks.gpu_suite.journal import emit

ASKED = json.loads(os.environ["GPU_SUITE_TESTS"])
STDERR = os.fdopen(os.dup(2), "w")  # before pytest captures it: where a test hangs is to be seen
LOST = 86  # exit code of a process that can no longer use the GPU


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test function once before any a second time: breadth proves more than depth. Then this process's share of those."""
    seen: Counter = Counter()
    order = {}
    for place, item in enumerate(items):
        function = (item.path, getattr(item, "originalname", item.name))
        order[item] = (seen[function], place)
        seen[function] += 1
    chosen = sorted(items, key=order.__getitem__)[ASKED["share"] :: ASKED["shares"]]
    done = set(ASKED["done"])
    items[:] = [item for item in chosen if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    emit(kind="test started", test=nodeid)
    faulthandler.dump_traceback_later(ASKED["seconds"], exit=True, file=STDERR)


_outcomes: dict[str, tuple[str, float, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome, seconds, said = _outcomes.get(report.nodeid, ("passed", 0.0, ""))
    if report.outcome != "passed" and outcome != "failed":
        outcome = report.outcome
        said = str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else report.longreprtext[-1500:]
    _outcomes[report.nodeid] = outcome, seconds + report.duration, said


def pytest_runtest_logfinish(nodeid: str) -> None:
    faulthandler.cancel_dump_traceback_later()
    outcome, seconds, said = _outcomes.pop(nodeid)
    emit(kind="test", test=nodeid, outcome=outcome, seconds=seconds, **({"said": said} if said else {}))
    if outcome == "failed":
        _end_if_the_gpu_is_lost()


def _end_if_the_gpu_is_lost() -> None:
    """After an illegal access every later call of the process fails: whoever started it goes on in another."""
    import torch

    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(LOST)
