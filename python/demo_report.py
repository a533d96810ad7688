"""What the demo leaves behind: the table, demo.json and curves.png."""

import json
import math
import os
import tempfile
from pathlib import Path

from distill_kernels.api.user_error import UserError

FILES = ("demo.json", "curves.png")
ROWS = {
    "before": "student before",
    "ce": "student after cross entropy",
    "kd": "student after distillation",
    "teacher": "teacher",
}
COLOURS = {"kd": "#1b6ca8", "ce": "#d1752b"}
LABELS = {"kd": "distillation", "ce": "cross entropy only"}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Held-out quantities of the `evaluate` function, one line for each of ROWS."""
    lines = [f"{'held-out text':28}{'KL(teacher‖student)':>22}{'top-1 agreement':>18}{'perplexity':>14}"]
    for name, title in ROWS.items():
        row = rows[name]
        kl, agreement = f"{row['kl']:.3f} nats/token", f"{100 * row['top1_agreement']:.1f} %"
        lines.append(f"{title:28}{kl:>22}{agreement:>18}{row['perplexity']:>14,.1f}")
    return "\n".join(lines)


def loss_step_table(benchmark: dict) -> str:
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


def check_output(folder: Path) -> None:
    """Raises UserError unless `folder` can be written to; creates nothing."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        # Asking for permission bits is not enough: file systems may be read-only or full.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to: {existing}: {error.strerror}") from error
    for name in FILES:
        if (folder / name).is_dir():
            raise UserError(f"--output {folder} cannot be written to: {folder / name} is a folder")


def write(report: dict, folder: Path) -> None:
    """Both files, each whole or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".demo-") as staging:
            made = Path(staging)
            (made / "demo.json").write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
            _plot(report, made / "curves.png")
            for name in FILES:
                os.replace(made / name, folder / name)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to: {error.strerror}") from error


def _plot(report: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for run, points in report["curves"].items():
        steps = [point["step"] for point in points]
        left.plot(steps, [point["kl"] for point in points], "o-", color=COLOURS[run], label=f"{LABELS[run]}: held-out KL to the teacher")
        right.plot(steps, [100 * point["top1_agreement"] for point in points], "o-", color=COLOURS[run], label=LABELS[run])
        losses = report["training_loss"][run]
        left.plot(range(1, len(losses) + 1), losses, color=COLOURS[run], alpha=0.35, linewidth=1, label=f"{LABELS[run]}: training loss")
    values = [point["kl"] for points in report["curves"].values() for point in points]
    if min(values) > 0 and math.log10(max(values) / min(values)) > 0.5:
        left.set_yscale("log")
        # Powers of ten alone would leave most of these axes without a number.
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        left.yaxis.set_major_formatter(ScalarFormatter())
        left.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel("nats per token")
    right.set_ylabel("held-out top-1 agreement with the teacher, %")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
