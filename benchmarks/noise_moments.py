"""A training at some epochs of which the noise of the gradient is measured, and that of plans.

    python -m benchmarks.noise_moments --data DIR --plans noise_law_plans --json FILE
    python -m benchmarks.noise_moments --data DIR --backend approx --budget 0.1 --json FILE

At fixed weights, from fresh batches: V = E|g - E g|^2 and |E g|^2 of the exact gradient, and
tau = E|ĝ - g|^2 / V over batches and draws: of the plans of a results file, along an exact
training, or of the plan that is in force where a budget is kept, beside what the training itself
has measured of it. `benchmarks.noise_law` and `benchmarks.budget_kept` run it as a process.
"""

import copy
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import graphpass
from benchmarks.gradients import Batch, gradient, square_of_mean, variance
from benchmarks.noise_law_plans import methods_of
from benchmarks.timing import read_results
from examples import arguments, checkpoint, cifar10, data, images, results
from examples.settings import Settings
from examples.training import Trainer
from graphpass.backend import approx

Methods = Mapping[str, Any]
IN_FORCE = "in force"


class Copy:
    """A copy of a model in training, compiled on its own: it shares no session with it."""

    def __init__(self, model: nn.Module, backend: Any, **options: Any) -> None:
        """Compile nothing yet."""
        self.original = model
        self.model = copy.deepcopy(model)
        self._compiled = torch.compile(self.model, backend=backend, options=options or None)

    def catch_up(self) -> None:
        """Take the weights that the model has now."""
        self.model.load_state_dict(self.original.state_dict())

    def gradient(self, batch: Batch) -> Tensor:
        """Return the gradient of a batch."""
        return gradient(self.model, self._compiled, batch)


class Moments:
    """What is needed to measure at fixed weights."""

    def __init__(self, trainer: Trainer, batches: data.Batches) -> None:
        """Compile nothing yet.

        Args:
            trainer: of the training.
            batches: fresh ones, of a stream of their own.
        """
        self.trainer = trainer
        self.batches = batches
        self.exact = Copy(trainer.task.model, "inductor")
        self._planned: dict[str, Copy] = {}

    def measure(self, plans: Mapping[str, Methods], given: Namespace) -> dict[str, Any]:
        """Return V, |E g|^2, and the tau of every plan.

        Args:
            plans: methods by layer, by the name of the plan.
            given: how many batches are taken, and draws.
        """
        self.exact.catch_up()
        found = [self.exact.gradient(self.batches.next()) for _ in range(given.fresh)]
        truth = variance(found)
        taus = {name: self._noise(plan, given) / truth for name, plan in plans.items()}
        return {"variance": truth, "square": square_of_mean(found), "tau": taus}

    def _noise(self, methods: Methods, given: Namespace) -> float:
        """Return E|ĝ - g|^2 of a plan."""
        if not methods:
            return 0.0
        planned, errors = self._copy(methods), []
        planned.catch_up()
        for _ in range(given.repeat):
            batch = self.batches.next()
            exact = self.exact.gradient(batch)
            for _ in range(given.draws):
                errors.append(float((planned.gradient(batch) - exact).square().sum()))
        return statistics.mean(errors)

    def _copy(self, methods: Methods) -> Copy:
        """Return the model as a plan computes it, compiled once for equal plans."""
        if (key := str(methods)) not in self._planned:
            model = self.trainer.task.model
            self._planned[key] = Copy(model, approx, methods=methods, strict=True)
        return self._planned[key]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write the results after every epoch."""
    given = _parser().parse_args(argv)
    settings = arguments.settings(given)
    torch.manual_seed(settings.seed)
    # All plans compile the code of one model.
    torch._dynamo.config.recompile_limit = 64
    with arguments.threads(given.threads):
        trainer, fresh = _prepare(given, settings)
        moments, measured = Moments(trainer, fresh), []
        while not trainer.done:
            trainer.train_step()
            if not trainer.between_epochs:
                continue
            print(trainer.end_epoch(), flush=True)
            if len(trainer.history) in given.moments:
                measured.append(_moment(moments, given))
                print(measured[-1], flush=True)
            if given.json is not None:
                run = {**trainer.summary(), "moments": measured}
                content = {"environment": results.environment(), "runs": [run]}
                checkpoint.write_json(given.json, content)


def _moment(moments: Moments, given: Namespace) -> dict[str, Any]:
    """Return what is measured at the end of an epoch."""
    trainer = moments.trainer
    found: dict[str, Any] = {"epoch": len(trainer.history), "step": trainer.step}
    if given.plans is not None:
        plans = {name: plan["methods"] for name, plan in read_results(given.plans)["plans"].items()}
        return {**found, **moments.measure(plans, given)}
    session = graphpass.session(trainer.compiled)
    measured, prediction = session.noise, session.plan.prediction
    found |= {
        "approximated": len(session.plan.approximated),
        "supposed_tau": None if prediction is None else prediction.tau,
        "probed_step": None if measured is None else measured.step,
        "probed_tau": None if measured is None else measured.tau,
        "notes": session.notes,
    }
    return {**found, **moments.measure({IN_FORCE: methods_of(session.plan)}, given)}


def _prepare(given: Namespace, settings: Settings) -> tuple[Trainer, data.Batches]:
    """Return the training, and fresh batches to measure on."""
    loaded = data.load(given.data, given.limit_train)
    task = images.tasks(loaded, given.model)(settings)
    if settings.backend == "approx":
        total = settings.epochs * task.batches.per_epoch
        options = arguments.approx_options(given, task.model, total)
        settings = replace(settings, options=options)
    # Another seed: the training sees the batches that it would see without being measured.
    fresh = data.Batches(
        loaded.to(settings.device),
        settings.batch_size,
        settings.seed + 1000,
        settings.channels_last,
    )
    return Trainer(task, settings), fresh


def _parser() -> ArgumentParser:
    parser = cifar10.parser()
    parser.prog = "python -m benchmarks.noise_moments"
    parser.set_defaults(backend="inductor")
    parser.add_argument("--plans", help="name of the results file with the plans")
    parser.add_argument("--moments", type=int, nargs="+", default=(1, 2, 4, 6, 8, 10))
    parser.add_argument("--fresh", type=int, default=64, help="batches that V is measured from")
    parser.add_argument("--repeat", type=int, default=3, help="batches that tau is measured on")
    parser.add_argument("--draws", type=int, default=4, help="of each of them")
    return parser


if __name__ == "__main__":
    main()
