"""Where results go: one CSV for each benchmark and machine, and what machine that was."""

import csv
import platform
import statistics
from pathlib import Path

import torch

from distill_kernels.backends import native

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{fields.get('model name', platform.machine())} family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"


def machine() -> dict:
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instruction_set": (native.instruction_sets() or ["none"])[0],
    }


def quartiles(samples) -> dict:
    """Median and the band of the middle half."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"median": middle, "quartile_1": low, "quartile_3": high, "rounds": len(samples)}


def read(name: str) -> list[dict]:
    """The rows of results/NAME.csv, text as it stands there."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: list[dict], key: tuple[str, ...]) -> Path:
    """Writes results/NAME.csv, one row a measurement, each with the machine it was made on.

    Rows that are there already stay, unless one of the same `key` columns replaces them: a run of a part does not undo the whole.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.csv"
    here = machine()

    def written(value):
        return f"{value:.6g}" if isinstance(value, float) else value

    fresh = {tuple(str(written(row[column])) for column in key) for row in rows}
    if path.exists():
        rows = [row for row in read(name) if tuple(row[column] for column in key) not in fresh] + [row | here for row in rows]
    columns = list(dict.fromkeys(column for row in [*rows, here] for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: written(value) for key, value in (here | row).items()} for row in rows)
    return path
