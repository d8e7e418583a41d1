"""Train a classifier of handwritten digits on MNIST, exactly or approximately.

    python -m examples.mnist --data DIR --compare --recipe int8
    python -m examples.mnist --data DIR --model mnist-cnn --recipe crs-topk keep=0.4

Run it from the root of the repository. Networks, batch and optimizer are those of Adelman,
Silberstein 2018 (arXiv:1805.08079); their learning rate is constant, `--lr-schedule constant`.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples import arguments, data, images, program
from examples.settings import Settings
from examples.training import Task


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the arguments say.

    Args:
        argv: Arguments; those of the command line by default.

    Returns:
        The results, as `program.run` describes them.

    Raises:
        ConfigError: If an argument, the data or a checkpoint is not legal.
    """
    return program.run(parser().parse_args(argv), prepare)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    made = ArgumentParser(
        prog="python -m examples.mnist",
        description="Train a classifier of handwritten digits, exactly or approximately.",
    )
    group = made.add_argument_group("task")
    group.add_argument("--data", type=Path, metavar="DIR", required=True, help="MNIST as published")
    group.add_argument("--limit-train", type=int, metavar="N", help="train on the first N images")
    group.add_argument("--model", default="mnist-mlp", help="mnist-mlp, mnist-cnn, cnn2, ...")
    arguments.add_arguments(made)
    made.set_defaults(batch_size=50, epochs=20, optimizer="adam")
    return made


def prepare(given: Namespace) -> Callable[[Settings], Task]:
    """Read the images; return what makes a task of classifying them.

    Raises:
        ConfigError: If there are no images, or the model does not exist or cannot take them.
    """
    return images.tasks(data.limited(data.mnist(given.data), given.limit_train), given.model)


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
