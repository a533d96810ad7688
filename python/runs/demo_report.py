"""What the demo leaves behind: the table, demo.json and curves.png."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_kernels.api.runs import output_folder
from distill_kernels.api.runs import report as told

FILES = ("demo.json", "curves.png")
ROWS = {
    "before": "student before",
    "ce": "student after cross entropy",
    "kd": "student after distillation",
    "teacher": "teacher",
}
LABELS = {"kd": "distillation", "ce": "cross entropy only"}


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Held-out quantities of the `evaluate` function, one line for each of ROWS."""
    return told.table({title: rows[name] for name, title in ROWS.items()})


def loss_step_table(benchmark: Mapping[str, Any]) -> str:
    lines = [
        f"One loss step (forward KL and its gradients, {benchmark['tokens']:,} tokens × {benchmark['vocabulary']:,} vocabulary, float32, "
        f"{benchmark['threads']} threads); gradients agree to {benchmark['gradient_difference']:.1e} of the largest",
        f"{'':28}{'median time':>22}{'peak memory above the inputs':>32}",
    ]
    for variant, title in (("fused", "distill_kernels"), ("eager", "eager torch")):
        peak = benchmark[variant]["peak_bytes"]
        memory = "not measured here" if peak is None else f"{peak / 2**20:,.0f} MiB"
        time = f"{benchmark[variant]['median_ms']:,.0f} ms"
        lines.append(f"{title:28}{time:>22}{memory:>32}")
    return "\n".join(lines)


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Both files, each whole or not at all."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    by_title = {name: {LABELS[run]: values for run, values in report[name].items()} for name in ("curves", "training_loss")}
    data, picture = FILES
    output_folder.write_files(
        folder, {data: lambda path: path.write_text(text, encoding="utf-8"), picture: lambda path: told.plot(path, **by_title)}
    )
