"""Every kernel of the CUDA extension, on every architecture of its binary: registers, spills, shared memory, and which instructions it got.

    python -m benchmarks.compiled.cuda_compile             # of the installed extension: writes results/cuda_compile.csv; fails on a fault
    python -m benchmarks.compiled.cuda_compile --check     # against the committed table

No GPU is needed, and nothing here says how fast a kernel is. It reads with NVIDIA's cuobjdump, which comes with Triton and with CUDA.
"""

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import record

NAME = "cuda_compile"
KEY = ("target", "kernel")
SWEEPS = ("sweep_mma", "sweep_wgmma")  # in the order of sweep.h: enum class Instructions
TARGETS = ("sm_80", "sm_90a", "sm_100")
REGISTERS_APART = 24  # that a check tolerates; another release of the assembler shifts a few
# What is counted in machine code.
INSTRUCTIONS = {
    "loads_128": r"\bLDG\.E(\.\w+)*\.128\b",
    "stores_128": r"\bSTG\.E(\.\w+)*\.128\b",
    "shared_128": r"\bLDS\.128\b",
    "cluster_barriers": r"\bUCGABAR_(ARV|WAIT)\b",
    "mma": r"\bHMMA\b",
    "ldmatrix": r"\bLDSM\b",
    "copies_128": r"\bLDGSTS\.E(\.\w+)*\.128\b",
    "wgmma": r"\bHGMMA\b",
    "tma_loads": r"\bUTMALDG\b",
    "mbarriers": r"\bSYNCS\b",
    "register_moves": r"\bUSETMAXREG\b",
    "local": r"\b(STL|LDL)\b",
}


def extension() -> Path | None:
    """The binary that is installed."""
    found = importlib.util.find_spec("distill_kernels._cuda")
    return None if found is None else Path(found.origin)


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton is not None else []
    places = os.pathsep.join([*map(str, folders), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("cuobjdump", path=places)


def _said(*arguments) -> str:
    return subprocess.run([cuobjdump(), *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def short(mangled: str) -> str:
    """"row_kernel forward_kl" of the name that the linker knows: the kernel, and the types that it is a template over."""
    of = [word for word in _identifiers(mangled.partition("EEv")[0]) if word not in ("distill_kernels", "cuda") and "_GLOBAL_" not in word]
    if f"{of[0]}I" not in mangled:
        return of[0]
    element = re.search(rf"{of[0]}I([ft])E", mangled)
    return " ".join([*of, *([{"f": "float", "t": "uint16_t"}[element[1]]] if element else [])])


def _identifiers(mangled: str) -> list[str]:
    """Those that a mangled name spells out, each behind its length."""
    found, at, number = [], 0, re.compile(r"\d+")
    while match := number.search(mangled, at):
        length, at = int(match[0]), match.end()
        word = mangled[at : at + length]
        if len(word) == length and re.fullmatch(r"[A-Za-z_]\w*", word):
            found.append(word)
            at += length
    return found


def resources(binary: Path) -> dict[tuple[str, str], dict]:
    """Registers, bytes of stack and of static shared memory by (target, mangled name). The stack is where spilled registers lie."""
    found, target, name = {}, None, None
    for line in _said("--dump-resource-usage", binary).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            target = match[1]
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            found[target, name] = {"registers": registers, "stack": stack, "shared": shared}
    return found


def instructions(binary: Path, target: str, mangled: str) -> dict:
    code = _said("-sass", "-arch", target, "-fun", mangled, binary)
    return {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}


@functools.cache
def _loaded(binary: Path):
    spec = importlib.util.spec_from_file_location("distill_kernels._cuda", binary)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def launched_with(binary: Path, kernel: str) -> int:
    """Bytes of shared memory that a launch gives a block beside the static ones; to the row kernel at least, more where it holds logits."""
    kernels = _loaded(binary)
    name, takes, *_ = [*kernel.split(), ""]
    if name in SWEEPS:
        return kernels.sweep_shared_bytes(SWEEPS.index(name), takes == "TakesTotals")
    return kernels.board_bytes if name == "row_kernel" else 0


def table(binary: Path, wanted: str = "") -> list[dict]:
    """A row for each kernel whose short name matches `wanted`, and each target."""
    kernels = {key: row for key, row in resources(binary).items() if re.search(wanted, short(key[1]))}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        counted = pool.map(lambda key: instructions(binary, *key), kernels)
    rows = [
        {"target": target, "kernel": short(name)} | row | {"dynamic_shared": launched_with(binary, short(name))} | n
        for ((target, name), row), n in zip(kernels.items(), counted, strict=True)
    ]
    return sorted(rows, key=lambda row: (row["kernel"], row["target"]))


# By kernel and target, what has to be there: the instructions that it was written for.
PROMISED = [
    (r"^row_kernel", r"", ("loads_128", "stores_128", "shared_128")),
    (r"^row_kernel", r"^sm_(90a|100)$", ("cluster_barriers",)),
    (r"^sweep_mma ", r"", ("mma", "ldmatrix", "copies_128")),
    (r"^sweep_wgmma ", r"^sm_90a$", ("wgmma", "tma_loads", "mbarriers", "register_moves")),
    (r"^gather_rows_kernel uint4|^scatter_rows_kernel float4", r"", ("loads_128", "stores_128")),
]


def faults(row: dict) -> list[str]:
    """What is wrong with a row, in words."""
    found = []
    if row["stack"] or row["local"]:
        found.append(f"spills: {row['stack']} bytes of stack, {row['local']} instructions on local memory")
    for kernel, target, names in PROMISED:
        if re.search(kernel, row["kernel"]) and re.search(target, row["target"]):
            found += [f"has no {name} ({INSTRUCTIONS[name]})" for name in names if not row[name]]
    return found


def differences(row: dict, committed: dict) -> list[str]:
    """How a row differs from the committed one, whose values are text."""
    found = [f"{name} were {committed[name]}, are {row[name]}" for name in INSTRUCTIONS if bool(row[name]) != bool(int(committed[name]))]
    if abs(row["registers"] - int(committed["registers"])) > REGISTERS_APART:
        found.append(f"registers were {committed['registers']}, are {row['registers']}")
    if row["dynamic_shared"] != int(committed["dynamic_shared"]):
        found.append(f"bytes of dynamic shared memory were {committed['dynamic_shared']}, are {row['dynamic_shared']}")
    return found


def complaints(made: list[dict], known: dict[tuple, dict] | None) -> list[str]:
    """Everything wrong, a line each; `known` is the committed table by KEY, if it is to agree."""
    wrong = []
    for row in made:
        key = tuple(row[column] for column in KEY)
        words = faults(row)
        if known is not None:
            words += differences(row, known[key]) if key in known else ["is not in the committed table"]
        wrong += [f"{', '.join(key)}: {word}" for word in words]
    return wrong


def committed() -> dict[tuple, dict]:
    return {tuple(row[column] for column in KEY): row for row in record.read(NAME)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--binary", type=Path, help="another than the installed extension")
    given = parser.parse_args()
    binary = given.binary or extension()
    if binary is None or cuobjdump() is None:
        parser.error("there is no compiled extension distill_kernels._cuda" if binary is None else "there is no cuobjdump")
    made = table(binary)
    wrong = complaints(made, committed() if given.check else None)
    if not given.check:
        (record.RESULTS / f"{NAME}.csv").unlink(missing_ok=True)  # kernels that are gone leave no row
        print(record.write(NAME, made, KEY))
    print(f"{len(made)} kernels, most registers {max(row['registers'] for row in made)}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
