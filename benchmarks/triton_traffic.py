"""Bytes and flops of the Triton kernels, counted from their own intermediate code, and the least time that an H100 could take for them.

    python -m benchmarks.triton_traffic             # writes results/triton_traffic.csv

What is counted is what programs ask for: of L2, where tiles are shared, and not of DRAM. Times are bounds, not measurements: nothing is
faster, and what else a kernel waits for is not in them.
"""

import argparse
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch

from benchmarks import record, triton_ahead
from distill_kernels import divergences
from distill_kernels.backends.triton import sweep

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
EXPONENTIALS = 3  # of an entry in forward_kl's statistics: both softmaxes and the teacher's probability once more
CASES = (
    Case(4096, 131072, 2048, 4096),
    Case(8192, 128256, 2048, 4096),
    Case(1024, 128256, 2048, 4096),
    Case(8192, 262144, 2304, 3584),
    Case(128, 151936, 1024, 4096),
)
LARGER = ((128, 128), (128, 256), (256, 256), (256, 512))  # tiles, or what a cluster reads of each operand once


def bound(case: Case, rows: int, entries: int, element: int = 2, peaks: Peaks = H100) -> dict:
    """Least milliseconds of each resource for one pass of the sweep over both 16-bit heads, all tokens in one chunk; the largest binds."""
    blocks = -(-case.tokens // rows)
    splits = max(1, min(peaks.multiprocessors // blocks, -(-case.vocabulary // entries)))
    programs = blocks * splits
    waves = -(-programs // peaks.multiprocessors)
    busy = programs / (waves * peaks.multiprocessors)
    matrices = (case.tokens + waves * case.vocabulary) * case.dims * element
    times = {
        "matrix": sweep_flops(case) / peaks.flops / busy,
        "l2": sweep_bytes(case, rows, entries, element) / peaks.l2,
        "dram": matrices / peaks.dram,
        "exp": EXPONENTIALS * case.tokens * case.vocabulary / peaks.exponentials / busy,
    }
    binds = max(times, key=times.get)
    return {
        **{f"{name}_ms": 1e3 * seconds for name, seconds in times.items()}, "programs": programs, "busy": busy, "binds": binds,
        "bound_ms": 1e3 * times[binds], "of_matrix": times[binds] / (sweep_flops(case) / peaks.flops),
    }  # fmt: skip


def bounds() -> list[dict]:
    made = []
    for case in CASES:
        chosen = sweep.configuration(TARGET, torch.bfloat16, case.tokens)
        tiles = {(chosen.rows, chosen.entries): 1} | {tile: 0 for tile in LARGER if tile != (chosen.rows, chosen.entries)}
        for (rows, entries), configured in tiles.items():
            key = {
                "tokens": case.tokens, "vocabulary": case.vocabulary, "student_dim": case.student_dim, "teacher_dim": case.teacher_dim,
                "rows": rows, "entries": entries, "configured": configured,
            }  # fmt: skip
            made.append(key | bound(case, rows, entries))
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equalities", action="store_true", help="print what was counted and what the formulas give, and do nothing else")
    if parser.parse_args().equalities:
        for row in equalities():
            print(json.dumps(row))
        return
    wrong = [row for row in triton_ahead.rows_of("benchmarks.triton_traffic", "--equalities") if row["counted"] != row["formula"]]
    if wrong:
        raise SystemExit("\n".join(map(str, wrong)))
    made = bounds()
    for row in made:
        print(
            f"{row['tokens']:5} x {row['vocabulary']}, {row['student_dim']} + {row['teacher_dim']}: {row['rows']:3} x {row['entries']:3}"
            f"{'*' if row['configured'] else ' '} matrix {row['matrix_ms']:6.2f} ms, L2 {row['l2_ms']:6.2f}, DRAM {row['dram_ms']:5.2f}, "
            f"exp {row['exp_ms']:5.2f}: {row['bound_ms']:6.2f} by {row['binds']}, {row['of_matrix']:.2f} of the matrix bound"
        )
    (record.RESULTS / "triton_traffic.csv").unlink(missing_ok=True)
    key = ("tokens", "vocabulary", "student_dim", "teacher_dim", "rows", "entries")
    print(f"written: {record.write('triton_traffic', made, key)}")


if __name__ == "__main__":
    main()
