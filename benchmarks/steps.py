"""Whole training steps against Inductor, in turns in one process.

    python -m benchmarks.steps                       # ResNet-20 and VGG-19
    python -m benchmarks.steps --models resnet20 --rounds 10 --dtype bf16

Beside every saving stands the Amdahl ceiling: what the step would save if the approximated
products took no time at all, from their measured time.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import graphpass
from benchmarks.timing import gate, interleave, paired, ratio, write_results
from benchmarks.training_step import BATCH, Case, make_step

# The schedules repeat after at most four steps: a turn sees a whole period.
PERIOD = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """What is compared: a method on every convolution but the first, under a schedule."""

    method: str
    schedule: str

    @property
    def name(self) -> str:
        """Label of the row."""
        return f"{self.method}/{self.schedule}"

    @classmethod
    def named(cls, name: str) -> "Setting":
        """Return the setting with this label."""
        return cls(*name.split("/"))


SETTINGS = tuple(
    Setting(*pair)
    for pair in (
        ("zero", "ga-1"),
        ("zero", "ga-2"),
        ("zero", "ga-3"),
        ("random", "ga-1"),
        ("topk", "ga-1"),
        ("topk", "ga-3"),
        ("topk", "always"),
    )
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the results."""
    given = _parse(argv)
    torch.set_num_threads(given.threads)
    if not given.no_gate:
        gate()
    models = {}
    console = Console()
    for name in given.models:
        case = Case(name, given.dtype, given.nchw)
        models[name] = measure(case, given.settings, given.rounds)
        console.print(_table(case, models[name], given.threads))
    record: dict[str, Any] = {"batch": BATCH, "dtype": given.dtype, "nchw": given.nchw}
    path = write_results(given.output, {**record, "models": models})
    console.print(f"written to {path}")


def measure(case: Case, settings: Sequence[Setting], rounds: int) -> dict[str, Any]:
    """Return step times, savings and ceilings of one model."""
    runs, reports = {}, {}
    # As in the paper, the first convolution stays exact.
    layers = case.convolutions()[1:]
    for setting in settings:
        methods = dict.fromkeys(layers, setting.method)
        options = {"methods": methods, "schedule": setting.schedule, "strict": True}
        runs[setting.name] = make_step(case, options)
        reports[setting.name] = graphpass.reports()[-1]
    rounds = rounds if case.name.startswith("resnet") else max(rounds // 2, 6)
    seconds = paired(make_step(case, None), runs, rounds, repeat=PERIOD)
    exact_s = statistics.median(base for _, bases in seconds.values() for base in bases)
    rows = {}
    for name, (mine, bases) in seconds.items():
        report, taken = reports[name], ratio(mine, bases)
        rows[name] = {
            "median_s": statistics.median(mine),
            "time_ratio": taken,
            "saved_percent": 100 * (1 - taken["median"]),
            "ceiling_percent": 100 * _selected_share(report, case) / exact_s,
            "approximated_layers": len(report.approximated),
            "saved_for_backward_bytes": {
                "exact": report.exact_saved_bytes,
                "planned": report.planned_saved_bytes,
            },
        }
    return {"exact_s": exact_s, "rounds": rounds, "settings": rows}


def _selected_share(report: graphpass.Report, case: Case) -> float:
    """Return the seconds that the approximated weight gradients take in an average exact step."""
    schedule = graphpass.Schedule.named(report.schedule)
    shapes = _convolution_shapes(case.model())
    total = 0.0
    for row in report.approximated:
        steps = range(PERIOD)
        often = sum(schedule.selects(row.layer, step) for step in steps) / PERIOD
        total += often * _weight_grad_s(shapes[row.where], case.dtype, case.nchw)
    return total


Convolution = tuple[tuple[int, ...], tuple[int, ...], int, int]


def _convolution_shapes(model: nn.Module) -> dict[str, Convolution]:
    """Return input shape, weight shape, stride and padding of every convolution."""
    shapes: dict[str, Convolution] = {}

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, _: Any) -> None:
            assert isinstance(module, nn.Conv2d)
            padding = int(module.padding[0])
            shapes[path] = (
                tuple(inputs[0].shape), tuple(module.weight.shape), module.stride[0], padding
            )  # fmt: skip

        return note

    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook(path))
    with torch.no_grad():
        model.eval()(torch.zeros(BATCH, 3, 32, 32))
    return shapes


@cache
def _weight_grad_s(shape: Convolution, dtype: str, nchw: bool) -> float:
    """Return the seconds of the exact weight gradient, as part of the fused backward call."""
    x_shape, w_shape, stride, padding = shape
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    memory = torch.contiguous_format if nchw else torch.channels_last
    x = torch.randn(x_shape).to(kind, memory_format=memory)
    weight = torch.randn(w_shape).to(kind, memory_format=memory)
    grad = torch.randn_like(F.conv2d(x, weight, None, stride, padding), memory_format=memory)

    def backward(mask: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, mask
        )

    runs = {"both": backward([True, True, False]), "input": backward([True, False, False])}
    for run in runs.values():
        run()
    seconds = interleave(runs, rounds=25, repeat=2)
    return statistics.median(seconds["both"]) - statistics.median(seconds["input"])


def _table(case: Case, result: dict[str, Any], threads: int) -> Table:
    layout = "NCHW" if case.nchw else "channels_last"
    table = Table(
        title=f"{case.name}, batch {BATCH}, {case.dtype}, {layout}, {threads} threads; "
        f"Inductor {1e3 * result['exact_s']:.1f} ms a step"
    )
    for column in ("method/schedule", "layers", "saved %", "quartiles", "ceiling %"):
        table.add_column(column)
    for setting, row in result["settings"].items():
        taken = row["time_ratio"]
        spread = (
            f"{100 * (1 - taken['high_quartile']):.1f} to {100 * (1 - taken['low_quartile']):.1f}"
        )
        table.add_row(
            setting,
            str(row["approximated_layers"]),
            f"{row['saved_percent']:.1f}",
            spread,
            f"{row['ceiling_percent']:.1f}",
        )
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet20", "vgg19"])
    parser.add_argument("--rounds", type=int, default=30, help="turns; half for larger models")
    parser.add_argument("--settings", nargs="+", type=Setting.named, default=SETTINGS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--nchw", action="store_true", help="instead of channels_last")
    parser.add_argument(
        "--no-gate", action="store_true", help="do not run the contract tests first"
    )
    parser.add_argument("--output", default="steps", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
