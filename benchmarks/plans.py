"""Whole training steps against Inductor, under the planner's choice and plans made by hand.

    python -m benchmarks.plans
    python -m benchmarks.plans --models resnet20 --plans int8 --dtype bf16 --profile
    python -m benchmarks.plans --models mlp --plans "crs-topk 0.5" --output plans-recipes

A plan by hand names methods for all layers but the first; what a method refuses stays exact. "auto"
is the backend without any options, and "tau 0.1" its choice for that budget, both on the prices of
`python -m graphpass calibrate` and on priors of noise; with "forward" it may choose for forward
products too. `--profile` says where the time of a step goes, exact and planned, in the table and in
the results.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import graphpass
from benchmarks.timing import paired, ratio, read_results, write_results
from benchmarks.training_step import BATCH, Case, Step, make_step
from graphpass.timing import keep_memory

_PROFILED = 3
_OPERATORS = 14

MODELS = ("resnet20", "vgg19", "resnet18", "wrn-16-4", "vit", "mlp")
Specs = list[dict[str, Any]]


def _every(name: str, *gradients: str) -> Specs:
    return [{"name": name, "gradient": gradient} for gradient in gradients]


BACKWARD = ("weight", "input")
# A list names methods; options leave the choice to the planner.
PLANS: dict[str, Specs | dict[str, Any]] = {
    "auto": {"budget": "auto"},
    "tau 0.02": {"budget": 0.02},
    "tau 0.1": {"budget": 0.1},
    "tau 0.3": {"budget": 0.3},
    # Errors of forward products make every gradient a biased one: by this part of its square.
    "tau 0.1, forward": {"budget": 0.1, "gradients": (*BACKWARD, "forward"), "max_bias": 0.01},
    "bf16": _every("bf16", "forward", *BACKWARD),
    "int8": _every("int8", *BACKWARD),
    "int8, bf16 forward": _every("int8", *BACKWARD) + _every("bf16", "forward"),
    "int8, forward too": _every("int8", "forward", *BACKWARD),
    "prune": _every("prune", *BACKWARD),
    "prune, bf16 forward": _every("prune", *BACKWARD) + _every("bf16", "forward"),
    "int8 input, pixels weight, bf16 forward": [
        *_every("int8", "input"),
        *_every("pixels", "weight"),
        *_every("bf16", "forward"),
    ],
    "pixels": _every("pixels", "weight"),
    "topk": _every("topk", "weight"),
}
# Smaller dense products by the papers' recipes, of half of the channels or columns; for those who
# ask for them.
RECIPES = {
    "crs-topk 0.5": graphpass.recipe("crs-topk", keep=0.5),
    # Of a perceptron, the first layer is most of it.
    "crs-topk 0.5, first layer too": graphpass.recipe("crs-topk", keep=0.5)
    | {"schedule": "always"},
    "swat-channels 0.5": graphpass.recipe("swat-channels", sparsity=0.5),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write the results."""
    given = _parse(argv)
    torch.set_num_threads(given.threads)
    console = Console()
    record = read_results(given.output)["models"] if given.add else {}
    for name in given.models:
        case = Case(name, given.dtype, given.nchw, given.batch)
        record[name] = measure(case, given)
        console.print(_table(case, record[name]))
        # A model takes minutes: what is measured is kept whatever becomes of the next one.
        described = {
            "batch": given.batch,
            "dtype": given.dtype,
            "nchw": given.nchw,
            "models": record,
        }
        console.print(f"written to {write_results(given.output, described)}")


