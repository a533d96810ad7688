"""Everything that only a GPU can show, in one command and under 8 minutes on one H100, without network:

    python -m benchmarks.gpu_suite OUT                # OUT/suite.json, OUT/latency.csv, OUT/tests.txt; a summary is printed last
    python -m benchmarks.gpu_suite OUT --dry-run      # the same steps at tiny sizes, on CPU in Triton's interpreter if there is no GPU

Stages, each in a process of its own under a watchdog, which prints every thread's stack and kills a stage that hangs: what machine
this is; what it reaches in cuBLAS products and in a device copy; the bandwidth of both row kernels, Triton's and CUDA's; the tests of both
backends against the float64 reference; then for each case and dtype the gradient error, peak memory and time of the loss (forward +
backward, and forward alone) by this library (exact, by either backend, with sampled columns, and with quantised sweeps), eager torch,
torch.compile of it, the matrix products alone, and, where they are installed, Liger (chunked and Triton), TRL and CCE (cross entropy only,
beside this library's). Variants take turns and medians are reported; a variant that gives wrong gradients is not timed, one that runs out
of memory says so. A stage that fails, or for which no time is left, is reported with what it had measured until then, and the others go on.

tflops: of the products that a variant's result asks for, whatever it multiplies again not counted; of_cublas: of the rate of large square
products. gbps: of a variant's inputs, read once, and its gradients, written once; of_copy: of the rate of a copy.
"""

import argparse
import collections
import contextlib
import csv
import faulthandler
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import distill_kernels
from benchmarks import record
from benchmarks.cases import Case
from benchmarks.gpu_suite.case import MIB, device, has_gpu, interleaved, name_of, peers, run_case, synchronise, why_no_cuda
from distill_kernels.call import worthwhile

CASES = (
    Case("h8192-v128256-d2048-4096", 8192, 128256, 2048, 4096),
    Case("h1024-v128256-d2048-4096", 1024, 128256, 2048, 4096),
    Case("h128-v151936-d1024-4096", 128, 151936, 1024, 4096),
    Case("h4096-v128256-d4096-4096", 4096, 128256, 4096, 4096),
    Case("h8192-v262144-d2304-3584", 8192, 262144, 2304, 3584),
)
TINY = (Case("tiny", 8, 300, 24, 40),)
MINUTES = 8.0
STAGE_SECONDS = {"environment": 60, "peaks": 40, "rows": 40, "tests": 170}
CASE_SECONDS = 60
TEST_PROCESSES = max(1, min(12, (os.cpu_count() or 1) // 2))
TEST_FILES = (
    "tests/backends/triton/test_triton.py",
    "tests/backends/triton/test_triton_quantised.py",
    "tests/backends/triton/test_triton_graphs.py",
    "tests/backends/cuda/test_cuda.py",
    "tests/backends/cuda/test_cuda_sweep_backend.py",
    "tests/estimators/test_columns.py",
)
# All of the first five (their names have the word), and of the last what runs on these backends.
TESTS = "triton or cuda or every_backend"
DRY_TESTS = "(test_divergence_alone and forward_kl and triton) or (drawn_columns and triton)"


def environment() -> dict:
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__, "cpu": record.processor()}
    if has_gpu():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": properties.L2_cache_size / MIB,
            "cuda": torch.version.cuda,
        }
    found["peers"] = sorted(peers())
    found["doctor"] = {name: reason or "ready" for name, reason in distill_kernels.doctor().items()}
    return found


def tests(out: Path, dry: bool) -> dict:
    """The own tests of the Triton and CUDA backends; on a GPU they run on it, in several processes, for it is compiling that takes time."""
    root = Path(__file__).resolve().parents[2]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "--tb=short"]
    collect = [*pytest, "--collect-only", "-k", DRY_TESTS if dry else TESTS, *TEST_FILES]
    listed = subprocess.run(collect, cwd=root, capture_output=True, text=True).stdout
    names = [line for line in listed.splitlines() if "::" in line]
    shards = [names[i::TEST_PROCESSES] for i in range(TEST_PROCESSES) if names[i::TEST_PROCESSES]]
    logs = [(out / f"tests-{i}.part").open("w+") for i in range(len(shards))]
    children = [
        subprocess.Popen([*pytest, *shard], cwd=root, stdout=log, stderr=subprocess.STDOUT) for shard, log in zip(shards, logs, strict=True)
    ]
    codes = [child.wait() for child in children]
    texts = []
    for log in logs:
        log.seek(0)
        texts.append(log.read())
        log.close()
        Path(log.name).unlink()
    (out / "tests.txt").write_text("\n".join(texts))
    counts = collections.Counter()
    for text in texts:
        for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", text.strip().splitlines()[-1]):
            counts[what] += int(count)
    return {"exit_code": max(codes, default=1), "collected": len(names), **counts}


