"""Every Triton kernel, compiled for every target: registers, spills, shared memory, occupancy, and which instructions it got.

    python -m benchmarks.compiled.triton_compile             # all of it, some minutes: writes results/triton_compile.csv; fails on a fault
    python -m benchmarks.compiled.triton_compile --check     # a part, against the committed table
    python -m benchmarks.compiled.triton_compile --target sm_90 --write     # one target's rows of the Triton that is installed

Each release of Triton has rows of its own. No GPU is needed, and nothing here says how fast a kernel is.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from benchmarks import record
from benchmarks.compiled import triton_ahead
from distill_kernels import divergences
from distill_kernels.backends.triton import quantised_sweep, sweep
from distill_kernels.estimators.quantised import KINDS

NAME = "triton_compile"
KEY = ("target", "kernel", "variant", "dtype", "configuration")
RELEASES = (*KEY, "triton")  # of a row of the table, which has several releases of Triton
# Bytes of registers that a thread may spill, by release. 3.6.0 is what torch 2.11 is released with; the same sources spill nothing with
# 3.7.1. What these bytes, of a thread's thousand, cost was not measured.
SPILLS = {"3.6.0": 96}
REGISTERS_APART = 24  # that a check tolerates; another release of Triton or of its assembler shifts a few
VOCABULARY, STUDENT_DIM, TEACHER_DIM = 128256, 2048, 4096
UNALIGNED = 4  # fewer features: rows no longer begin at multiples of 16 bytes
EVERYTHING = {
    "cross_entropy": True, "z_loss": True, "temperature": 2.0, "label_smoothing": 0.1, "student_logit_scale": 0.5,
    "student_softcap": 30.0, "teacher_softcap": 50.0,
}  # fmt: skip
GRADIENTS = {"d_hidden": True, "d_weight": True}
DIVERGENCES = (
    divergences.forward_kl(), divergences.reverse_kl(), divergences.symmetric_kl(0.3), divergences.jensen_shannon(0.3),
    divergences.skew_forward_kl(0.3), divergences.skew_reverse_kl(0.3), divergences.total_variation(), divergences.alpha_beta(0.3, 0.6),
    divergences.squared_hellinger(), divergences.STUDENT_ENTROPY,
)  # fmt: skip
FORWARD_KL, REVERSE_KL = DIVERGENCES[:2]


def cases(target: str, check: bool):
    """(variant, launch, what was promised) of everything that is compiled for a target."""
    yield from _quantised_cases(target, check)
    if target in triton_ahead.CONFIGURED_AS:
        return  # what it does otherwise than the target whose configurations it has
    yield from _sweep_cases(target, check)
    yield from _row_cases(target, check)
    yield from _listed_cases(target, check)


def _problem(tokens, dtype, divergence, fewer=0, **options):
    teacher_dim = 0 if divergence is divergences.STUDENT_ENTROPY else TEACHER_DIM - fewer
    return triton_ahead.problem(tokens, VOCABULARY, STUDENT_DIM - fewer, teacher_dim, dtype, divergence, **options)


def _sweep_cases(target, check):
    for itemsize, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        tiles = sweep.CONFIGURATIONS[target, itemsize]
        for tile in tiles:
            last = tile is tiles[-1]
            if check and (itemsize == 4 or not last):
                continue
            wanted = [(f"{REVERSE_KL} with everything", REVERSE_KL, EVERYTHING)]
            if itemsize == 2 and not check:
                wanted += [(f"{FORWARD_KL} with everything", FORWARD_KL, EVERYTHING)]
                if last:
                    entropy = divergences.STUDENT_ENTROPY
                    wanted += [("forward_kl", FORWARD_KL, {}), ("student_entropy with everything", entropy, EVERYTHING)]
                    wanted += [("cross entropy", None, {"cross_entropy": True})]
            for variant, divergence, options in wanted:
                problem = _problem(3 * tile.rows, dtype, divergence, **options)
                yield from _sweeps(variant, target, problem, tile, bias=bool(options))
            if itemsize == 4 and target.startswith("sm"):
                torch.backends.cuda.matmul.allow_tf32 = True
                yield from _sweeps("reverse_kl with everything, TF32", target, problem, tile, bias=True)
                torch.backends.cuda.matmul.allow_tf32 = False
        if not check:
            # Not given a tile: the launcher chooses what reads such rows, and what finishes a token that all programs share.
            problem = _problem(4096, dtype, REVERSE_KL, fewer=UNALIGNED if itemsize == 2 else 1, **EVERYTHING)
            yield from _sweeps("reverse_kl with everything, unaligned", target, problem, None, bias=True)
            yield from _sweeps("reverse_kl with everything, one token", target, _problem(1, dtype, REVERSE_KL, **EVERYTHING), None, True)


def _sweeps(variant, target, problem, tile, bias):
    for launch in triton_ahead.launches(target, problem, fused=True, tile=tile, bias=bias):
        if launch.name != "sweep_kernel":
            yield variant, launch, problem.student_dtype, None
            continue
        kind = "totals" if launch.values["totals"] is not None else "statistics"
        yield f"{variant}: {kind}", launch, problem.student_dtype, _promised(target, launch, problem.student_dtype)


SWEPT = {"column_fraction": 0.08, **GRADIENTS}


def _quantised_cases(target, check):
    kinds = {"sm_89": ("fp8",), "sm_80": ("int8",), "gfx942": ("int8",)}.get(target, ("int8", "fp8"))
    if check:  # either kind on two targets
        kinds = kinds[-1:] if target == "sm_100" else kinds[:1]
    for kind in kinds:
        tiles = quantised_sweep.CONFIGURATIONS[triton_ahead.CONFIGURED_AS.get(target, target), kind]
        for tile in tiles[-1:] if check else tiles:
            wanted = [(f"{FORWARD_KL}", FORWARD_KL, {})]
            if not tile.bare:
                wanted += [(f"{REVERSE_KL} with everything and stats", REVERSE_KL, EVERYTHING | {"label_smoothing": 0.0, "stats": True})]
            if not (check or tile.bare):
                wanted += [
                    (f"{FORWARD_KL} with everything", FORWARD_KL, EVERYTHING | {"label_smoothing": 0.0}),
                    (f"{FORWARD_KL} and cross entropy", FORWARD_KL, {"cross_entropy": True}),
                    ("cross entropy", None, {"cross_entropy": True}),
                ]
            for variant, divergence, options in wanted[-1:] if check else wanted:
                problem = _problem(3 * tile.rows, torch.bfloat16, divergence, sweep=kind, **SWEPT, **options)
                yield from _quantised(f"{variant}, {kind}", target, problem, tile, bias=len(options) > 1)


def _quantised(variant, target, problem, tile, bias):
    of_sm_100 = "tcgen05" if problem.options.sweep == "fp8" else "mma.sync"
    promised = {"gfx942": "mfma", "sm_90": "wgmma", "sm_100": of_sm_100}.get(target, "mma.sync")
    for launch in triton_ahead.launches(target, problem, tile=tile, bias=bias):
        if launch.name in ("quantised_sweep_kernel", "logits_kernel"):
            yield variant, launch, KINDS[problem.options.sweep][0], promised
        else:
            yield variant, launch, torch.float32, None


def _promised(target, launch, dtype):
    if dtype is torch.float32 and launch.values["PRECISION"] == "ieee":
        return "mfma" if target == "gfx942" else "fma"
    few = launch.values["ROWS"] < 64  # fewer than the matrix instructions of 9.0 and 10.0 have
    return {"gfx942": "mfma", "sm_90": "mma.sync" if few else "wgmma", "sm_100": "mma.sync" if few else "tcgen05"}.get(target, "mma.sync")


def _row_cases(target, check):
    for divergence in (FORWARD_KL,) if check else DIVERGENCES:
        problem = _problem(1024, torch.bfloat16, divergence, **EVERYTHING, **GRADIENTS, stats=True)
        for launch in triton_ahead.launches(target, problem, bias=True):
            yield f"{divergence} with everything and stats", launch, torch.bfloat16, None
    if not check:
        for dtype in (torch.float16, torch.float32):
            for launch in triton_ahead.launches(target, _problem(1024, dtype, FORWARD_KL, **GRADIENTS)):
                yield "forward_kl", launch, dtype, None


def _listed_cases(target, check):
    for dtype in (torch.bfloat16,) if check else (torch.bfloat16, torch.float16, torch.float32):
        plain, everything = {}, EVERYTHING | {"label_smoothing": 0.0, "teacher_softcap": None}
        for variant, options in (("64 entries with everything", everything), *(() if check else (("64 entries", plain),))):
            problem = triton_ahead.problem(1024, VOCABULARY, STUDENT_DIM, 0, dtype, None, listed=64, **options, **GRADIENTS)
            for launch in triton_ahead.launches(target, problem, bias=bool(options)):
                yield variant, launch, dtype, None


def _configuration(launch):
    values, warps = launch.values, launch.options["num_warps"]
    if "ENTRIES" not in values:
        return f"{values['ROWS']} x {values['BLOCK']}, {warps} warps" if "BLOCK" in values else f"{values['ROWS']} tokens, {warps} warps"
    reads = "descriptors" if values.get("DESCRIPTORS") else "pointers"
    return f"{values['ROWS']} x {values['ENTRIES']} x {values['DEPTH']}, {warps} warps, {launch.options['num_stages']} stages, {reads}"


def compile_for(target: str, check: bool):
    """Prints a row, as JSON, for each case of a target."""
    triton_ahead.select(target)
    done = set()
    for variant, launch, dtype, promised in cases(target, check):
        row = {
            "target": target, "kernel": launch.name, "variant": variant, "dtype": str(dtype).removeprefix("torch."),
            "configuration": _configuration(launch),
        }  # fmt: skip
        key = tuple(row.values())
        if key not in done:
            done.add(key)
            descriptors = launch.values.get("DESCRIPTORS", False)
            row |= triton_ahead.measure(target, launch)
            row |= {"promised_matrix": promised or row["matrix"], "promised_tma": int(descriptors), "triton": triton.__version__}
            print(json.dumps(row), flush=True)


def faults(row: dict) -> list[str]:
    """What is wrong with a row, in words."""
    found = []
    if max(row["spill_stores"], row["spill_loads"]) > SPILLS.get(row["triton"], 0):
        found.append(f"spills {row['spill_stores']} bytes and reloads {row['spill_loads']}")
    if row["matrix"] != row["promised_matrix"]:
        found.append(f"multiplies by {row['matrix']}, not by {row['promised_matrix']}")
    if row["promised_tma"] and not row["tma_loads"]:
        found.append("has descriptors but no TMA load")
    most = triton_ahead.LIMITS[row["target"]].shared_program
    if row["shared"] > most:
        found.append(f"wants {row['shared']} bytes of shared memory, there are {most}")
    return found


def differences(row: dict, committed: dict) -> list[str]:
    """How a row differs from the committed one, whose values are text."""
    found = [
        f"{column} is {row[column]}, was {committed[column]}"
        for column in ("matrix", "load_bytes", "warps")
        if str(row[column]) != committed[column]
    ]
    if abs(row["registers"] - int(committed["registers"])) > REGISTERS_APART:
        found.append(f"registers are {row['registers']}, were {committed['registers']}")
    if bool(row["tma_loads"]) != bool(int(committed["tma_loads"])):
        found.append(f"tma_loads are {row['tma_loads']}, were {committed['tma_loads']}")
    return found


def committed(release: str | None = triton.__version__) -> dict[tuple, dict]:
    """The table's rows by KEY: of a release where it has them, else of another. None: all, each by RELEASES."""
    rows = record.read(NAME)
    if release is None:
        return {tuple(row[column] for column in RELEASES): row for row in rows}
    rows.sort(key=lambda row: row["triton"] == release)  # so that those come last, and stay
    return {tuple(row[column] for column in KEY): row for row in rows}


