"""Train the same task exactly and approximately, side by side, and tabulate what came of it.

The two runs take turns, a few steps each, from the first step to the last. Other work on the
machine then slows both alike, which it would not if one run followed the other, and the ratio of
step times covers every step of any schedule.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.results import StepTime
from examples.training import Trainer

# Steps per turn: a multiple of the period of every named schedule (1, 2 and 4 steps), so that a
# turn has its share of approximated and of exact steps.
TURN_STEPS = 4


def fit_in_turns(exact: Trainer, approximate: Trainer, console: Console) -> None:
    """Train two runs of equal length to their ends, `TURN_STEPS` steps at a time.

    Raises:
        ConfigError: If a backend refuses its options.
    """
    runs = [approximate, exact]
    with Progress(console=console, disable=not console.is_terminal, refresh_per_second=2) as bar:
        line = bar.add_task("exact and approximate", total=exact.last_step)
        # One step each first: it compiles, and belongs to no turn.
        steps = 1
        while not (exact.done and approximate.done):
            # Whoever began the last turn comes second in this one: a drift favours neither.
            runs.reverse()
            for trainer in runs:
                _take_turn(trainer, steps, console)
            bar.update(line, completed=exact.step)
            steps = TURN_STEPS


def speedup(exact: Sequence[StepTime], other: Sequence[StepTime]) -> dict[str, float | int]:
    """Compare two runs that trained in turns.

    Args:
        exact: Steps of one run; turns begin at the second step.
        other: Steps of the other run.

    Returns:
        The number of complete `turns` in which neither run compiled, and over them the median and
        the quartiles of exact over other seconds: `speedup`, `speedup_low`, `speedup_high`.
        Without such turns, only their number.
    """
    ratios = []
    for first in range(1, min(len(exact), len(other)) - TURN_STEPS + 1, TURN_STEPS):
        turns = exact[first : first + TURN_STEPS], other[first : first + TURN_STEPS]
        if not any(step.compiled for turn in turns for step in turn):
            exact_s, other_s = (sum(step.seconds for step in turn) for turn in turns)
            ratios.append(exact_s / other_s)
    if not ratios:
        return {"turns": 0}
    # `quantiles` needs two values; a single one is its own quartiles.
    values = ratios * 2 if len(ratios) == 1 else ratios
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"turns": len(ratios), "speedup": middle, "speedup_low": low, "speedup_high": high}


def table(
    runs: tuple[Mapping[str, Any], Mapping[str, Any]],
    measured: Mapping[str, float | int],
    score_name: str,
) -> Table:
    """Return the summaries of the exact and the other run, and their `speedup`, as a table."""
    shown = Table(title="exact and approximate training, measured")
    for header in ("", *(run["backend"] for run in runs), "ratio"):
        shown.add_column(header, justify="right" if header else "left")
    for label, key, scale, digits in (
        (score_name.replace("_", " "), score_name, 1, 2),
        ("training loss", "train_loss", 1, 4),
        ("median step, ms", "median_step_s", 1000, 1),
        ("mean step, ms", "mean_step_s", 1000, 1),
        ("training, s", "train_s", 1, 1),
        ("compilation, s", "compile_s", 1, 1),
    ):
        pair = [run[key] for run in runs]
        cells = ["-" if value is None else f"{value * scale:.{digits}f}" for value in pair]
        ratio = f"{pair[0] / pair[1]:.2f}" if key.endswith("_s") and all(pair) else ""
        shown.add_row(label, *cells, ratio)
    if measured["turns"]:
        spread = f"{measured['speedup_low']:.2f} to {measured['speedup_high']:.2f}"
        label = f"speed-up, median and quartiles of {measured['turns']} turns"
        shown.add_row(label, "", spread, f"{measured['speedup']:.2f}", style="bold")
    return shown


def _take_turn(trainer: Trainer, steps: int, console: Console) -> None:
    for _ in range(min(steps, trainer.last_step - trainer.step)):
        trainer.train_step()
        if trainer.done or trainer.between_epochs:
            line = f"{trainer.settings.backend:9} {trainer.end_epoch()}"
            console.print(line, highlight=False)
