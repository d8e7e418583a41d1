"""Does noise cost the steps that the law says? Trainings under plans, and exact ones beside them.

    python -m benchmarks.noise_law --data DIR --device cuda --at-once 12 --seconds 400
    python -m benchmarks.noise_law_table

ResNet-20, CIFAR-10. The plans are those of `benchmarks.noise_law_plans`, made for a processor;
what they do to accuracy depends on their estimates alone, so any device will do. Exact trainings of
several lengths, each with its whole schedule, say what accuracy a number of steps is worth. Beside
them one exact training is measured: the noise of its gradient, and what the plans would add. Runs
that the results file already holds, with the same settings, are kept.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import trainings
from benchmarks.noise_law_plans import MODEL, RESULTS
from benchmarks.timing import earlier_runs, read_results, write_results
from benchmarks.trainings import Training

EXACT, MOMENTS = "exact", "moments"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, write the results after every run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise_law", description=__doc__)
    trainings.add_arguments(parser, "noise_law")
    parser.add_argument("--epochs", type=int, default=10, help="of planned trainings")
    parser.add_argument("--short", type=int, nargs="*", default=[3, 5, 7, 12], help="of exact ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit-train", type=int, help="train on fewer images, to try the flow")
    given = parser.parse_args(argv)
    settings = {name: getattr(given, name) for name in ("epochs", "limit_train")}
    runs = earlier_runs(given.output, settings)
    trainings.run(
        list(_trainings(given, read_results(RESULTS)["plans"])),
        runs,
        lambda runs: write_results(given.output, {**settings, "runs": runs}),
        at_once=given.at_once,
        seconds=given.seconds,
        threads=given.threads,
    )


def _trainings(given: argparse.Namespace, plans: dict[str, Any]) -> Iterator[Training]:
    """Yield what is trained, seed by seed; the code of every kind is compiled once."""
    for number, seed in enumerate(given.seeds):
        common = [
            "--data", str(given.data), "--device", given.device, "--model", MODEL,
            "--channels-last", "--seed", str(seed),
        ]  # fmt: skip
        if given.limit_train is not None:
            common += ["--limit-train", str(given.limit_train)]
        whole, exact = ["--epochs", str(given.epochs)], ["--backend", "inductor"]
        if number == 0:
            measured = (*common, *whole, *exact, "--plans", RESULTS)
            yield Training(MOMENTS, measured, MOMENTS, "benchmarks.noise_moments")
        for name, plan in plans.items():
            planned = ["--strict", "--methods-json", json.dumps(plan["methods"])]
            program, arguments = "examples.cifar10", (*common, *whole, *planned)
            if number == 0:
                # The first of a kind compiles what the others find in the caches.
                program, arguments = "benchmarks.gpu_warmed", (program, *arguments)
            yield Training(f"{name}/{seed}", arguments, name, program)
        for epochs in sorted({given.epochs, *given.short}, reverse=True):
            length = ["--epochs", str(epochs)]
            yield Training(f"{EXACT}, {epochs} epochs/{seed}", (*common, *length, *exact), EXACT)


if __name__ == "__main__":
    main()
