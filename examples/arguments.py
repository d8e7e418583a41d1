"""The command line that the examples share, and what its arguments mean."""

import contextlib
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphpass
from examples import checkpoint
from examples.settings import BACKENDS, DTYPES, LR_DECAYS, OPTIMIZERS, Settings
from graphpass.errors import ConfigError
from graphpass.options import PRODUCTS

_APPROX_ONLY = (
    "method", "methods_json", "recipe", "schedule", "budget", "gradients", "max_bias", "report",
    "strict",
)  # fmt: skip
# What says which products are approximated, and how.
_CHOICES = ("method", "methods_json", "recipe")


def add_arguments(parser: ArgumentParser) -> None:
    """Add everything that does not depend on the data set."""
    _add_training(parser)
    _add_approximation(parser)
    _add_files(parser)


def check(arguments: Namespace) -> None:
    """Refuse what would fail late or be ignored.

    Raises:
        ConfigError: If arguments contradict each other, or an output cannot be written.
    """
    given = [f"--{name.replace('_', '-')}" for name in _CHOICES if getattr(arguments, name)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} were both given: give one of them")
    for name in _APPROX_ONLY if arguments.backend != "approx" else ():
        if getattr(arguments, name) not in (None, False):
            raise ConfigError(
                f"--{name.replace('_', '-')} means nothing to --backend {arguments.backend}: "
                "leave it out, or choose --backend approx"
            )
    if arguments.compare and arguments.backend == "inductor":
        raise ConfigError("--compare sets another backend against inductor: give --backend approx")
    if arguments.compare and (arguments.checkpoint or arguments.resume):
        raise ConfigError("--compare trains two runs: leave out --checkpoint and --resume")
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError(f"--threads {arguments.threads}: give a number of at least 1")
    for path in (arguments.json, arguments.checkpoint):
        if path is not None:
            checkpoint.check_destination(path)


def settings(arguments: Namespace) -> Settings:
    """Return the settings that were asked for, yet without options of the approx backend.

    Raises:
        ConfigError: If a value is not legal.
    """
    return Settings(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        optimizer=arguments.optimizer,
        lr=arguments.lr,
        lr_schedule=arguments.lr_schedule,
        backend=arguments.backend,
        seed=arguments.seed,
        dtype=arguments.dtype,
        channels_last=arguments.channels_last,
        max_steps=arguments.max_steps,
        device=arguments.device,
    )


def approx_options(arguments: Namespace, model: nn.Module, total_steps: int) -> dict[str, Any]:
    """Return the options of the approx backend: those that the user gave, and the seed.

    Raises:
        ConfigError: If a value cannot be read; the backend itself checks what it says.
    """
    options: dict[str, Any] = {"seed": arguments.seed}
    if arguments.method is not None:
        options["methods"] = methods_for(model, arguments.method)
    if arguments.methods_json is not None:
        options["methods"] = _parsed_methods(arguments.methods_json)
    if arguments.recipe is not None:
        name, *values = arguments.recipe
        options |= graphpass.recipe(name, model, **dict(map(_parsed_value, values)))
    if arguments.schedule is not None:
        options |= {"schedule": arguments.schedule, "total_steps": total_steps}
    if arguments.budget is not None:
        options["budget"] = _parsed_budget(arguments.budget)
    if arguments.gradients is not None:
        options["gradients"] = arguments.gradients
    if arguments.max_bias is not None:
        options["max_bias"] = arguments.max_bias
    if arguments.strict:
        options["strict"] = True
    return options


def methods_for(model: nn.Module, method: str) -> dict[str, str]:
    """Map the path of every convolution but the first to `method`; linear layers if there is none.

    The published experiments leave the first one exact: it tolerates approximation worst.
    """
    for kind in (nn.Conv2d, nn.Linear):
        paths = [path for path, module in model.named_modules() if isinstance(module, kind)]
        if paths:
            return dict.fromkeys(paths[1:], method)
    return {}


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute on so many threads inside; None leaves it to torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_json(arguments: Namespace) -> dict[str, Any]:
    """Return the arguments as they stand in results."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}


def _add_training(parser: ArgumentParser) -> None:
    default = Settings()
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=default.epochs)
    group.add_argument("--batch-size", type=int, default=default.batch_size)
    group.add_argument("--optimizer", choices=OPTIMIZERS, default=default.optimizer)
    group.add_argument("--lr", type=float, help="highest (sgd: 0.1, sgd-plain: 1, adam: 0.001)")
    group.add_argument("--lr-schedule", choices=LR_DECAYS, default=default.lr_schedule)
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="bf16: autocast")
    group.add_argument("--channels-last", action="store_true", help="memory format of the images")
    group.add_argument("--device", default=default.device, help="cpu, cuda, cuda:0, ...")
    group.add_argument("--threads", type=int, metavar="N", help="threads to compute on")
    group.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="stop after N steps of the run; the learning rate still decays over all epochs",
    )


def _add_approximation(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("approximation")
    group.add_argument("--backend", choices=BACKENDS, default=Settings().backend)
    group.add_argument(
        "--method",
        metavar="NAME",
        help="for every convolution (or else linear layer) but the first",
    )
    group.add_argument("--methods-json", metavar="JSON", help="module patterns to methods")
    group.add_argument(
        "--recipe",
        nargs="+",
        metavar=("NAME", "PARAMETER=VALUE"),
        help="a paper's: crs-topk, agp, swat-u, ...",
    )
    group.add_argument("--schedule", metavar="NAME", help="always, ga-1, ga-2, ga-3, ga-cnn2, ...")
    group.add_argument("--budget", metavar="TAU", help="auto, or the noise that may be added")
    group.add_argument(
        "--gradients",
        nargs="+",
        choices=PRODUCTS,
        help="what the planner may approximate (weight input)",
    )
    group.add_argument("--max-bias", type=float, metavar="B", help="squared bias that it may add")
    group.add_argument(
        "--strict",
        action="store_true",
        help="end where graphpass fails, instead of going on exactly",
    )
    group.add_argument("--report", action="store_true", help="print what was approximated, and why")
    group.add_argument(
        "--compare",
        action="store_true",
        help="train exactly (inductor) as well, in turns, and tabulate both",
    )


def _add_files(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="saved after every epoch")
    group.add_argument("--resume", type=Path, metavar="FILE", help="go on from a checkpoint")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the results there")


def _parsed_methods(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        example = '{"layer*.conv*": "zero"}'
        raise ConfigError(
            f"--methods-json {text!r} is not JSON ({error}): give a mapping such as '{example}'"
        ) from error


def _parsed_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--recipe: {text!r} sets nothing: give a parameter as keep=0.5")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        # A word, such as the name of a method.
        return name, value


def _parsed_budget(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as error:
        raise ConfigError(f"--budget {text!r}: give auto or a number of at least 0") from error
