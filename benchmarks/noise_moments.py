"""An exact training, at some epochs of which the noise of the gradient is measured, and of plans.

    python -m benchmarks.noise_moments --data DIR --epochs 10 --plans noise_law_plans --json FILE

At fixed weights, from fresh batches: V = E|g - E g|^2 and |E g|^2 of the exact gradient, and
tau = E|ĝ - g|^2 / V of every plan, over batches and draws. `benchmarks.noise_law` runs it among its
trainings.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gradients import gradient, square_of_mean, variance
from benchmarks.timing import read_results
from examples import arguments, checkpoint, cifar10, data, images, results
from examples.training import Trainer
from graphpass.backend import approx

Forward = Callable[[Tensor], Tensor]


class Moments:
    """What is needed to measure at fixed weights."""

    def __init__(self, trainer: Trainer, batches: data.Batches, plans: dict[str, Any]) -> None:
        """Compile nothing yet.

        Args:
            trainer: of the exact training.
            batches: fresh ones, of a stream of their own.
            plans: by name, their `methods`.
        """
        self.trainer = trainer
        self.batches = batches
        self.planned: dict[str, Forward] = {
            name: torch.compile(
                trainer.task.model,
                backend=approx,
                options={"methods": plan["methods"], "strict": True},
            )
            for name, plan in plans.items()
        }

    def measure(self, fresh: int, repeat: int, draws: int) -> dict[str, Any]:
        """Return V, |E g|^2, and the tau of every plan; the model stays as it is.

        Args:
            fresh: batches that V and |E g|^2 are measured from.
            repeat: batches that a plan is measured on.
            draws: gradients of a plan on each of them.
        """
        model = self.trainer.task.model
        statistics_of_norms = [buffer.clone() for buffer in model.buffers()]
        found = [self._exact(self.batches.next()) for _ in range(fresh)]
        truth = variance(found)
        taus = {name: self._noise(name, repeat, draws) / truth for name in self.planned}
        for buffer, kept in zip(model.buffers(), statistics_of_norms, strict=True):
            buffer.copy_(kept)
        return {"variance": truth, "square": square_of_mean(found), "tau": taus}

    def _exact(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return gradient(self.trainer.task.model, self.trainer.compiled, batch)

    def _noise(self, name: str, repeat: int, draws: int) -> float:
        model, errors = self.trainer.task.model, []
        for _ in range(repeat):
            batch = self.batches.next()
            exact = self._exact(batch)
            for _ in range(draws):
                estimate = gradient(model, self.planned[name], batch)
                errors.append(float((estimate - exact).square().sum()))
        return statistics.mean(errors)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write the results after every moment."""
    parser = cifar10.parser()
    parser.prog = "python -m benchmarks.noise_moments"
    parser.set_defaults(backend="inductor")
    parser.add_argument("--plans", required=True, help="name of the results file with the plans")
    parser.add_argument(
        "--moments", type=int, nargs="+", default=(1, 2, 4, 6, 8, 10), help="epochs"
    )
    parser.add_argument("--fresh", type=int, default=64, help="batches that V is measured from")
    parser.add_argument("--repeat", type=int, default=3, help="batches that tau is measured on")
    parser.add_argument("--draws", type=int, default=4, help="of each of them")
    given = parser.parse_args(argv)
    # All plans compile the code of one model.
    torch._dynamo.config.recompile_limit = 64
    settings = arguments.settings(given)
    torch.manual_seed(settings.seed)
    loaded = data.load(given.data, given.limit_train)
    with arguments.threads(given.threads):
        trainer = Trainer(images.tasks(loaded, given.model)(settings), settings)
        # Another seed: the training sees the batches that it would see without being measured.
        fresh = data.Batches(
            loaded.to(settings.device),
            settings.batch_size,
            settings.seed + 1000,
            settings.channels_last,
        )
        plans = read_results(given.plans)["plans"]
        moments, measured = Moments(trainer, fresh, plans), []
        while not trainer.done:
            trainer.train_step()
            if not trainer.between_epochs:
                continue
            print(trainer.end_epoch(), flush=True)
            if len(trainer.history) in given.moments:
                found = moments.measure(given.fresh, given.repeat, given.draws)
                measured.append({"epoch": len(trainer.history), **found})
                print(measured[-1], flush=True)
            if given.json is not None:
                run = {**trainer.summary(), "moments": measured}
                content = {"environment": results.environment(), "runs": [run]}
                checkpoint.write_json(given.json, content)


if __name__ == "__main__":
    main()
