"""The own tests of the GPU backends, on the GPU, those most worth their time first, each result at once.

A process of pytest that crashes or hangs has cost one test: another goes on with the rest.
"""

import json
import os
import subprocess
import sys
import tempfile

from benchmarks.gpu_suite.journal import PIPE, Record, emit, parsed

PLUGIN = "benchmarks.gpu_suite.work.pytest_plugin"
# What runs of the files: all but what needs no GPU or is exhaustive; of tests of all backends what runs on these two.
CHOSEN = "triton or cuda or every_backend"
DRY_CHOSEN = "(test_divergence_alone and forward_kl and triton) or (test_stats_match_reference and plain and forward_kl)"
TEST_SECONDS = 40  # of one test: compiling is most of it
SAID = 6000  # characters of the last words: where a test hung comes before who called it


def own_tests(files: tuple[str, ...], share: int, shares: int, dry: bool) -> None:
    done: list[str] = []
    while True:
        results, code, said = one_process(files, share, shares, dry, done)
        named = [record["test"] for record in results]
        finished = {record["test"] for record in results if record["kind"] == "test"}
        broken = next((name for name in named if name not in finished), None)
        if broken is not None:
            emit(kind="test", test=broken, outcome="crashed or hung", said=said)
        done += dict.fromkeys(named)
        if code in (0, 1, 5) and broken is None:  # passed, failed, nothing left
            return
        if not named:
            raise SystemExit(f"pytest ended with {code} before its first test: {said}")


def one_process(files: tuple[str, ...], share: int, shares: int, dry: bool, done: list[str]) -> tuple[list[Record], int, str]:
    """(what the plugin said, exit code, the end of what was printed). Results go on as they come."""
    reads, writes = os.pipe()
    with tempfile.TemporaryFile("w+") as printed:
        command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "-q"]
        command += ["-m", "not exhaustive", "-k", DRY_CHOSEN if dry else CHOSEN, *files]
        asked = {"share": share, "shares": shares, "seconds": TEST_SECONDS, "done": done}
        environment = os.environ | {PIPE: str(writes), "GPU_SUITE_TESTS": json.dumps(asked)}
        child = subprocess.Popen(command, env=environment, pass_fds=(writes,), stdout=printed, stderr=subprocess.STDOUT)
        os.close(writes)
        results = []
        with os.fdopen(reads, "rb") as lines:
            for record in parsed(lines):
                results.append(record)
                if record["kind"] == "test":
                    emit(**record)
        code = child.wait()
        printed.seek(0)
        return results, code, printed.read()[-SAID:]
