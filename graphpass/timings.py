"""Products timed on this machine, each once, and remembered between processes.

A product is told from others by what its time depends on, not by which layer of a model it is. On a
CPU a method takes what its kernels take, one by one, like those that were calibrated: run as a
whole without being compiled, every small operation between them would meet cold caches, which it
does not where it is fused. What cannot be timed here keeps the price that is predicted.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from codegen.cache import cache_dir, write_atomically
from codegen.gpu import choice
from cost_model import KernelCost, counted_once
from graphpass import calibration, fingerprint, trial
from graphpass.method import Method
from graphpass.site import Site
from graphpass.timing import best_s

log = logging.getLogger(__name__)

# A product, and what computes it: a method with its parameters, or the vendor (None).
Way = tuple[Site, Method | None, Any]
PriceOf = Callable[[KernelCost], float]
# How long a kernel is called again and again to be timed.
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

    def measure(self, way: Way, kernels: Sequence[KernelCost], price: PriceOf) -> None:
        """Time a product, if that was not done, and remember it.

        Args:
            way: the product, and what computes it.
            kernels: what that runs, with all sizes known.
            price: what kernels are predicted to take; for those that are not ours.
        """
        key = self.key(way)
        if key in self.seconds:
            return
        try:
            with torch.no_grad():
                found = self._time(way, kernels, price)
        except (RuntimeError, MemoryError) as error:
            log.warning("could not time %s: %s", way[0].id, error)
            return
        if found is not None:
            self.seconds[key] = found
            _store(self.seconds, self.device, self.threads)

    def _time(self, way: Way, kernels: Sequence[KernelCost], price: PriceOf) -> float | None:
        """Return the seconds of a product; None where none of its kernels can be timed alone."""
        site, method, params = way
        known = trial.bound(site, self.hints)
        given = trial.operands(known, self.device)
        if self.device != "cpu":
            run = trial.exact(known, given)
            if method is not None:
                # Compiling every candidate would take minutes.
                run = trial.uncompiled(known, method, params, given)
            run()
            # What the host takes for it is a price of its own (`pricing`).
            return choice.seconds_of(choice.replayed(run) if self.device == "cuda" else run)
        if method is None:
            return best_s(trial.exact(known, given), _CALLS_S)
        calls = trial.kernel_calls(known, method, params, given)
        if not calls:
            return None
        return sum(
            best_s(calls[kernel.kind].pop(0), _CALLS_S) if calls.get(kernel.kind) else price(kernel)
            for kernel in counted_once(kernels)
        )


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
