"""Train an image classifier on CIFAR-10, exactly or with approximate gradients.

    python -m examples.cifar10 --compare --method topk
    python -m examples.cifar10 --data DIR --model vgg19 --method zero --schedule ga-1

Run it from the root of the repository. Without `--data` it trains on scikit-learn's digits.
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
        prog="python -m examples.cifar10",
        description="Train an image classifier, exactly or with approximate gradients.",
    )
    group = made.add_argument_group("task")
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="CIFAR-10 as published; without it, scikit-learn's digits are used",
    )
    group.add_argument("--limit-train", type=int, metavar="N", help="train on the first N images")
    group.add_argument("--model", default="resnet20", help="cnn2, vgg19 or resnet<depth>")
    arguments.add_arguments(made)
    return made


def prepare(given: Namespace) -> Callable[[Settings], Task]:
    """Read the images; return what makes a task of classifying them.

    Raises:
        ConfigError: If there are no images, or the model does not exist or cannot take them.
    """
    return images.tasks(data.load(given.data, given.limit_train), given.model)


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
