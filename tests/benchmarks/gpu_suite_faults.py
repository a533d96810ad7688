"""Stages that go wrong, for test_gpu_suite.py: python -m gpu_suite_faults NAME runs one, as the suite does."""

import os
import signal
import sys
import time

from benchmarks.gpu_suite.journal import emit
from benchmarks.gpu_suite.runner import run_stage
from benchmarks.gpu_suite.stages import Stage


def good(number):
    emit(kind="rate", what=f"rate {number}", gbps=float(number))


def hangs():
    emit(kind="rate", what="before it hung", gbps=1.0)
    time.sleep(600)


def hangs_and_ignores_its_watchdog():
    import faulthandler

    faulthandler.cancel_dump_traceback_later()
    hangs()


def crashes():
    emit(kind="rate", what="before it crashed", gbps=2.0)
    os.kill(os.getpid(), signal.SIGSEGV)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def does_not_compile():
    emit(kind="rate", what="before it did not compile", gbps=3.0)
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @triton.jit
    def kernel(out, COUNT: tl.constexpr):
        tl.store(out + tl.arange(0, COUNT), 0.0)  # COUNT must be a power of two

    source = ASTSource(kernel, {"out": "*fp32", "COUNT": "constexpr"}, {(1,): 3})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))


def leaves_something_running(path):
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(path, "w") as file:
        file.write(str(child.pid))


def stage(name, function, *arguments, seconds=60.0, group=""):
    return Stage(name, seconds, f"gpu_suite_faults:{function.__name__}", arguments, group)


STAGES = {
    made.name: made
    for made in (
        stage("first", good, 10),
        stage("hangs", hangs, seconds=4.0),
        stage("hangs for good", hangs_and_ignores_its_watchdog, seconds=4.0),
        stage("crashes", crashes),
        stage("killed", killed),
        stage("does not compile", does_not_compile),
        stage("one of two", good, 20, group="two"),
        stage("other of two", crashes, group="two"),
        stage("last", good, 30),
    )
}

if __name__ == "__main__":
    run_stage(STAGES[sys.argv[1]] if sys.argv[1] in STAGES else stage("leaves", leaves_something_running, sys.argv[1]))
