"""Products timed on this machine, each once, and remembered between processes.

A product is told from others by what its time depends on, not by which layer of a model it is.
Products are timed in the midst of compiling a model, on real operands: in a thread of its own, as
what is being traced, and on which stand-ins, belongs to the thread that traces. What cannot be
timed here, for want of memory, say, keeps the price that is predicted.
"""

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from codegen.cache import cache_dir, write_atomically
from codegen.gpu import choice
from graphpass import calibration, fingerprint, trial
from graphpass.method import Method
from graphpass.site import Site
from graphpass.timing import best_s

log = logging.getLogger(__name__)

# A product, and what computes it: a method with its parameters, or the vendor (None).
Way = tuple[Site, Method | None, Any]
# How long a product is called again and again to be timed.
_CALLS_S = 0.05


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of single products.

    Attributes:
        hints: value of each symbolic size.
        device: type of device that products run on.
        threads: threads of a CPU.
        seconds: what was measured, by `key`.
    """

    hints: Mapping[str, int]
    device: str
    threads: int
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what earlier processes measured."""
        self.seconds.update(_load(self.device, self.threads))

    def key(self, way: Way) -> str:
        """Return what the time of a product depends on."""
        site, method, params = way
        plain = replace(site, name="", path="", node="", layer=0, reason=None, number=1)
        sizes = [self.hints.get(str(d), d) for s in plain.shapes for d in s]
        chosen = [method.name, asdict(params)] if method else "exact"
        return json.dumps(
            [plain.op, plain.gradient, plain.dtype, sizes, repr(plain.conv), chosen], default=str
        )

    def of(self, way: Way) -> float | None:
        """Return the seconds of a product; None if it was not timed."""
        return self.seconds.get(self.key(way))

    def measure(self, way: Way) -> None:
        """Time a product, if that was not done, and remember it."""
        key = self.key(way)
        if key in self.seconds:
            return
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="graphpass-timing") as apart:
                self.seconds[key] = apart.submit(self._time, way, _current_gpu()).result()
        except (RuntimeError, MemoryError) as error:
            log.warning("could not time %s: %s", way[0].id, error)
            return
        _store(self.seconds, self.device, self.threads)

    def _time(self, way: Way, gpu: int | None) -> float:
        site, method, params = way
        # Both belong to a thread, and this one is new.
        if self.device == "cpu":
            torch.set_num_threads(self.threads)
        elif gpu is not None:
            torch.cuda.set_device(gpu)
        known = trial.bound(site, self.hints)
        given = trial.operands(known, self.device)
        if method is None:
            run = trial.exact(known, given)
        else:
            # Compiling every candidate would take minutes.
            run = trial.uncompiled(known, method, params, given)
        with torch.no_grad():
            return best_s(run, _CALLS_S) if self.device == "cpu" else choice.seconds_of(run)


def _current_gpu() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _path(device: str, threads: int) -> Path:
    return cache_dir() / f"measured-{threads if device == 'cpu' else device}.json"


def _identity(device: str, threads: int) -> dict[str, Any]:
    machine = asdict(calibration.Machine.this(threads))
    if device != "cpu":
        machine = {"processor": choice.machine()}
    return {**machine, "code": fingerprint.source_digest()}


def _load(device: str, threads: int) -> dict[str, float]:
    """Return what was measured on this machine with this code; nothing if that is unreadable."""
    path = _path(device, threads)
    try:
        record = json.loads(path.read_text())
        if record["machine"] != _identity(device, threads):
            return {}
        return {str(key): float(value) for key, value in record["seconds"].items()}
    except FileNotFoundError:
        return {}
    except calibration.CORRUPT as error:
        log.warning("ignoring the unreadable file %s: %s", path, error)
        return {}


def _store(measured: Mapping[str, float], device: str, threads: int) -> None:
    """Remember what was measured; a cache that cannot be written is no reason to fail."""
    seconds_by_key = {**_load(device, threads), **measured}
    record = {"machine": _identity(device, threads), "seconds": seconds_by_key}
    try:
        write_atomically(_path(device, threads), json.dumps(record))
    except OSError as error:
        log.warning("could not write to the cache directory: %s", error)
