"""Find the noise that costs so many points of accuracy, by short runs of the user's own training.

Runs are made at points of the frontier, exact training among them, by successive halving (Jamieson,
Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016): many
short ones first, then longer ones of the half that lies nearest to the noise looked for. A curve
from noise to accuracy is fitted to all of them (see `graphpass.curve`).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from codegen.cache import write_atomically
from graphpass.budget import AccuracyDrop
from graphpass.curve import Curve, fit
from graphpass.errors import ConfigError
from graphpass.noise import saturation
from graphpass.options import Options
from graphpass.plan import Plan

Train = Callable[[dict[str, Any], float], float]

_VERSION = 1
# Each round has half as many points as the one before, and runs that are twice as long.
_HALVING = 2
# Noise of the points where no plan says what there is: from next to nothing to as much as the
# gradient has.
_LEAST_TAU, _MOST_TAU = 0.01, 1.0
# r / (1 + r) at r = 4, where no plan says what it is.
_SATURATION = 0.8


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the user's training.

    Attributes:
        round: number of the round, from 0.
        tau: budget of the run; 0 is exact.
        length: part of the full training that it ran.
        seed: option `seed` of the run.
        accuracy: what it reached, in points; None if it did not converge.
    """

    round: int
    tau: float
    length: float
    seed: int
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was found.

    Attributes:
        options: options to train with: their budget holds the curve.
        curve: from noise to accuracy.
        trials: the runs that it was fitted to.
    """

    options: Options
    curve: Curve
    trials: tuple[Trial, ...]

    @property
    def tau(self) -> float:
        """Noise that is expected to cost as much as was allowed."""
        assert isinstance(self.options.budget, AccuracyDrop)
        return self.options.budget.tau

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the points that this noise costs."""
        x = math.log1p(self.curve.saturation * self.tau)
        low, high = (self.curve.slope + sign * self.curve.slope_error for sign in (-1, 1))
        return max(low, 0.0) * x, high * x

    def __str__(self) -> str:
        """Return the runs as a table, and what follows from them."""
        lines = ["round  length      tau  accuracy"]
        for trial in self.trials:
            reached = "diverged" if trial.accuracy is None else f"{trial.accuracy:.2f}"
            lines.append(f"{trial.round:>5}  {trial.length:>6.3g}  {trial.tau:>7.3g}  {reached:>8}")
        low, high = self.interval
        lines.append(
            f"budget {self.tau:.3g}: expected to cost {self.curve.drop(self.tau):.2f} points, "
            f"with 95 % confidence {low:.2f} to {high:.2f}"
        )
        return "\n".join(lines)


