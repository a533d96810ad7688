"""Everything that only a GPU can show, in one command and under 8 minutes on one H100, without network:

    python -m benchmarks.gpu_suite OUT                # OUT/suite.json, OUT/latency.csv, OUT/tests.txt; a summary is printed last
    python -m benchmarks.gpu_suite OUT --dry-run      # the same steps at tiny sizes, on CPU in Triton's interpreter if there is no GPU

Stages, each in a process of its own under a watchdog, which prints every thread's stack and kills a stage that hangs: what machine
this is; what it reaches in cuBLAS products and in a device copy; the row kernels' bandwidth; the Triton backend's tests against the
float64 reference; then for each case and dtype the gradient error, peak memory and time of the loss (forward + backward, and forward
alone) by this library, eager torch, torch.compile of it, the matrix products alone, and, where they are installed, Liger (chunked and
Triton), TRL and CCE (cross entropy only, beside this library's). Variants take turns and medians are reported; a variant that gives
wrong gradients is not timed, one that runs out of memory says so. A stage that fails, or for which no time is left, is reported and the
others go on.
"""

import argparse
import collections
import csv
import faulthandler
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import distill_kernels
from benchmarks import cases, record
from benchmarks.cases import Case

CASES = (
    Case("h8192-v128256-d2048-4096", 8192, 128256, 2048, 4096),
    Case("h1024-v128256-d2048-4096", 1024, 128256, 2048, 4096),
    Case("h128-v151936-d1024-4096", 128, 151936, 1024, 4096),
    Case("h4096-v128256-d4096-4096", 4096, 128256, 4096, 4096),
    Case("h8192-v262144-d2304-3584", 8192, 262144, 2304, 3584),
)
TINY = (Case("tiny", 8, 300, 24, 40),)
GATE_TOKENS = 256  # whose gradients are compared with float32 eager's
ERRORS = {"float32": 2e-2, "bfloat16": 0.2}  # relative; float32 allows for TF32 where torch's switch is on
MINUTES = 8.0
STAGE_SECONDS = {"environment": 60, "peaks": 40, "rows": 40, "tests": 170}
CASE_SECONDS = 60
TEST_PROCESSES = max(1, min(12, (os.cpu_count() or 1) // 2))
MIB = 2**20


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if has_gpu() else "cpu")


def synchronise():
    if has_gpu():
        torch.cuda.synchronize()


def seconds(step) -> float:
    """Of one call: between two events on a GPU's stream."""
    if not has_gpu():
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(steps: dict, budget: float, most=20) -> dict[str, list[float]]:
    """Seconds of every step, each in its turn, for `budget` seconds and three rounds at least."""
    samples = {name: [] for name in steps}
    begin = time.perf_counter()
    while len(next(iter(samples.values()))) < most and (time.perf_counter() - begin < budget or len(next(iter(samples.values()))) < 3):
        for name, step in steps.items():
            samples[name].append(seconds(step))
    return samples


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
    """The Triton backend's own tests; on a GPU they run on it, in several processes, for it is compiling that takes the time."""
    root = Path(__file__).resolve().parents[1]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "--tb=short"]
    chosen = ["-k", "test_divergence_alone and forward_kl"] if dry else []
    listed = subprocess.run([*pytest, "--collect-only", *chosen, "tests/test_triton.py"], cwd=root, capture_output=True, text=True).stdout
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
    """GB/s of the row kernels on a chunk of bfloat16 models: logits read twice, 16 bytes, and dz written, 2."""
    from distill_kernels import chunked
    from distill_kernels.autograd import Tensors
    from distill_kernels.backends.triton.launch import Launcher
    from distill_kernels.divergences import resolve
    from distill_kernels.problem import Problem

    found = {}
    for tokens, vocabulary in ((4, 300),) if dry else ((1024, 128256), (128, 151936), (8, 151936)):
        new = {"device": device(), "dtype": torch.float32}
        student, teacher = (torch.randn(tokens, vocabulary, **new) * 3 for _ in range(2))
        dz = torch.empty(tokens, vocabulary, device=device(), dtype=torch.bfloat16)
        coefficients = torch.full((tokens, 3), 1.0 / tokens, **new)
        hidden = torch.zeros(tokens, 8, device=device(), dtype=torch.bfloat16)
        weight = torch.zeros(vocabulary, 8, device=device(), dtype=torch.bfloat16)
        problem = Problem(
            tokens=tokens, vocabulary=vocabulary, student_dim=8, teacher_dim=8, student_dtype=torch.bfloat16, teacher_dtype=torch.bfloat16,
            device=device(), divergence=resolve("forward_kl"), cross_entropy=False, z_loss=False,
        )  # fmt: skip
        launcher = Launcher(problem, Tensors(hidden, weight, None, hidden, weight, None, None, coefficients))
        terms = torch.empty(tokens, 3, **new)
        chunk = chunked.Chunk(hidden, hidden, None, coefficients, terms, None, None, None, None, 0, None)
        step = lambda chunk=chunk, launcher=launcher, s=student, t=teacher, dz=dz: launcher.rows(chunk, s, t, dz, None)  # noqa: E731
        step()
        median = statistics.median(interleaved({"rows": step}, 1.0)["rows"])
        found[f"{tokens}x{vocabulary}"] = {"seconds": median, "gbps": tokens * vocabulary * 18 / median / 1e9}
    return found


