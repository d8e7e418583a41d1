"""Whole training steps against Inductor, in turns in one process.

    python -m benchmarks.steps                       # ResNet-20 and VGG-19
    python -m benchmarks.steps --models resnet20 --rounds 10 --dtype bf16

Beside every saving stands the Amdahl ceiling: what the step would save if the approximated
products took no time at all, from their measured time. `switching` compares the same two variants
in the same numbers, alternating on every step and in long blocks: the difference is what a switch
costs.
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
from benchmarks.timing import gate, interleave, ratio, write_results
from examples.models import build

BATCH = 128
# The schedules repeat after at most four steps: a turn sees each of them whole.
STEPS_A_TURN = 4
BLOCK = 8

Step = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is compared: a method on every convolution but the first, under a schedule."""

    method: str
    schedule: str

    @property
    def name(self) -> str:
        """Label of the row."""
        return f"{self.method}/{self.schedule}"


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
        models[name] = measure(name, given)
        console.print(_table(name, models[name], given))
    record: dict[str, Any] = {"batch": BATCH, "dtype": given.dtype, "nchw": given.nchw}
    if given.switching:
        record["switching"] = switching_cost(given)
        console.print(f"switching: {record['switching']}")
    path = write_results(given.output, {**record, "models": models})
    console.print(f"written to {path}")


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return step times, savings and ceilings of one model."""
    exact = make_step(name, given, None)
    runs = {"inductor": exact}
    reports = {}
    for setting in SETTINGS:
        runs[setting.name] = make_step(name, given, setting)
        reports[setting.name] = graphpass.reports()[-1]
    rounds = given.rounds if name.startswith("resnet") else max(given.rounds // 3, 6)
    seconds = interleave(runs, rounds, STEPS_A_TURN)
    exact_s = statistics.median(seconds["inductor"])
    rows = {}
    for setting in SETTINGS:
        share = _selected_share(reports[setting.name], name, given) / exact_s
        taken = ratio(seconds[setting.name], seconds["inductor"])
        rows[setting.name] = {
            "median_s": statistics.median(seconds[setting.name]),
            "time_ratio": taken,
            "saved_percent": 100 * (1 - taken["median"]),
            "ceiling_percent": 100 * share,
            "approximated_layers": len(reports[setting.name].approximated),
            "saved_for_backward_bytes": {
                "exact": reports[setting.name].exact_saved_bytes,
                "planned": reports[setting.name].planned_saved_bytes,
            },
        }
    return {"exact_s": exact_s, "rounds": rounds, "settings": rows}


def make_step(name: str, given: argparse.Namespace, setting: Setting | None) -> Step:
    """Return a compiled training step that has run every variant of its schedule once."""
    options: dict[str, Any] = {"strict": True}
    if setting is not None:
        model = _model(name, given)
        options |= {"methods": _methods(model, setting.method), "schedule": setting.schedule}
    return _stepper(name, given, options if setting is not None else None)


def switching_cost(given: argparse.Namespace) -> dict[str, float]:
    """Return what one switch between two variants costs, as a share of a ResNet-20 step."""
    methods = _methods(_model("resnet20", given), "zero")
    rules = {
        "alternating": graphpass.Schedule("alternating", every_step=2),
        "blocks": graphpass.Schedule("blocks", rule=lambda _, step: step // BLOCK % 2 == 0),
    }
    runs = {
        name: _stepper("resnet20", given, {"methods": methods, "schedule": rule, "strict": True})
        for name, rule in rules.items()
    }
    # A turn is a whole period of the longer rule: both run each variant equally often.
    seconds = interleave(runs, given.rounds, 2 * BLOCK)
    # Alternating switches on every step, blocks on every BLOCK-th.
    extra = ratio(seconds["alternating"], seconds["blocks"])
    switches = 1 - 1 / BLOCK
    return {
        "percent_of_step": 100 * (extra["median"] - 1) / switches,
        "low_quartile": 100 * (extra["low_quartile"] - 1) / switches,
        "high_quartile": 100 * (extra["high_quartile"] - 1) / switches,
    }


def _stepper(name: str, given: argparse.Namespace, options: dict[str, Any] | None) -> Step:
    # Models of one class share their code: without this, one of them would be recompiled over
    # and over, or run eagerly, once Dynamo's limit for that code is reached.
    torch._dynamo.config.recompile_limit = 64
    model = _model(name, given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    backend = "inductor" if options is None else "approx"
    compiled = torch.compile(model, backend=backend, options=options)
    images = torch.randn(BATCH, 3, 32, 32)
    if not given.nchw:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=given.dtype == "bf16")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()

    for _ in range(2 * BLOCK):
        step()
    return step


def _model(name: str, given: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = build(name)
    return model if given.nchw else model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _methods(model: nn.Module, method: str) -> dict[str, str]:
    """Name every convolution but the first, as in the paper."""
    names = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return dict.fromkeys(names[1:], method)


def _selected_share(report: graphpass.Report, name: str, given: argparse.Namespace) -> float:
    """Return the seconds that the approximated weight gradients take in an average exact step."""
    schedule = graphpass.Schedule.named(report.schedule)
    model = _model(name, given)
    shapes = _convolution_shapes(model, given)
    total = 0.0
    for row in report.approximated:
        steps = range(STEPS_A_TURN)
        often = sum(schedule.selects(row.layer, step) for step in steps) / STEPS_A_TURN
        total += often * _weight_grad_s(shapes[row.where], given.dtype, given.nchw)
    return total


Convolution = tuple[tuple[int, ...], tuple[int, ...], int, int]


def _convolution_shapes(model: nn.Module, given: argparse.Namespace) -> dict[str, Convolution]:
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


def _table(name: str, result: dict[str, Any], given: argparse.Namespace) -> Table:
    layout = "NCHW" if given.nchw else "channels_last"
    table = Table(
        title=f"{name}, batch {BATCH}, {given.dtype}, {layout}, {given.threads} threads; "
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
    parser.add_argument("--rounds", type=int, default=30, help="turns; a third for larger models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--nchw", action="store_true", help="instead of channels_last")
    parser.add_argument("--switching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--no-gate", action="store_true", help="do not run the contract tests first"
    )
    parser.add_argument("--output", default="steps", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