def complaints(made: list[dict], known: dict[tuple, dict] | None) -> list[str]:
    """Everything wrong with what was compiled, a line each; `known` is the committed table, if it is to agree."""
    wrong = []
    for row in made:
        key = tuple(row[column] for column in KEY)
        words = faults(row)
        if known is not None:
            words += differences(row, known[key]) if key in known else ["is not in the committed table"]
        wrong += [f"{', '.join(key)}: {word}" for word in words]
    return wrong


def table(check: bool) -> list[dict]:
    def of(target):
        return triton_ahead.rows_of("benchmarks.compiled.triton_compile", "--target", target, *(["--check"] if check else []))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [row for made in pool.map(of, triton_ahead.TARGETS) for row in made]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--target", choices=triton_ahead.TARGETS, help="print its rows and do nothing else")
    parser.add_argument("--write", action="store_true", help="with --target: put its rows into the table and leave all others")
    arguments = parser.parse_args()
    if arguments.target and not arguments.write:
        return compile_for(arguments.target, arguments.check)
    if arguments.target:
        made = triton_ahead.rows_of("benchmarks.compiled.triton_compile", "--target", arguments.target)
        print(f"written: {record.write(NAME, made, RELEASES)}")
        raise SystemExit("\n".join(complaints(made, None)) or None)
    made = table(arguments.check)
    wrong = complaints(made, committed() if arguments.check else None)
    print(f"{len(made)} kernels for {len(triton_ahead.TARGETS)} targets, {len(wrong)} wrong")
    if not arguments.check:
        others = [row for row in record.read(NAME) if row["triton"] != triton.__version__]
        (record.RESULTS / f"{NAME}.csv").unlink()  # else rows of former configurations would stay
        record.write(NAME, others, RELEASES)
        print(f"written: {record.write(NAME, made, RELEASES)}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
