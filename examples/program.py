"""What every example does with its command line: train once, or twice in turns, and report.

An example supplies `prepare(given)`: it reads the data and returns a function that makes a fresh
`Task` for some settings.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

import graphpass
from examples import arguments, checkpoint, compare, results
from examples.settings import Settings
from examples.training import Task, Trainer, fit, resume
from graphpass.errors import ConfigError

FreshTask = Callable[[Settings], Task]


def run(given: Namespace, prepare: Callable[[Namespace], FreshTask]) -> dict[str, Any]:
    """Train as the arguments say.

    Args:
        given: Arguments, among them those of `arguments.add_arguments`.
        prepare: Reads the data; what it returns makes a task, with new initial values.

    Returns:
        What `--json` writes: `arguments`, `environment`, `runs` (a summary of each), `reports` (of
        the graphs compiled for approximate training) and, after `--compare`, `comparison`.

    Raises:
        ConfigError: If an argument, the data or a checkpoint is not legal.
    """
    arguments.check(given)
    settings = arguments.settings(given)
    console = Console()
    # What an earlier call in this process compiled counts towards Dynamo's limit of recompilations.
    torch.compiler.reset()
    earlier_reports = len(graphpass.reports())

    def content(outcome: Mapping[str, Any]) -> dict[str, Any]:
        reports = [json.loads(report.to_json()) for report in graphpass.reports()[earlier_reports:]]
        made = {
            "arguments": arguments.as_json(given),
            "environment": results.environment(),
            **outcome,
            "reports": reports,
        }
        if given.json is not None:
            checkpoint.write_json(given.json, made)
        return made

    with arguments.threads(given.threads):
        if given.compare:
            return content(_train_in_turns(given, settings, prepare(given), console))
        # Of a run that does not come to its end, the file holds the epochs that it has.
        trainer = _trainer(given, settings, prepare(given))
        _train(given, trainer, console, lambda: content({"runs": [trainer.summary()]}))
        return content({"runs": [trainer.summary()]})


def exit_code(main: Callable[[], object]) -> int:
    """Run an example as a script; what the user got wrong is told in one line.

    Returns:
        What the process should exit with: 2 after a mistake of the user, 130 after Ctrl-C.
    """
    try:
        main()
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def _train(
    given: Namespace, trainer: Trainer, console: Console, after_epoch: Callable[[], object]
) -> None:
    if given.resume is not None:
        resume(trainer, given.resume)
    earlier_reports = len(graphpass.reports())

    def after_first_step() -> None:
        if given.report:
            _print_reports(console, earlier_reports)

    fit(trainer, console, given.checkpoint, after_first_step, after_epoch)


def _train_in_turns(
    given: Namespace, settings: Settings, fresh_task: FreshTask, console: Console
) -> dict[str, Any]:
    earlier_reports = len(graphpass.reports())
    exact = _trainer(given, replace(settings, backend="inductor"), fresh_task)
    other = _trainer(given, settings, fresh_task)
    compare.fit_in_turns(exact, other, console)
    runs = exact.summary(), other.summary()
    measured = compare.speedup(exact.times, other.times)
    _print_reports(console, earlier_reports)
    console.print(compare.table(runs, measured, exact.task.score_name))
    return {"runs": list(runs), "comparison": measured}


def _trainer(given: Namespace, settings: Settings, fresh_task: FreshTask) -> Trainer:
    torch.manual_seed(settings.seed)
    task = fresh_task(settings)
    if settings.backend == "approx":
        total_steps = settings.epochs * task.batches.per_epoch
        options = arguments.approx_options(given, task.model, total_steps)
        settings = replace(settings, options=options)
    return Trainer(task, settings)


def _print_reports(console: Console, earlier: int) -> None:
    for report in graphpass.reports()[earlier:]:
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