def peaks(dry: bool) -> dict:
    """TFLOP/s of products and GB/s of a copy: what the rest is a fraction of."""
    size, count = (256, 2**16) if dry else (8192, 2**28)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
        a @ b
        times = interleaved({"product": lambda a=a, b=b: a @ b}, 2.0)["product"]
        found[f"{name_of(dtype)}_tflops"] = 2 * size**3 / statistics.median(times) / 1e12
    source = torch.zeros(count, device=device())
    target = torch.empty_like(source)
    target.copy_(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, 2.0)["copy"]
    found["copy_gbps"] = 2 * source.nbytes / statistics.median(times) / 1e9  # read and written
    return found


def rows(dry: bool) -> dict:
    """GB/s of the row kernels on a chunk of bfloat16 models: both logits of an entry read twice, 16 bytes, or once where the kernel holds
    the row, and dz written, 2."""
    from distill_kernels.backends.cuda.launch import Launcher as CudaLauncher
    from distill_kernels.backends.cuda.launch import row_shape
    from distill_kernels.backends.triton.launch import Launcher as TritonLauncher
    from distill_kernels.call.options import Options
    from distill_kernels.call.problem import Problem, Tensors
    from distill_kernels.schedule import chunked

    found, launchers = {}, {"triton": TritonLauncher, "cuda": CudaLauncher}
    if (reason := why_no_cuda()) is not None:
        launchers.pop("cuda")
        found["cuda"] = reason
    for tokens, vocabulary in ((4, 300),) if dry else ((1024, 128256), (128, 151936), (8, 151936)):
        new = {"device": device(), "dtype": torch.float32}
        student, teacher = (torch.randn(tokens, vocabulary, **new) * 3 for _ in range(2))
        dz = torch.empty(tokens, vocabulary, device=device(), dtype=torch.bfloat16)
        coefficients = torch.full((tokens, 3), 1.0 / tokens, **new)
        hidden = torch.zeros(tokens, 8, device=device(), dtype=torch.bfloat16)
        weight = torch.zeros(vocabulary, 8, device=device(), dtype=torch.bfloat16)
        written = {"coefficients": coefficients, "terms": torch.empty(tokens, 3, **new)}
        chunk = chunked.Chunk(**dict.fromkeys(chunked.Chunk._fields) | written)
        tensors = Tensors(hidden, weight, None, hidden, weight, None, None, coefficients)
        problem = Problem.of(tensors, Options())
        made = {name: launcher(problem, tensors) for name, launcher in launchers.items()}
        steps = {
            name: lambda of=of, chunk=chunk, student=student, teacher=teacher, dz=dz: list(of.rows(chunk, student, teacher, dz, None) or ())
            for name, of in made.items()
        }
        for step in steps.values():
            step()
        for name, samples in interleaved(steps, 1.0 * len(steps)).items():
            median = statistics.median(samples)
            held = name == "cuda" and row_shape(tokens, vocabulary, 2, made[name].limits).held_vectors > 0
            moved = tokens * vocabulary * (8 * (1 if held else 2) + 2)
            found[f"{name} {tokens}x{vocabulary}"] = {"seconds": median, "bytes": moved, "gbps": moved / median / 1e9}
    return found


def stages(dry: bool) -> dict[str, float]:
    """Name and most seconds of each stage, in order."""
    found = dict(STAGE_SECONDS)
    for dtype in ("bfloat16", "float32"):
        found |= {f"{case.name}:{dtype}": CASE_SECONDS for case in (TINY if dry else CASES)}
    return found


def stage_file(name: str, out: Path) -> Path:
    return out / f"{name.replace(':', '-')}.stage"


