"""The command line of the package.

`python -m graphpass calibrate` measures this machine for the cost model; `python -m graphpass
methods` lists the methods there are.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from graphpass import calibration, listing
from graphpass.calibrate import calibrate
from graphpass.render import hardware_table


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    given = _parse(argv)
    console = Console()
    if given.command == "methods":
        console.print(listing.table())
        return 0
    path = calibrate(given.threads, given.seconds, given.again, console)
    hardware = calibration.load(given.threads)
    if isinstance(hardware, str):
        console.print(hardware)
        return 1
    console.print(hardware_table(hardware))
    console.print(f"written to {path}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m graphpass", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("calibrate", help="measure this machine for the cost model")
    command.add_argument("--threads", type=_positive, default=torch.get_num_threads())
    command.add_argument("--seconds", type=_positive, default=50, help="when to stop, about")
    command.add_argument(
        "--again", action="store_true",
        help="on a busy machine: keep the faster figures of an earlier run",
    )  # fmt: skip
    commands.add_parser("methods", help="list the methods there are")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
