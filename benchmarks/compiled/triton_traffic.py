"""Bytes and flops of the Triton kernels, counted from their own intermediate code, and the least time that an H100 could take for them.

    python -m benchmarks.compiled.triton_traffic             # writes results/triton_traffic.csv

What is counted is what programs ask for: of L2, where tiles are shared, and not of DRAM. Times are bounds, not measurements: nothing is
faster, and what else a kernel waits for is not in them.
"""

import argparse
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import asdict, astuple, dataclass, replace

import torch

from benchmarks import record
from benchmarks.compiled import triton_ahead
from distill_kernels import divergences
from distill_kernels.backends import triton as backend
from distill_kernels.backends.triton import sweep
from distill_kernels.schedule.plan import make_plan

TARGET = "sm_90"
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "i1": 1}
ARITHMETIC = {
    "addi": lambda a, b: a + b, "subi": lambda a, b: a - b, "muli": lambda a, b: a * b, "divsi": lambda a, b: int(a / b),
    "remsi": math.fmod, "minsi": min, "maxsi": max, "andi": lambda a, b: a & b, "ori": lambda a, b: a | b,
}  # fmt: skip
COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "slt": lambda a, b: a < b, "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b, "sge": lambda a, b: a >= b,
}  # fmt: skip
SAME_POINTER = {"tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.bitcast"}


def _operations(ttir: str):
    """(name of the result or None, operation, names it takes, the whole line) of each line."""
    made = []
    for line in ttir.splitlines():
        line = re.sub(r"\s*\bloc\((?:[^()]|\([^()]*\))*\)", "", line).strip()
        result, _, rest = line.partition(" = ") if re.match(r"%[\w.]+(:\d+)? = ", line) else (None, "", line)
        operation = re.match(r'"?([\w.]+)', rest)
        names = re.findall(r"%[\w.]+", rest)
        made.append((result and result.partition(":")[0], operation[1] if operation else "", names, line))
    return made


def _elements(kind: str) -> tuple[int, int]:
    """(number, bytes of one) of `tensor<16x128x!tt.ptr<bf16>>`, `tensor<16x128xf32>` or `!tt.ptr<f32>`."""
    found = re.search(r"((?:\d+x)*)(?:!tt\.ptr<)?([a-z]+\d+)\W*$", kind)
    return math.prod(int(size) for size in found[1].split("x") if size), BYTES[found[2]]


def count(ttir: str, values: dict, grid: tuple) -> Counter:
    """Of a whole launch: ("load" or "store", argument) in bytes, "flops" of matrix products, "exp" in exponentials and logarithms.

    Whatever depends on data counts as done: masked elements as loaded, `a if condition else b` as a.
    """
    operations = _operations(ttir)
    arguments = {f"%{name}": value for name, value in values.items() if isinstance(value, int) and not isinstance(value, bool)}
    found = Counter()
    for program in itertools.product(*(range(size) for size in grid)):
        found += _count_program(operations, arguments, dict(zip("xyz", program, strict=False)))
    return found


