"""The table of a GPU run, as plain text."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]


def table(record: Record) -> str:
    """Return machine, correctness, layers, steps and what failed, of results in the making."""
    sections = record["sections"]
    machine = {key: value for part in sections.get("machine", ()) for key, value in part.items()}
    parts = [
        f"GPU run of {record['date']}",
        "\n".join(f"  {key}: {_short(value)}" for key, value in machine.items()),
        _correct(sections.get("correct", ())),
        _layers(sections.get("layers", ())),
        _steps(sections.get("steps", ())),
        _choices(sections.get("choices", ())),
        _failures(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _correct(records: Iterable[Record]) -> str:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    worst: dict[str, float] = defaultdict(float)
    for record in records:
        if "begun" in record or "kernel" not in record:
            continue
        name = record["kernel"]
        outcome = "none" if "none" in record else "passed" if record.get("passed") else "failed"
        counts[name][outcome] += 1
        if record.get("allowed"):
            worst[name] = max(worst[name], record["error"] / record["allowed"])
    rows = [
        (name, *(count[key] for key in ("passed", "failed", "none")), f"{worst[name]:.2f}")
        for name, count in sorted(counts.items())
    ]
    head = ("kernel", "passed", "failed", "no form", "largest error / allowed")
    return _rows("Kernels against float64", head, rows)


def _layers(records: Iterable[Record]) -> str:
    rows = []
    for record in records:
        if "method_s" not in record:
            continue
        parts = " ".join(
            f"{part['operator'].partition(':')[2]} {1e6 * part['s']:.0f}"
            for part in record["parts"]
        )
        rows.append(
            (
                "x".join(map(str, record["shape"])), record["dtype"], record["gradient"],
                record["method"], f"{1e6 * record['exact_s']:.1f}",
                f"{1e6 * record['predicted_exact_s']:.1f}", f"{1e6 * record['method_s']:.1f}",
                f"{1e6 * record['predicted_method_s']:.1f}", f"{record['times_faster']:.2f}",
                f"{record['difference']:.1e}", parts,
            )
        )  # fmt: skip
    head = (
        "Ci x Co x side x kernel x stride", "dtype", "gradient", "method", "exact us", "predicted",
        "us", "predicted", "times faster", "difference", "operators us",
    )  # fmt: skip
    return _rows("Gradients of layers, batch 128, channels_last, as CUDA graphs", head, rows)


def _steps(records: Iterable[Record]) -> str:
    rows = [
        (
            record["model"], record["dtype"], record["setting"], f"{1e3 * record['step_s']:.2f}",
            _times(record), _predicted(record), f"{record['compile_s']:.0f}",
            record.get("approximated", ""), f"{record['losses'][-1]:.3f}",
            f"{record.get('peak_memory_bytes', 0) / 1e9:.2f}",
        )
        for record in records
        if "step_s" in record
    ]  # fmt: skip
    head = ("model", "dtype", "setting", "step ms", "times faster", "predicted", "compile s",
            "products", "loss", "GB")  # fmt: skip
    return _rows("Training steps", head, rows)


def _choices(records: Iterable[Record]) -> str:
    """Return how often each kind of way was the fastest, by kernel."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    worst: dict[str, float] = defaultdict(lambda: 1.0)
    for record in records:
        if "fastest" not in record:
            continue
        name, fastest, seconds = record["kernel"], record["fastest"], record["seconds"]
        kind = "torch" if fastest == "torch" else "other"
        counts[name]["predicted" if fastest == record["predicted"] else kind] += 1
        if record["predicted"] in seconds:
            lost = seconds[record["predicted"]] / seconds[fastest]
            worst[name] = max(worst[name], lost)
    rows = [
        (name, *(count[kind] for kind in ("predicted", "other", "torch")), f"{worst[name]:.2f}")
        for name, count in sorted(counts.items())
    ]
    head = ("kernel", "predicted tile", "another tile", "plain torch", "largest loss if not timed")
    return _rows("Which way was fastest, by kernel and shape", head, rows)


def _times(record: Record) -> str:
    if "inductor_s" not in record or record["beside"] == record["setting"]:
        return ""
    return f"{record['inductor_s'] / record['step_s']:.2f}"


def _predicted(record: Record) -> str:
    """Return how many times faster a step was predicted to be, its optimizer left out."""
    if "predicted_step_s" not in record:
        return ""
    return f"{record['predicted_exact_s'] / record['predicted_step_s']:.2f}"


def _failures(record: Record) -> str:
    lines = [
        f"{' '.join(process['arguments'])}: {_last(process['failed'])}"
        for process in record["processes"]
        if process["failed"]
    ]
    for name, records in record["sections"].items():
        for entry in records:
            if entry.get("failed") or entry.get("passed") is False or entry.get("warnings"):
                label = {key: entry[key] for key in
                         ("kernel", "sample", "form", "row", "method", "program", "trace", "model",
                          "dtype", "setting") if key in entry}  # fmt: skip
                why = entry.get("failed") or entry.get("warnings") or f"error {entry['error']:.1e}"
                lines.append(f"{name} {label}: {_last(str(why))}")
    return "Failed:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""


def _rows(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    texts = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    ]
    return "\n".join((title, *lines))


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _last(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