def peers() -> dict:
    """Losses of other libraries, by name; those of cases.peers and what runs on a GPU only."""
    found = cases.peers()
    if has_gpu():
        try:
            from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
        except ImportError:
            pass
        else:
            jsd = LigerFusedLinearJSD(jsd_beta=0.0)
            found["liger-triton"] = lambda *tensors: jsd(*tensors, torch.zeros(len(tensors[0]), dtype=torch.int64, device=device()))
    return found


def cross_entropies() -> dict:
    """Hard-label losses of the student alone: this library's and CCE's, where it is installed."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return {}

    def labels(hidden, weight):
        return torch.arange(len(hidden), device=hidden.device) % len(weight)

    return {
        "cce (cross entropy)": lambda hidden, weight, *_: linear_cross_entropy(hidden, weight, labels(hidden, weight)),
        "ours (cross entropy)": lambda hidden, weight, *_: distill_kernels.distillation_loss(
            hidden, weight, None, None, labels(hidden, weight), kd_weight=0.0, ce_weight=1.0
        ),
    }


def run_case(case: Case, dtype: torch.dtype, budget: float) -> list[dict]:
    with torch.device(device()):
        tensors = [t.detach().to(device()).requires_grad_(t.requires_grad) for t in case.tensors(dtype)]
    losses = {"ours": cases.fused("triton"), "torch backend": cases.fused("torch"), "eager": cases.eager}
    if has_gpu():
        losses["compiled"] = torch.compile(cases.eager)
    losses |= peers()
    results = []
    errors = gradient_errors(case, losses, tensors)
    if has_gpu():
        del losses["torch backend"]  # its float32 gradient products are a check of ours, not a rival
    extra = cross_entropies()
    directions = {
        "forward+backward": {name: cases.forward_backward(loss) for name, loss in (losses | extra).items()},
        "forward": {name: cases.forward_only(losses[name]) for name in ("ours", "eager")},
    }
    directions["forward+backward"] = {"products": cases.all_products(*(t.detach() for t in tensors[:2])), **directions["forward+backward"]}
    directions["forward"] = {"products": cases.forward_products, **directions["forward"]}
    for direction, steps in directions.items():
        flops = case.product_flops if direction == "forward+backward" else case.forward_flops
        peak, usable = {}, {}
        for name, step in steps.items():
            wrong = direction == "forward+backward" and not errors.get(name, {"error": 0.0})["error"] <= ERRORS[name_of(dtype)]
            peak[name] = "wrong gradients" if wrong else memory_of(step, tensors)
            if not isinstance(peak[name], str):
                usable[name] = lambda step=step: step(*tensors)
        samples = interleaved(usable, budget / 2)
        medians = {name: statistics.median(times) for name, times in samples.items()}
        for name in steps:
            row = {
                "case": case.name, "tokens": case.tokens, "vocabulary": case.vocabulary, "student_dim": case.student_dim,
                "teacher_dim": case.teacher_dim, "dtype": name_of(dtype), "direction": direction, "variant": name,
            }  # fmt: skip
            if name in medians:
                row |= {
                    "milliseconds": medians[name] * 1e3,
                    "tflops": flops / medians[name] / 1e12,
                    "peak_mib": peak[name],
                    "rounds": len(samples[name]),
                }
                row |= {f"to_{other}": medians[name] / medians[other] for other in ("products", "eager") if other in medians}
            else:
                row["failed"] = peak[name]
            results.append(row | (errors.get(name, {}) if direction == "forward+backward" else {}))
    return results


def gradient_errors(case, losses, tensors) -> dict[str, dict]:
    """Relative Frobenius error of the gradients on the case's first tokens, against float32 eager on the same inputs."""
    tokens = min(case.tokens, GATE_TOKENS)
    some = [t.detach()[:tokens] if i % 2 == 0 else t.detach() for i, t in enumerate(tensors)]
    wide = [t.float().clone().requires_grad_(i < 2) for i, t in enumerate(some)]
    cases.forward_backward(cases.eager)(*wide)
    truth = [t.grad for t in wide[:2]]
    del wide
    found = {}
    for name, loss in losses.items():
        leaves = [t.clone().requires_grad_() if i < 2 else t for i, t in enumerate(some)]
        try:
            cases.forward_backward(loss)(*leaves)
            found[name] = {"error": cases.gradient_error(leaves, truth, 1.0)}
        except Exception as error:  # noqa: BLE001  (another library's failure is a result, not ours to stop for)
            found[name] = {"error": float("inf"), "why": f"{type(error).__name__}: {error}"[:300]}
    return found


