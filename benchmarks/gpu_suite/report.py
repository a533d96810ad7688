"""A table and a picture of what a journal holds, whole or cut off."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_suite.journal import Record

WORDS = {"FAIL": "is wrong", "ERROR": "did not run"}
TABLE, PICTURE = "report.txt", "report.png"


def headline_of(record: Record) -> str | None:
    """What is printed of a record the moment it is known, if anything."""
    kind, at = record.get("kind"), f"{record.get('at', 0):6.1f} s  "
    if kind == "stage":
        return f"{at}{record['stage']}: {record['ended']}"
    if kind == "verdict":
        return f"{at}{record['stage']}: {record['verdict']} {record.get('variant', '')} {_errors(record)}{record.get('why', '')}".rstrip()
    if kind == "rate":
        return f"{at}{record['what']}: {_rate(record)}"
    if kind == "time" and record["rounds"] > 1:
        return f"{at}{record['stage']}: {record['variant']} {record['milliseconds']:.3f} ms, {record['to_products']:.2f} of the products"
    return f"{at}stopped: {record['why']}" if kind == "stopped" else None


def failures(records: Sequence[Record]) -> list[str]:
    """What did not go as it should, a line each."""
    found = [f"{r['stage']}: {r['ended']}{_last_line(r)}" for r in _of(records, "stage") if r["ended"] != "done"]
    found += [
        f"{r['stage']}: {r.get('variant', r.get('case'))} {WORDS[r['verdict']]}: {_errors(r)}{r.get('why', '')}"
        for r in _of(records, "verdict")
        if r["verdict"] in WORDS
    ]
    found += [f"{r['test']}: {r['outcome']}" for r in _of(records, "test") if r["outcome"] not in ("passed", "skipped")]
    found += [f"{r['what']}: {r['reason']}" for r in _of(records, "profile") if "reason" in r]
    return found + [f"stopped: {r['why']}" for r in _of(records, "stopped")]


def _of(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record.get("kind") == kind]


def _last_line(record: Record) -> str:
    lines = record.get("said", "").strip().splitlines()
    return f" — {lines[-1]}" if lines else ""


def _errors(record: Record) -> str:
    names = {"value": "value_error", "gradients": "gradient_error", "worst row": "row_error"}
    said = [f"{word} {record[name]:.1e}" for word, name in names.items() if isinstance(record.get(name), float)]
    said += [f"{word} {record[name]}" for word, name in names.items() if isinstance(record.get(name), str)]
    return ", ".join(said) + (" " if said else "")


def _rate(record: Record) -> str:
    if "why" in record:
        return record["why"]
    return f"{record['tflops']:.4g} TFLOP/s" if "tflops" in record else f"{record['gbps']:.4g} GB/s"


def timings(records: Sequence[Record]) -> list[Record]:
    """The last word on each variant, with what it is of the ceilings (of_cublas, of_copy) where those were measured."""
    last = {(r["comparison"], r["variant"]): r for r in _of(records, "time")}
    rates = {r["what"]: r for r in _of(records, "rate")}
    eager = {r["comparison"]: r["milliseconds"] for r in last.values() if r["variant"].startswith("eager")}
    verdicts = {(r["comparison"], r["variant"]): r for r in _of(records, "verdict") if "comparison" in r}
    found = []
    for key, time in last.items():
        row = dict(time)
        if (products := rates.get(f"products, {time['dtype']}")) is not None:
            row["of_cublas"] = time["tflops"] / products["tflops"]
        if (copy := rates.get("copy")) is not None:
            row["of_copy"] = time["gbps"] / copy["gbps"]
        if time["comparison"] in eager:
            row["to_eager"] = time["milliseconds"] / eager[time["comparison"]]
        row["gradient_error"] = verdicts.get(key, {}).get("gradient_error")
        found.append(row)
    return found


def table(records: Sequence[Record]) -> str:
    lines = []
    for machine in _of(records, "machine"):
        named = ("gpu", "torch", "triton", "cuda", "python", "extension", "bundle", "liger-kernel", "cut-cross-entropy")
        lines += ["machine  " + ", ".join(f"{name} {machine[name]}" for name in named if machine.get(name) is not None)]
    lines += ["", "right or not"]
    for r in _of(records, "verdict"):
        if "comparison" not in r:
            lines.append(f"  {r['case']:32} {r['verdict']:9} {_errors(r)}{r.get('why', '')}")
    lines += ["", "ceilings and row kernels"]
    lines += [f"  {r['what']:40} {_rate(r)}" for r in _of(records, "rate")]
    head = f"{'ms':>9} {'÷products':>9} {'÷eager':>7} {'TFLOP/s':>8} {'of cuBLAS':>9} {'of copy':>8} {'MiB':>8} {'error':>8}"
    head += f" {'MHz':>5} {'°C':>3}"
    lines += ["", f"  {'comparison':26} {'variant':22} {head}"]
    for r in timings(records):
        figures = [
            (r["milliseconds"], "9.3f"), (r["to_products"], "9.2f"), (r.get("to_eager"), "7.2f"), (r["tflops"], "8.1f"),
            (r.get("of_cublas"), "9.1%"), (r.get("of_copy"), "8.1%"), (r.get("peak_mib"), "8.0f"), (r.get("gradient_error"), "8.1e"),
            (r.get("sm_mhz"), "5.0f"), (r.get("celsius"), "3.0f"),
        ]  # fmt: skip
        lines.append(f"  {r['comparison']:26} {r['variant']:22} " + " ".join(_figure(value, form) for value, form in figures))
    refused = [r for r in _of(records, "verdict") if "comparison" in r and r["verdict"] != "PASS"]
    lines += [f"  {r['comparison']:26} {r['variant']:22} not timed: {r['verdict']} {_errors(r)}{r.get('why', '')}" for r in refused]
    outcomes: dict[str, int] = {}
    for r in _of(records, "test"):
        outcomes[r["outcome"]] = outcomes.get(r["outcome"], 0) + 1
    lines += ["", "own tests: " + (", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "none")]
    if counters := _of(records, "profile"):
        lines += ["", "profile"] + [f"  {r['what']}: {r.get('words', r.get('reason', ''))}" for r in counters]
    wrong = failures(records)
    return "\n".join([*lines, "", f"{len(wrong)} things went wrong" if wrong else "nothing went wrong", *(f"  {line}" for line in wrong)])


def _figure(value: float | str | None, form: str) -> str:
    width = int(form.split(".")[0])
    return f"{value:{form}}" if isinstance(value, int | float) else f"{value or '':>{width}}"


def write(records: Sequence[Record], out: Path) -> str:
    """The table, also as a file, and the picture beside it; what cannot be written is said in its place."""
    text = table(records)
    try:
        (out / TABLE).write_text(text + "\n")
        picture(records, out / PICTURE)
    except (OSError, ImportError) as error:
        text += f"\nnot written: {error}"
    return text


def picture(records: Sequence[Record], path: Path) -> None:
    """Each variant's time as a multiple of the matrix products alone, which nothing exact is faster than."""
    rows = [r for r in timings(records) if r["variant"] != "products"]
    if not rows:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{r['comparison']}: {r['variant']}" for r in rows]
    colours = ["tab:blue" if not r["variant"].startswith(("eager", "liger", "cce", "torch")) else "tab:gray" for r in rows]
    bars = axes.barh(range(len(rows)), [r["to_products"] for r in rows], color=colours)
    axes.bar_label(bars, [f"{r['milliseconds']:.2f} ms" for r in rows], padding=3, fontsize=7)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time ÷ the matrix products alone")
    figure.savefig(path, dpi=120)
