"""What switching between two compiled variants of a ResNet-20 step costs.

    python -m benchmarks.switching

One model runs exact, exact, approximate, approximate, and so on: every other step follows a switch,
and each variant runs as often after a switch as after itself. The steps that follow a switch,
divided by those that do not, four neighbouring steps at a time, say what a switch costs.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

import graphpass
from benchmarks.timing import ratio, write_results
from benchmarks.training_step import Case, make_step

PERIOD = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.switching", description=__doc__)
    parser.add_argument("--rounds", type=int, default=400, help="periods of four steps")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    step = _alternating_step()
    after_switch, after_itself = _by_predecessor(step, given.rounds)
    extra = ratio(after_switch, after_itself)
    step_s = statistics.median(after_itself)
    record = {
        "rounds": given.rounds,
        "step_s": step_s,
        "switch_percent_of_step": 100 * (extra["median"] - 1),
        "standard_error_percent": 100 * _standard_error(extra, given.rounds),
    }
    console = Console()
    console.print(
        "a switch costs {switch_percent_of_step:.2f} % of a step (standard error "
        "{standard_error_percent:.2f})".format(**record)
    )
    console.print(f"written to {write_results('switching', record)}")


def _alternating_step() -> Callable[[], None]:
    """Return a step whose variant changes on every other call; both are compiled."""
    case = Case("resnet20")
    rule = graphpass.Schedule("pairs", rule=lambda _, step: step // 2 % 2 == 1)
    methods = dict.fromkeys(case.convolutions()[1:], "zero")
    return make_step(case, {"methods": methods, "schedule": rule, "strict": True})


def _by_predecessor(step: Callable[[], None], rounds: int) -> tuple[list[float], list[float]]:
    """Return seconds a step after a switch and after the same variant, for every period."""
    after_switch, after_itself = [], []
    for _ in range(rounds):
        seconds = []
        for _ in range(PERIOD):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        after_switch.append((seconds[0] + seconds[2]) / 2)
        after_itself.append((seconds[1] + seconds[3]) / 2)
    return after_switch, after_itself


def _standard_error(extra: dict[str, float], rounds: int) -> float:
    """Return the standard error of a median, from its quartiles, as of normal values."""
    deviation = (extra["high_quartile"] - extra["low_quartile"]) / 1.349
    return 1.2533 * deviation / math.sqrt(rounds)


if __name__ == "__main__":
    main()