def measure(case: Case, given: argparse.Namespace) -> dict[str, Any]:
    """Return step times of one model under every plan."""
    # What is profiled is to be what is timed: page faults would count as the operator's time.
    keep_memory()
    runs: dict[str, Step] = {}
    reports = {}
    exact = make_step(case, None)
    for plan in given.plans:
        runs[plan] = make_step(case, options_of(case, (PLANS | RECIPES)[plan]))
        reports[plan] = graphpass.reports()[-1]
    profiles = {}
    if given.profile:
        profiles = {name: _profile(run) for name, run in {"inductor": exact, **runs}.items()}
        Console().print(_profile_table(case, profiles))
    seconds = paired(exact, runs, given.rounds, given.repeat)
    exact_s = statistics.median(base for _, bases in seconds.values() for base in bases)
    rows = {}
    for name, (mine, bases) in seconds.items():
        rows[name] = {
            "median_s": statistics.median(mine),
            "speedup": ratio(bases, mine),
            "approximated_sites": len(reports[name].approximated),
            "methods": Counter(row.method for row in reports[name].approximated),
            "sites": len(reports[name].rows),
            "flops_share": flops_share(reports[name]),
            "saved_for_backward_bytes": {
                "exact": reports[name].exact_saved_bytes,
                "planned": reports[name].planned_saved_bytes,
            },
        }
    return {"exact_s": exact_s, "rounds": given.rounds, "plans": rows, "profiles_s": profiles}


def flops_share(report: graphpass.Report) -> float:
    """Return the share of the exact FLOPs of a step's products that its plan does."""
    exact = sum(row.exact_flops for row in report.rows)
    return sum(row.planned_flops for row in report.rows) / exact


def options_of(case: Case, plan: Specs | dict[str, Any]) -> dict[str, Any]:
    """Return backend options that apply methods to every layer but the first, or spend a budget."""
    if isinstance(plan, list):
        return {"methods": dict.fromkeys(case.layers()[1:], plan), "strict": True}
    return {**plan, "strict": True}


def _profile(step: Step) -> dict[str, float]:
    """Return the seconds of a step that each operator takes itself, generated code by direction."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(_PROFILED):
            step()
    # Of the generated code of a model in one graph, forward runs first.
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    generated = dict.fromkeys(event.name for event in events if "CompiledFxGraph" in event.name)
    directions = ("generated code, forward", "generated code, backward")
    shown = dict(zip(generated, directions, strict=False))
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        seconds[shown.get(event.key, event.key)] += 1e-6 * event.self_cpu_time_total / _PROFILED
    return dict(seconds.most_common(_OPERATORS))


def _profile_table(case: Case, profiles: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"{case.name}, {case.dtype}: ms of a step")
    table.add_column("operator")
    names = dict.fromkeys(name for profile in profiles.values() for name in profile)
    for plan in profiles:
        table.add_column(plan, justify="right")
    for name in names:
        cells = (profile.get(name) for profile in profiles.values())
        table.add_row(name, *("" if cell is None else f"{1e3 * cell:.1f}" for cell in cells))
    return table


def _table(case: Case, result: dict[str, Any]) -> Table:
    layout = "NCHW" if case.nchw else "channels_last"
    table = Table(
        title=f"{case.name}, batch {case.batch}, {case.dtype}, {layout}; "
        f"Inductor {1e3 * result['exact_s']:.1f} ms a step"
    )
    for column in ("plan", "products", "FLOPs saved", "ms", "times faster", "quartiles"):
        table.add_column(column)
    for plan, row in result["plans"].items():
        faster = row["speedup"]
        table.add_row(
            plan,
            f"{row['approximated_sites']} of {row['sites']}",
            f"{100 * (1 - row['flops_share']):.0f} %",
            f"{1e3 * row['median_s']:.1f}",
            f"{faster['median']:.2f}",
            f"{faster['low_quartile']:.2f} to {faster['high_quartile']:.2f}",
        )
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--plans", nargs="+", default=tuple(PLANS), choices=(*PLANS, *RECIPES))
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=2, help="timed steps in a row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--nchw", action="store_true", help="instead of channels_last")
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    parser.add_argument("--output", default="plans", help="name of the results file")
    parser.add_argument("--add", action="store_true", help="keep what it has of other models")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
