"""Train an image classifier on CIFAR-10, exactly or with approximate gradients.

    python -m examples.cifar10 --compare                       # digits, no download needed
    python -m examples.cifar10 --data DIR --model vgg19 --method topk --schedule ga-1

Run it from the repository root. Without `--data` it trains on scikit-learn's digits.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from examples import checkpoint, compare, data, models, results
from examples.settings import BACKENDS, DTYPES, LR_DECAYS, OPTIMIZERS, Settings
from examples.training import Batch, Forward, Task, Trainer, fit, resume, run_script
from graphpass.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the arguments say.

    Args:
        argv: Arguments; those of the command line by default.

    Returns:
        What `--json` writes: the arguments, the environment, and a summary of each run.

    Raises:
        ConfigError: If an argument, a data folder or a checkpoint is not legal.
    """
    arguments = _parser().parse_args(argv)
    _check(arguments)
    settings = _settings(arguments)
    console = Console()
    with _threads(arguments.threads):
        images = data.load(arguments.data, arguments.limit_train)
        if arguments.compare:
            outcome = _compare(arguments, settings, images, console)
        else:
            outcome = _train(arguments, settings, images, console)
        content = {
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
            "environment": results.environment(),
            **outcome,
        }
    if arguments.json is not None:
        checkpoint.write_json(arguments.json, content)
    return content


def methods_for(model: nn.Module, method: str) -> dict[str, str]:
    """Map every convolution but the first to `method`.

    The first one is known to suffer most, and has no input gradient to share work with.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return dict.fromkeys(paths[1:], method)


def accuracy_percent(images: data.ImageData, channels_last: bool, model: nn.Module) -> float:
    """Return the share of test images that `model` classifies correctly, in percent."""
    correct = torch.zeros((), dtype=torch.int64)
    for batch, labels in data.evaluation_batches(images, channels_last=channels_last):
        correct += (model(batch).argmax(dim=1) == labels).sum()
    return 100 * correct.item() / len(images.test)


def _train(
    arguments: argparse.Namespace, settings: Settings, images: data.ImageData, console: Console
) -> dict[str, Any]:
    trainer = _trainer(arguments, settings, images)
    if arguments.resume is not None:
        resume(trainer, arguments.resume)
    fit(trainer, console, arguments.checkpoint, partial(_print_reports, arguments, console))
    return {"runs": [trainer.summary()], "reports": _reports_json()}