def tune(
    train: Train,
    budget: AccuracyDrop,
    *,
    plan: Plan | None = None,
    trials: int = 8,
    rounds: int = 2,
    path: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Tuned:
    """Return options whose noise is expected to cost at most so many points of accuracy.

    Args:
        train: the user's training, `train(options, length) -> accuracy`: compiles a fresh model by
            `torch.compile(model, backend="approx", options=options)`, runs this part of the full
            training (in (0, 1], learning rate schedule included), returns the accuracy in points.
        budget: the points that may be lost.
        plan: what `graphpass.plan` returned for the model; its frontier says what can be chosen.
        trials: points of the first round, exact training included; at least 3.
        rounds: number of rounds; the last one's runs have full length.
        path: file that every finished run is written to, and a later call goes on from.
        progress: whether to show a progress bar.
        options: further options of every run.

    Raises:
        ConfigError: if an argument is not legal, the file is of another search, or too few runs
            converged for a curve.
    """
    base = _checked(budget, plan, trials, rounds, options)
    prediction = None if plan is None else plan.prediction
    share = _SATURATION
    if prediction is not None and prediction.square > 0:
        share = saturation(prediction.noise_ratio)
    taus = _points(plan, trials)
    log = _Log(path, {"taus": taus, "rounds": rounds, "options": repr(sorted(options.items()))})
    counts = [max(3, trials // _HALVING**number) for number in range(rounds)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task("tuning", total=sum(counts))
        for number, count in enumerate(counts):
            if number:
                taus = _nearest(taus, _curve(log.trials, share).tau_for(budget.points), count)
            for tau in taus:
                bar.update(task, description=f"round {number + 1} of {rounds}, tau {tau:.3g}")
                length = 1 / _HALVING ** (rounds - 1 - number)
                log.run(train, Trial(number, tau, length, base.seed + number, None), base)
                bar.advance(task)
    curve = _curve(log.trials, share)
    chosen = Options.from_dict({**options, "budget": AccuracyDrop(budget.points, curve)})
    return Tuned(chosen, curve, tuple(log.trials))


class _Log:
    """The finished runs, kept in a file if there is one."""

    def __init__(self, path: str | Path | None, search: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.search = search
        self.trials: list[Trial] = []
        self._kept = self._read()

    def run(self, train: Train, trial: Trial, base: Options) -> None:
        """Add a run, made now unless an earlier call made it.

        Raises:
            ConfigError: if what `train` returned is no number.
        """
        kept = next((t for t in self._kept if _same(t, trial)), None)
        if kept is None:
            given = {**base.to_dict(), "budget": trial.tau, "seed": trial.seed}
            accuracy = train(given, trial.length)
            if isinstance(accuracy, bool) or not isinstance(accuracy, (int, float)):
                raise ConfigError(f"train returned {accuracy!r}; return the accuracy in points")
            reached = float(accuracy) if math.isfinite(accuracy) else None
            kept = Trial(trial.round, trial.tau, trial.length, trial.seed, reached)
        self.trials.append(kept)
        if self.path is not None:
            # Runs that were made and not come to yet are kept too.
            rest = [t for t in self._kept if not any(_same(t, done) for done in self.trials)]
            runs = [asdict(t) for t in (*self.trials, *rest)]
            record = {"version": _VERSION, "search": self.search, "runs": runs}
            write_atomically(self.path, json.dumps(record, indent=1))

    def _read(self) -> list[Trial]:
        if self.path is None or not self.path.exists():
            return []
        try:
            record = json.loads(self.path.read_text())
            search, runs = record["search"], [Trial(**run) for run in record["runs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"cannot go on from {str(self.path)!r}: {type(error).__name__}: {error}. Remove "
                "the file, or give another path"
            ) from error
        if record.get("version") != _VERSION or search != self.search:
            raise ConfigError(
                f"{str(self.path)!r} holds the runs of another search ({search}); this one is "
                f"{self.search}. Remove the file, or give another path"
            )
        return runs


def _checked(
    budget: object, plan: object, trials: object, rounds: object, options: Mapping[str, Any]
) -> Options:
    if not isinstance(budget, AccuracyDrop):
        raise ConfigError(f"tune: budget={budget!r}; give graphpass.AccuracyDrop(points)")
    for name, value, least in (("trials", trials, 3), ("rounds", rounds, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"tune: {name}={value!r}; give an integer of at least {least}")
    if plan is not None and not isinstance(plan, Plan):
        raise ConfigError(f"tune: plan={plan!r}; give what graphpass.plan(model, *inputs) returned")
    if "budget" in options or isinstance(options.get("methods"), Mapping):
        raise ConfigError("tune chooses the budget; it needs methods to be None or a list of names")
    return Options.from_dict(options)


def _points(plan: Plan | None, count: int) -> list[float]:
    """Return the noises of the first round: 0, and others spread evenly over their logarithms.

    Raises:
        ConfigError: if the plan has nothing to choose from.
    """
    least, most = _LEAST_TAU, _MOST_TAU
    if plan is not None and plan.prediction is not None:
        corners = [point.tau for point in plan.prediction.frontier if point.tau > 0]
        if not corners:
            raise ConfigError("tune: the plan has no frontier, so that there is nothing to choose")
        # What is beyond the last corner is the last corner.
        least, most = max(min(corners), 1e-3 * max(corners)), max(corners)
    steps = count - 2
    return [0.0, *(least * (most / least) ** (i / steps) for i in range(steps + 1))]


def _nearest(taus: Sequence[float], wanted: float, count: int) -> list[float]:
    """Return exact training, and the points whose noise is nearest to what is looked for."""
    inexact = sorted(taus[1:], key=lambda tau: abs(math.log(tau / max(wanted, 1e-12))))
    return [taus[0], *sorted(inexact[: count - 1])]


def _curve(trials: Sequence[Trial], saturation: float) -> Curve:
    """Return the curve through the runs that converged, below the noise at which one did not.

    Raises:
        ConfigError: if there are too few of them.
    """
    diverged = min((t.tau for t in trials if t.accuracy is None), default=math.inf)
    used = [t for t in trials if t.tau < diverged]
    if len({t.tau for t in used}) < 2:
        raise ConfigError(
            f"tune: training did not converge at tau {diverged:.3g}, so that there is no curve; "
            "check the training function with exact options first (budget=0)"
        )
    figures = [t.accuracy for t in used if t.accuracy is not None]
    return fit([t.tau for t in used], figures, saturation, [t.round for t in used])


def _same(one: Trial, other: Trial) -> bool:
    return (one.round, one.tau, one.length, one.seed) == (
        other.round, other.tau, other.length, other.seed,
    )  # fmt: skip
