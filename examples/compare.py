"""Train the same task exactly and approximately, side by side, and tabulate what came of it.

The two runs take turns, a few steps each, from the first step to the last. Other work on the machine
then slows both alike, which it would not if one run followed the other, and the ratio of step times
covers every step of any schedule.
"""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples import results
from examples.training import Trainer

# Steps per turn: a multiple of the period of every named schedule (1, 2 and 4 steps), so that a
# turn has its share of approximated and of exact steps.
TURN_STEPS = 4


def fit_in_turns(
    exact: Trainer,
    approximate: Trainer,
    console: Console,
    after_first_step: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
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
                if steps == 1:
                    after_first_step(trainer)
            bar.update(line, completed=exact.step)
            steps = TURN_STEPS


def speedup(exact_s: Sequence[float], approximate_s: Sequence[float]) -> dict[str, float | int]:
    """Compare two runs that trained in turns.

    Args:
        exact_s: Seconds of each step; the first one is left out.
        approximate_s: Likewise, of the other run.

    Returns:
        `turns` that were compared, and over them the median and the quartiles of exact over
        approximate seconds: `speedup`, `speedup_low`, `speedup_high`. Only `turns` (0) if the runs
        were too short for a full turn each.
    """
    starts = range(1, min(len(exact_s), len(approximate_s)) + 1, TURN_STEPS)
    ratios = [sum(exact_s[a:b]) / sum(approximate_s[a:b]) for a, b in pairwise(starts)]
    if not ratios:
        return {"turns": 0}
    # `quantiles` needs two values; one turn is its own quartiles.
    low, middle, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4)
    return {"turns": len(ratios), "speedup": middle, "speedup_low": low, "speedup_high": high}


def table(exact: dict[str, Any], approximate: dict[str, Any], measured: dict[str, Any]) -> Table:
    """Return the two runs (as `results.summary` makes them) in columns, the ratio in the last."""
    columns = Table(title="exact and approximate training, measured")
    columns.add_column("")
    for run in (exact, approximate):
        columns.add_column(str(run["backend"]), justify="right")
    columns.add_column("ratio", justify="right")
    for label, key, scale, digits in (
        ("test accuracy [%]", "score", 1, 2),
        ("training loss", "train_loss", 1, 4),
        ("median step [ms]", "median_step_s", 1000, 1),
        ("mean step [ms]", "mean_step_s", 1000, 1),
        ("training [s]", "train_s", 1, 1),
        ("compilation [s]", "compile_s", 1, 1),
    ):
        pair = [run[key] for run in (exact, approximate)]
        cells = ["-" if value is None else f"{value * scale:.{digits}f}" for value in pair]
        columns.add_row(label, *cells, _ratio(*pair) if key.endswith("_s") else "")
    if measured["turns"]:
        spread = f"{measured['speedup_low']:.2f} to {measured['speedup_high']:.2f}"
        label = f"speed-up, median of {measured['turns']} turns of {TURN_STEPS} steps"
        columns.add_row(label, "", spread, f"{measured['speedup']:.2f}", style="bold")
    return columns


def _take_turn(trainer: Trainer, steps: int, console: Console) -> None:
    for _ in range(min(steps, trainer.last_step - trainer.step)):
        trainer.train_step()
        if trainer.done or trainer.between_epochs:
            line = f"{trainer.settings.backend:9} {trainer.end_epoch()}"
            console.print(line, highlight=False)


def _ratio(exact: float | None, approximate: float | None) -> str:
    return f"{exact / approximate:.2f}" if exact and approximate else "-"