def memory_of(step, tensors) -> float | str:
    """MiB at the peak of a step, above what was there before it; or why there is none."""
    try:
        step(*tensors)  # compiles, and fills caches
        for tensor in tensors[:2]:
            tensor.grad = None
        if not has_gpu():
            step(*tensors)
            return 0.0
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(*tensors)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"[:300]


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stages(dry: bool) -> dict[str, float]:
    """Name and most seconds of each stage, in order."""
    found = dict(STAGE_SECONDS)
    for dtype in ("bfloat16", "float32"):
        found |= {f"{case.name}:{dtype}": CASE_SECONDS for case in (TINY if dry else CASES)}
    return found


def run_stage(name: str, out: Path, dry: bool, limit: float):
    faulthandler.dump_traceback_later(limit, exit=True)  # the watchdog's word, before the parent's kill
    single = {"environment": environment, "peaks": lambda: peaks(dry), "rows": lambda: rows(dry), "tests": lambda: tests(out, dry)}
    if name in single:
        result = single[name]()
    else:
        case, dtype = name.split(":")
        result = run_case(next(c for c in CASES + TINY if c.name == case), getattr(torch, dtype), 2.0 if dry else limit / 4)
    synchronise()
    (out / f"{name.replace(':', '-')}.stage").write_text(json.dumps(result))


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
        try:
            child = subprocess.run(
                command + ["--dry-run"] * given.dry_run, env=environ, timeout=limit + 5, capture_output=True, text=True,
                cwd=Path(__file__).resolve().parents[1],
            )  # fmt: skip
            failure = None if child.returncode == 0 else f"exit code {child.returncode}: {child.stderr[-2000:]}"
        except subprocess.TimeoutExpired:
            failure = f"killed after {limit:.0f} s"
        written = given.out / f"{name.replace(':', '-')}.stage"
        result = {"failed": failure} if failure else json.loads(written.read_text())
        written.unlink(missing_ok=True)
        suite["stages"][name] = result
        print(f"{name}: {time.monotonic() - begin:.0f} s{' — ' + failure if failure else ''}", flush=True)
        write(given.out, suite)  # after each stage: a run that is cut off leaves what it has
    write(given.out, suite)
    print(summary(suite))
    failed = [name for name, result in suite["stages"].items() if isinstance(result, dict) and result.get("failed")]
    return 1 if failed or suite["stages"]["tests"].get("exit_code") else 0


def write(out: Path, suite: dict):
    (out / "suite.json").write_text(json.dumps(suite, indent=1))
    measured = [row for result in suite["stages"].values() if isinstance(result, list) for row in result]
    columns = list(dict.fromkeys(column for row in measured for column in row))
    with (out / "latency.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in measured)


def summary(suite: dict) -> str:
    lines = ["", "stage results"]
    for name in STAGE_SECONDS:
        lines.append(f"  {name}: {json.dumps(suite['stages'].get(name))[:600]}")
    head = f"{'ms':>9} {'÷products':>9} {'÷eager':>7} {'TFLOP/s':>8} {'MiB':>8} {'error':>8}"
    lines.append(f"  {'case':26} {'dtype':9} {'direction':17} {'variant':22} {head}")
    for result in suite["stages"].values():
        for row in result if isinstance(result, list) else ():
            if "failed" in row:
                figures = row["failed"]
            else:
                figures = (
                    f"{row['milliseconds']:9.2f} {row.get('to_products', float('nan')):9.2f} {row.get('to_eager', float('nan')):7.2f} "
                    f"{row['tflops']:8.1f} {row['peak_mib']:8.0f}"
                )
            error = f" {row['error']:8.1e}" if "error" in row else ""
            lines.append(f"  {row['case']:26} {row['dtype']:9} {row['direction']:17} {row['variant']:22} {figures}{error}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