def leave(result: dict, path: Path):
    """Writes what a stage has so far. In two steps, for the process may be killed at any."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(path)


def run_stage(name: str, out: Path, dry: bool, limit: float):
    faulthandler.dump_traceback_later(limit, exit=True)  # the watchdog's word, before the parent's kill
    single = {"environment": environment, "peaks": lambda: peaks(dry), "rows": lambda: rows(dry), "tests": lambda: tests(out, dry)}
    path = stage_file(name, out)
    if dry:
        worthwhile.LEAST_TOKENS = worthwhile.LEAST_VOCABULARY = 1  # columns are to be sampled at tiny sizes too
    if name in single:
        leave(single[name](), path)
    else:
        case, dtype = name.split(":")
        case = next(c for c in CASES + TINY if c.name == case)
        run_case(case, getattr(torch, dtype), 2.0 if dry else limit / 4, lambda rows: leave({"rows": rows}, path))
    synchronise()


def watched(command: list[str], limit: float, **options) -> str | None:
    """Runs a stage, and in the end kills whatever is left of it and of what it has started. Returns what went wrong, or None."""
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as child:
        try:
            _, said = child.communicate(timeout=limit + 5)
            return None if child.returncode == 0 else f"exit code {child.returncode}: {said[-2000:]}"
        except subprocess.TimeoutExpired:
            return f"killed after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def add_fractions(result: dict, peaks: dict):
    """of_cublas and of_copy: what the figures of a stage are of those that `peaks` measured, where it did."""
    for row in (*result.get("rows", ()), *(value for value in result.values() if isinstance(value, dict))):
        cublas = f"{row.get('dtype')}_tflops"
        if "tflops" in row and cublas in peaks:
            row["of_cublas"] = row["tflops"] / peaks[cublas]
        if "gbps" in row and "copy_gbps" in peaks:
            row["of_copy"] = row["gbps"] / peaks["copy_gbps"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on CPU where there is no GPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"most time for everything, {MINUTES:g} unless told")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.stage:
        run_stage(given.stage, given.out, given.dry_run, given.limit)
        return 0
    if not has_gpu() and not given.dry_run:
        parser.error("torch finds no GPU; --dry-run runs every step at tiny sizes on CPU")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of `watched`, which leaves nothing running
    deadline = time.monotonic() + given.minutes * 60
    environ = os.environ | ({} if has_gpu() else {"TRITON_INTERPRET": "1"})
    suite = {"dry_run": given.dry_run, "stages": {}}
    for name, most in stages(given.dry_run).items():
        limit = min(most, deadline - time.monotonic())
        if limit < 10:
            suite["stages"][name] = {"failed": "no time left"}
            continue
        command = [sys.executable, "-m", "benchmarks.gpu_suite", str(given.out), "--stage", name, "--limit", str(limit)]
        begin = time.monotonic()
        root = Path(__file__).resolve().parents[2]
        failure = watched(command + ["--dry-run"] * given.dry_run, limit, env=environ, cwd=root)
        written = stage_file(name, given.out)
        result = json.loads(written.read_text()) if written.exists() else {}
        written.unlink(missing_ok=True)
        written.with_suffix(".part").unlink(missing_ok=True)
        if failure:
            result["failed"] = failure
        add_fractions(result, suite["stages"].get("peaks", {}))
        suite["stages"][name] = result
        print(f"{name}: {time.monotonic() - begin:.0f} s{' — ' + failure if failure else ''}", flush=True)
        write(given.out, suite)  # after each stage: a run that is cut off leaves what it has
    write(given.out, suite)
    print(summary(suite))
    failed = any("failed" in result for result in suite["stages"].values())
    return 1 if failed or suite["stages"]["tests"]["exit_code"] else 0


def write(out: Path, suite: dict):
    (out / "suite.json").write_text(json.dumps(suite, indent=1))
    measured = [row for result in suite["stages"].values() for row in result.get("rows", ())]
    names = list(dict.fromkeys(name for row in measured for name in row))
    with (out / "latency.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in measured)


def summary(suite: dict) -> str:
    lines = ["", "stage results"]
    for name in STAGE_SECONDS:
        lines.append(f"  {name}: {json.dumps(suite['stages'].get(name))[:600]}")
    head = f"{'ms':>9} {'÷products':>9} {'÷eager':>7} {'TFLOP/s':>8} {'of cuBLAS':>9} {'of copy':>7} {'MiB':>8} {'error':>8}"
    lines.append(f"  {'case':26} {'dtype':9} {'direction':17} {'variant':22} {head}")
    for result in suite["stages"].values():
        for row in result.get("rows", ()):
            if "failed" in row:
                figures = row["failed"]
            else:
                ratios = {name: row.get(name, float("nan")) for name in ("to_products", "to_eager", "of_cublas", "of_copy")}
                figures = (
                    f"{row['milliseconds']:9.2f} {ratios['to_products']:9.2f} {ratios['to_eager']:7.2f} {row['tflops']:8.1f} "
                    f"{ratios['of_cublas']:9.1%} {ratios['of_copy']:7.1%} {row['peak_mib']:8.0f}"
                )
            error = f" {row['error']:8.1e}" if "error" in row else ""
            lines.append(f"  {row['case']:26} {row['dtype']:9} {row['direction']:17} {row['variant']:22} {figures}{error}")
    return "\n".join(lines)