def _count_program(operations, arguments, program):
    known, root, found = dict(arguments), {}, Counter()
    times, otherwise = [1], [1]  # how often what is in each open region is done, and what is in its else
    for result, operation, names, line in operations:
        value, here, instead = None, times[-1], 0
        if line.startswith("}"):
            times.pop()
            instead = otherwise.pop()
            if line.startswith("} else"):
                times.append(instead)
                otherwise.append(0)
            continue
        taken = [known.get(name) for name in names]
        kind = operation.partition(".")[2]
        if operation == "arith.constant" and (number := re.search(r"constant (-?\d+|true|false)\b", line)):
            value = {"true": 1, "false": 0}.get(number[1]) if number[1].isalpha() else int(number[1])
        elif operation == "tt.get_program_id":
            value = program[re.search(r"get_program_id (\w)", line)[1]]
        elif kind in ARITHMETIC and operation.startswith("arith.") and len(taken) == 2 and None not in taken:
            value = int(ARITHMETIC[kind](*taken))
        elif operation == "arith.cmpi" and None not in taken:
            value = int(COMPARISONS[re.search(r"cmpi (\w+)", line)[1]](*taken))
        elif operation == "arith.select" and len(taken) == 3:
            value = taken[2] if taken[0] == 0 else taken[1]
        elif operation in ("arith.extsi", "arith.extui", "arith.trunci"):
            value = taken[0]
        elif operation in SAME_POINTER:
            root[result] = root.get(names[0], names[0])
        elif operation == "tt.load":
            number, size = _elements(line)
            found["load", root.get(names[0], names[0])[1:]] += here * number * size
        elif operation == "tt.descriptor_load":
            number, size = _elements(line)
            found["load", names[0][1:]] += here * number * size
        elif operation == "tt.store":
            number, size = _elements(line)
            found["store", root.get(names[0], names[0])[1:]] += here * number * size
        elif operation == "tt.dot":
            rows, depth, columns = re.search(r": tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", line).groups()
            found["flops"] += here * 2 * int(rows) * int(depth) * int(columns)
        elif operation in ("math.exp", "math.exp2", "math.log", "math.log2"):
            found["exp"] += here * _elements(line)[0]
        if line.endswith("{"):
            if operation == "scf.for":
                low, high, step = taken[1:4]
                here *= max(0, -(-(high - low) // step))
            elif operation == "scf.if":
                here, instead = (here, here) if taken[0] is None else (here * taken[0], here * (1 - taken[0]))
            times.append(here)
            otherwise.append(instead)
        if result is not None:
            known[result] = value
    return found


@dataclass(frozen=True)
class Case:
    tokens: int
    vocabulary: int
    student_dim: int
    teacher_dim: int

    @property
    def dims(self) -> int:
        return self.student_dim + self.teacher_dim


# The docstrings of the kernels, as formulas.


def sweep_flops(case: Case) -> int:
    return 2 * case.tokens * case.vocabulary * case.dims


def sweep_bytes(case: Case, rows: int, entries: int, element: int) -> int:
    """Asked of L2: whole tiles, those at the edges too."""
    return -(-case.tokens // rows) * -(-case.vocabulary // entries) * (rows + entries) * case.dims * element


def pass_bytes(case: Case) -> int:
    """A pass of a row kernel over both models' logits."""
    return 8 * case.tokens * case.vocabulary


def equalities(target: str = TARGET) -> list[dict]:
    """{what, counted, formula} of each kernel, on problems that tiles divide."""
    triton_ahead.select(target)
    found = []
    for dtype, tile in itertools.product(
        (torch.bfloat16, torch.float32),
        (sweep.Configuration(64, 64, 32, 4, 2, True, "TMA"), sweep.Configuration(16, 128, 16, 4, 2, False, "pointers")),
    ):
        case = Case(192, 128 * 44 * 2, 256, 512)
        problem = _problem(case, dtype, divergences.forward_kl())
        for launch in triton_ahead.launches(target, problem, fused=True, tile=tile):
            if launch.name == "sweep_kernel":
                counted = _counted(launch)
                asked = sum(number for key, number in counted.items() if key[0] == "load" and key[1].endswith(("hidden", "weight")))
                name = f"sweep, {'statistics' if launch.values['totals'] is None else 'totals'}, {problem.student_dtype}, {tile.reason}"
                size = problem.student_dtype.itemsize
                found.append({"what": f"{name}: bytes", "counted": asked, "formula": sweep_bytes(case, tile.rows, tile.entries, size)})
                found.append({"what": f"{name}: flops", "counted": counted["flops"], "formula": sweep_flops(case)})
    case = Case(8, 2**17, 256, 512)
    for divergence, dtype in itertools.product((divergences.forward_kl(), divergences.jensen_shannon(0.3)), (torch.float16, torch.float32)):
        problem = _problem(case, dtype, divergence, d_hidden=True)
        passes = 0
        for launch in triton_ahead.launches(target, problem):
            counted = _counted(launch)
            read = counted["load", "student_logits"] + counted["load", "teacher_logits"]
            name = f"{launch.name}, {divergence}, {dtype}"
            found.append({"what": f"{name}: logits", "counted": read, "formula": pass_bytes(case)})
            if divergence.one_pass and (each := EXPONENTIALS.get(launch.name.removesuffix("_kernel"))):
                counted_each = round(counted["exp"] / (case.tokens * case.vocabulary))  # rounds off what is done once for a tile
                found.append({"what": f"{name}: exponentials of an entry", "counted": counted_each, "formula": each})
            passes += launch.values.get("ALWAYS", True)
        found.append({"what": f"{divergence}, {dtype}: passes", "counted": passes, "formula": 2 if divergence.one_pass else 3})
        written = counted["store", "dz"]
        found.append({"what": f"{name}: dz", "counted": written, "formula": case.tokens * case.vocabulary * dtype.itemsize})
    return found


def _problem(case, dtype, divergence, **options):
    return triton_ahead.problem(case.tokens, case.vocabulary, case.student_dim, case.teacher_dim, dtype, divergence, **options)


def _counted(launch):
    return count(launch.compile()[0].asm["ttir"], launch.values, launch.grid)


@dataclass(frozen=True)
class Peaks:
    multiprocessors: int
    flops: float  # a second, bfloat16, dense
    dram: float  # bytes a second
    l2: float
    exponentials: float  # a second


# H100 SXM. flops and dram: NVIDIA's data sheet. exponentials: 16 a clock and multiprocessor, by the table of arithmetic throughputs in
# the CUDA C++ Programming Guide. Assumptions: a clock of 1.83 GHz, and 5.5 TB/s of L2, which NVIDIA does not publish.
H100 = Peaks(multiprocessors=132, flops=989.4e12, dram=3.35e12, l2=5.5e12, exponentials=132 * 16 * 1.83e9)
EXPONENTIALS = {"statistics": 3, "gradient": 2}  # of an entry, of forward_kl: counted, like the bytes
SECTOR = 32  # bytes that memory is read in
FRACTION = 0.08  # of the columns, where they are sampled
CASES = (
    Case(4096, 131072, 2048, 4096),
    Case(8192, 128256, 2048, 4096),
    Case(1024, 128256, 2048, 4096),
    Case(8192, 262144, 2304, 3584),
    Case(128, 151936, 1024, 4096),
)
LARGER = ((128, 128), (128, 256), (256, 256), (256, 512))  # tiles, or what a cluster reads of each operand once


def chunks_of(case: Case, **options) -> list[int]:
    """Tokens of each chunk that the plan would make on an H100, of bfloat16 models."""
    asked = triton_ahead.problem(*astuple(case), torch.bfloat16, divergences.forward_kl(), **options)
    asked = replace(asked, device=torch.device("cuda"))
    with triton_ahead.standing_for(TARGET):
        size = make_plan(asked, backend.schedule(asked)).chunk_tokens
    return [min(size, case.tokens - begin) for begin in range(0, case.tokens, size)]


def least(phases: list[dict], matrix: float) -> dict:
    """Of phases that follow each other, {resource: seconds} each: milliseconds of each resource in all; the slowest of every phase is what
    it takes, and the resource that is it for longest binds. `matrix`: seconds that products alone would take."""
    total, slowest = Counter(), Counter()
    for phase in phases:
        total.update(phase)
        binding = max(phase, key=phase.get)
        slowest[binding] += phase[binding]
    return {f"{name}_ms": 1e3 * seconds for name, seconds in total.items()} | {
        "binds": max(slowest, key=slowest.get), "bound_ms": 1e3 * slowest.total(), "of_matrix": slowest.total() / matrix,
    }  # fmt: skip


def bound(case: Case, rows: int, entries: int, chunks: list[int] | None = None, element: int = 2, peaks: Peaks = H100) -> dict:
    """Least time of one pass of the sweep over both 16-bit heads; `chunks`: their tokens, all in one unless told."""
    phases, found = [], {}
    for tokens in chunks or [case.tokens]:
        part = replace(case, tokens=tokens)
        blocks = -(-tokens // rows)
        splits = max(1, min(peaks.multiprocessors // blocks, -(-case.vocabulary // entries)))
        programs = blocks * splits
        waves = -(-programs // peaks.multiprocessors)
        busy = programs / (waves * peaks.multiprocessors)
        phases.append(
            {
                "matrix": sweep_flops(part) / peaks.flops / busy,
                "l2": sweep_bytes(part, rows, entries, element) / peaks.l2,
                "dram": (tokens + waves * case.vocabulary) * case.dims * element / peaks.dram,
                "exp": EXPONENTIALS["statistics"] * tokens * case.vocabulary / peaks.exponentials / busy,
            }
        )
        found = found or {"programs": programs, "busy": busy}
    return least(phases, sweep_flops(case) / peaks.flops) | found


def chunked_bound(case: Case, chunks: list[int], fraction: float = 0.0, element: int = 2, peaks: Peaks = H100) -> dict:
    """Least time of forward and backward by the chunked schedule, 16-bit heads; `fraction` of the columns, if they are sampled. What it is
    compared with is the dense products, 3S + 1T. Drawing the columns is left out: it takes launches rather than bytes."""
    v, d_s, d_t = case.vocabulary, case.student_dim, case.teacher_dim
    kept = round(fraction * v)
    phases, products = [], []

    def phase(*, flops=0, bytes=0, exp=0, to=phases):
        to.append({"matrix": flops / peaks.flops, "dram": bytes / peaks.dram, "exp": exp / peaks.exponentials})

    for i, n in enumerate(chunks):
        for dim in (d_s, d_t):  # logits: hidden states and head read, float32 written
            phase(flops=2 * n * v * dim, bytes=(n + v) * dim * element + 4 * n * v)
        part = replace(case, tokens=n)
        phase(bytes=pass_bytes(part), exp=EXPONENTIALS["statistics"] * n * v)
        phase(bytes=pass_bytes(part) + n * v * element, exp=EXPONENTIALS["gradient"] * n * v)
        columns = kept or v
        if kept:
            phase(bytes=n * v * element)  # norms of the columns
            # dz's kept columns: gathered, weighted in float32, rounded. The head's: gathered.
            phase(bytes=n * min(v * element, kept * SECTOR) + n * kept * (3 * element + 8))
            phase(bytes=2 * kept * d_s * element)
        phase(flops=2 * n * columns * d_s, bytes=(n + d_s) * columns * element + 4 * n * d_s)
        # d_weight in float32, after the first chunk added to; of kept columns it is made apart, and then added.
        phase(flops=2 * n * columns * d_s, bytes=(columns + d_s) * n * element + 4 * columns * d_s * (1 if kept or i == 0 else 2))
        if kept:
            phase(bytes=12 * kept * d_s)
    if kept:
        phase(bytes=4 * v * d_s)  # d_weight is zeros at first
    phase(bytes=(8 + 4 + element) * (case.tokens + v) * d_s)  # both gradients times the upstream one, then rounded
    for dim in (d_s, d_t, d_s, d_s):  # the bare products, of 16 bits throughout and all tokens at once
        n = case.tokens
        phase(flops=2 * n * v * dim, bytes=((n + v) * dim + n * v) * element, to=products)
    made = least(phases, sum(product["matrix"] for product in products))
    return made | {"of_products": made["bound_ms"] / 1e3 / sum(max(product.values()) for product in products)}


def bounds() -> list[dict]:
    made = []
    for case in CASES:

        def add(schedule, chunks, found, case=case, **columns):
            made.append(asdict(case) | {"schedule": schedule, "chunk_tokens": chunks[0], "chunks": len(chunks)} | columns | found)

        chunks = chunks_of(case)
        chosen = sweep.configuration(TARGET, torch.bfloat16, chunks[0])
        tiles = {(chosen.rows, chosen.entries): 1} | {tile: 0 for tile in LARGER if tile != (chosen.rows, chosen.entries)}
        for (rows, entries), configured in tiles.items():
            add("tile-fused", chunks, bound(case, rows, entries, chunks), rows=rows, entries=entries, configured=configured)
        gradients = {"d_hidden": True, "d_weight": True}
        chunks = chunks_of(case, **gradients)
        no_tile = {"rows": "", "entries": "", "configured": ""}
        add("chunked", chunks, chunked_bound(case, chunks), **no_tile)
        chunks = chunks_of(case, **gradients, column_fraction=FRACTION)
        add(f"chunked, {FRACTION:.0%} of columns", chunks, chunked_bound(case, chunks, FRACTION), **no_tile)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equalities", action="store_true", help="print what was counted and what the formulas give, and do nothing else")
    if parser.parse_args().equalities:
        for row in equalities():
            print(json.dumps(row))
        return
    wrong = [row for row in triton_ahead.rows_of("benchmarks.compiled.triton_traffic", "--equalities") if row["counted"] != row["formula"]]
    if wrong:
        raise SystemExit("\n".join(map(str, wrong)))
    made = bounds()
    for row in made:
        tile = f", {row['rows']} x {row['entries']}{'*' * row['configured']}" if row["rows"] else ""
        resources = ", ".join(f"{name} {row[f'{name}_ms']:.2f}" for name in ("matrix", "l2", "dram", "exp") if f"{name}_ms" in row)
        shape = f"{row['tokens']:5} x {row['vocabulary']}, {row['student_dim']} + {row['teacher_dim']}"
        print(
            f"{shape}: {row['schedule']}{tile}, {row['chunks']} of {row['chunk_tokens']} tokens: {resources}: {row['bound_ms']:.2f} ms by "
            f"{row['binds']}, {row['of_matrix']:.2f} of the matrix bound"
        )
    (record.RESULTS / "triton_traffic.csv").unlink(missing_ok=True)
    key = ("tokens", "vocabulary", "student_dim", "teacher_dim", "schedule", "rows", "entries")
    print(f"written: {record.write('triton_traffic', made, key)}")


if __name__ == "__main__":
    main()
