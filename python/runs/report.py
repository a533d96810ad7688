"""Training runs, told: a table of held-out quantities, and a picture of loss and quantities over the steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

KL, AGREEMENT = "KL(teacher‖student)", "top-1 agreement"
COLOURS = ("#1b6ca8", "#d1752b", "#4b8b3b", "#8a4fa3")


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Quantities of `training.evaluate` by title; KL and agreement only if all rows have them."""
    taught = all("kl" in row for row in rows.values())
    lines = [f"{'held-out text':28}{f'{KL:>22}{AGREEMENT:>18}' if taught else ''}{'perplexity':>14}"]
    for title, row in rows.items():
        closeness = ""
        if taught:
            kl, agreement = f"{row['kl']:.3f} nats/token", f"{100 * row['top1_agreement']:.1f} %"
            closeness = f"{kl:>22}{agreement:>18}"
        lines.append(f"{title:28}{closeness}{row['perplexity']:>14,.1f}")
    return "\n".join(lines)


def plot(
    path: Path,
    curves: Mapping[str, Sequence[Mapping[str, float]]],  # by the run's title, what `evaluate` said at a "step"
    training_loss: Mapping[str, Sequence[float]],  # by the run's title, of every step
) -> None:
    """Writes a PNG: nats per token on the left, top-1 agreement (perplexity, where there was no teacher) on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    taught = all("kl" in point for points in curves.values() for point in points)
    values = []
    for (title, points), colour in zip(curves.items(), COLOURS, strict=False):
        steps = [point["step"] for point in points]
        nats = [point["kl"] if taught else math.log(point["perplexity"]) for point in points]
        values += nats
        left.plot(steps, nats, "o-", color=colour, label=f"{title}: held-out {'KL to the teacher' if taught else 'cross entropy'}")
        shown = [100 * point["top1_agreement"] if taught else point["perplexity"] for point in points]
        right.plot(steps, shown, "o-", color=colour, label=title)
        losses = training_loss[title]
        left.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.35, linewidth=1, label=f"{title}: training loss")
    if min(values) > 0 and math.log10(max(values) / min(values)) > 0.5:
        left.set_yscale("log")
        # Powers of ten alone would leave most of these axes without a number.
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        left.yaxis.set_major_formatter(ScalarFormatter())
        left.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel("nats per token")
    right.set_ylabel("held-out top-1 agreement with the teacher, %" if taught else "held-out perplexity")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
