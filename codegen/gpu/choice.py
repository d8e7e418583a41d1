"""Which of several ways to compute the same runs on this device: the fastest, timed on first use.

The answer is kept in the cache directory, a small file for each question and device, so that the
next process neither compiles nor times the others. A way that fails, as one does that needs more
shared memory than the device has, is out.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from codegen.cache import write_atomically
from codegen.gpu import build

log = logging.getLogger(__name__)

Run = Callable[[], object]
Timer = Callable[[Run], float]
# Turns of which the fastest counts, how long each takes about, and calls of one at most.
_TURNS, _TURN_S, _MOST_CALLS = 3, 0.002, 20
# Clocks that the GPU waits while the host prepares a turn: about half a millisecond.
_HEAD_START = 1_000_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What timing came to.

    Attributes:
        fastest: name of the way that took the least time.
        seconds: of a call, by way.
        failed: why others have none.
    """

    fastest: str
    seconds: Mapping[str, float]
    failed: Mapping[str, str]


def fastest(path: Path, ways: Mapping[str, Run], machine: str, timer: Timer) -> Outcome:
    """Return which way is the fastest: what was found before on such a machine, or by timing.

    Args:
        path: of the file that the answer is kept in, without the machine.
        ways: what to call, by name; of equals the first is taken.
        machine: device and versions that the answer depends on.
        timer: returns the seconds of a call.

    Raises:
        RuntimeError: if all fail, with what became of the first.
    """
    if (known := remembered(path, ways, machine)) is not None:
        return known
    seconds: dict[str, float] = {}
    errors: dict[str, Exception] = {}
    for name, run in ways.items():
        try:
            seconds[name] = timer(run)
        except Exception as error:
            errors[name] = error
            log.info("%s is no way to compute this here: %s", name, error)
    failed = {name: str(error)[:500] for name, error in errors.items()}
    if not seconds:
        raise RuntimeError(next(iter(failed.values())))
    outcome = Outcome(min(seconds, key=seconds.__getitem__), seconds, failed)
    # One that is left over was compared with nothing: the others may work the next time.
    if len(seconds) > 1:
        _write(_kept(path, machine), machine, outcome)
    return outcome


def remembered(path: Path, ways: Mapping[str, Run], machine: str) -> Outcome | None:
    """Return what was found before on such a machine; None if it was not, or not of these ways."""
    return _read(_kept(path, machine), ways)


def _kept(path: Path, machine: str) -> Path:
    return path.with_name(f"{path.stem}-{hashlib.sha256(machine.encode()).hexdigest()[:8]}.json")


def seconds_of(run: Run) -> float:
    """Return the seconds of a call; on a GPU those of the device, without the host's."""
    if not torch.cuda.is_available():
        return min(_clock(run) for _ in range(_TURNS))
    run()
    once = max(_clock(run), 1e-6)
    return turns(run, max(1, min(_MOST_CALLS, int(_TURN_S / once))))


def replayed(run: Run) -> Run:
    """Return the replay of a function, recorded as a CUDA graph: it takes no time of the host.

    Run it once before, so that nothing is left to be compiled and chosen.

    Raises:
        RuntimeError: if the function fails, or cannot be recorded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def turns(run: Run, calls: int) -> float:
    """Return the seconds of a call on a GPU, in the fastest of several turns of so many calls."""
    return min(_turn(run, calls) for _ in range(_TURNS))


def machine() -> str:
    """Return what timings on this device depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    compiler = "no Triton"
    if build.toolchain() is None:
        import triton

        compiler = f"Triton {triton.__version__}"
    return f"{device}, torch {torch.__version__}, {compiler}"


def _turn(run: Run, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Small kernels end before the host has launched the next one: it gets ahead first.
    torch.cuda._sleep(_HEAD_START)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def _clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _write(path: Path, machine: str, outcome: Outcome) -> None:
    try:
        write_atomically(path, json.dumps({"machine": machine, **asdict(outcome)}, indent=1))
    except OSError as error:
        log.warning("could not write to the cache directory: %s", error)


def _read(path: Path, ways: Mapping[str, Run]) -> Outcome | None:
    """Return what a file says, if it is whole and names one of the ways."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        outcome = Outcome(record["fastest"], dict(record["seconds"]), dict(record["failed"]))
        return outcome if outcome.fastest in ways else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("ignoring the unreadable file %s: %s", path, error)
        return None
