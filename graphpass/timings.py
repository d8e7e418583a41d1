"""Products timed on this machine, each once, and remembered between processes.

A product is told from others by what its time depends on, not by which layer of a model it is. On a
CPU a method takes what its kernels take, in their order: run as a whole without being compiled,
what is between them would be done one small operation after the other, and not fused. What cannot
be timed here keeps the price that is predicted.

Kernels are called as they are in a step. The operand that was computed last is in the caches, the
others are not, and what one kernel writes the next one reads. Each behind caches of other data,
those of 8-bit gradients of ResNet-20 took 1.5 to 1.7 times as long together as they do in a step,
where one that prunes and multiplies at once took 1.3 times as long: small kernels, such as those
that round a weight, meet cold caches throughout.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from codegen import build
from codegen.cache import cache_dir, write_atomically
from codegen.gpu import choice
from cost_model import KernelCost, counted_once
from graphpass import calibration, fingerprint, trial
from graphpass.method import Method
from graphpass.site import Site
from graphpass.timing import fastest, fill_caches_but

log = logging.getLogger(__name__)

# A product, and what computes it: a method with its parameters, or the vendor (None).
Way = tuple[Site, Method | None, Any]
PriceOf = Callable[[KernelCost], float]
# Of the kernels that a product is, each once, in the order of its cost.
Seconds = tuple[float, ...]
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
        tried: keys of what need not be timed again in this process.
    """

    hints: Mapping[str, int]
    device: str
    threads: int
    seconds: dict[str, Seconds] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Read what earlier processes measured."""
        self.seconds.update(_load(self.device, self.threads))
        self.tried.update(self.seconds)

    def key(self, way: Way) -> str:
        """Return what the time of a product depends on."""
        site, method, params = way
        plain = replace(site, name="", path="", node="", layer=0, reason=None, number=1)
        sizes = [self.hints.get(str(d), d) for s in plain.shapes for d in s]
        chosen = [method.name, asdict(params)] if method else "exact"
        return json.dumps(
            [plain.op, plain.gradient, plain.dtype, sizes, repr(plain.conv), chosen], default=str
        )

    def of(self, way: Way) -> Seconds | None:
        """Return the seconds of a product's kernels, in their order; None if it was not timed."""
        return self.seconds.get(self.key(way))

    def measure(self, way: Way, kernels: Sequence[KernelCost], price: PriceOf) -> None:
        """Time a product, if that was not done, and remember it.

        Args:
            way: the product, and what computes it.
            kernels: what that runs, with all sizes known.
            price: what kernels are predicted to take; for those that are not ours.
        """
        key = self.key(way)
        if key in self.tried:
            return
        self.tried.add(key)
        try:
            with torch.no_grad():
                found = self._time(way, list(counted_once(kernels)), price)
        except (RuntimeError, MemoryError) as error:
            log.warning("could not time %s: %s", way[0].id, error)
            return
        if found is not None:
            self.seconds[key] = found
            _store(self.seconds, self.device, self.threads)

    def _time(self, way: Way, kernels: Sequence[KernelCost], price: PriceOf) -> Seconds | None:
        """Return the seconds of each kernel of a product; None where that cannot be known here."""
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
            whole_s = choice.seconds_of(choice.replayed(run) if self.device == "cuda" else run)
            return _divided(whole_s, [price(kernel) for kernel in kernels])
        calls = trial.kernel_calls(known, method, params, given) if method else {}
        if method is not None and not calls:
            return None
        ours = {i: calls[k.kind].pop(0) for i, k in enumerate(kernels) if calls.get(k.kind)}
        runs = list(ours.values()) if method else [trial.exact(known, given)]
        # No compiler is to run beside it.
        build.wait()
        found = fastest(runs, _CALLS_S, partial(fill_caches_but, trial.just_computed(known, given)))
        if found.disturbed:
            log.info("%s keeps its price: the machine is busy with other programs", site.id)
            return None
        if method is None:
            return _divided(found.seconds[0], [price(kernel) for kernel in kernels])
        timed = dict(zip(ours, found.seconds, strict=True))
        return tuple(timed.get(i) or price(kernel) for i, kernel in enumerate(kernels))


def _divided(whole_s: float, parts: Sequence[float]) -> Seconds:
    """Return seconds in proportion to what the parts were predicted to take."""
    return tuple(whole_s * part / sum(parts) for part in parts)


def _path(device: str, threads: int) -> Path:
    return cache_dir() / f"measured-{threads if device == 'cpu' else device}.json"


def _identity(device: str, threads: int) -> dict[str, Any]:
    machine = asdict(calibration.Machine.this(threads))
    if device != "cpu":
        machine = {"processor": choice.machine()}
    return {**machine, "code": fingerprint.source_digest()}


def _load(device: str, threads: int) -> dict[str, Seconds]:
    """Return what was measured on this machine with this code; nothing if that is unreadable."""
    path = _path(device, threads)
    try:
        record = json.loads(path.read_text())
        if record["machine"] != _identity(device, threads):
            return {}
        return {str(key): tuple(map(float, each)) for key, each in record["seconds"].items()}
    except FileNotFoundError:
        return {}
    except calibration.CORRUPT as error:
        log.warning("ignoring the unreadable file %s: %s", path, error)
        return {}


def _store(measured: Mapping[str, Seconds], device: str, threads: int) -> None:
    """Remember what was measured; a cache that cannot be written is no reason to fail."""
    seconds_by_key = {**_load(device, threads), **measured}
    record = {"machine": _identity(device, threads), "seconds": seconds_by_key}
    try:
        write_atomically(_path(device, threads), json.dumps(record))
    except OSError as error:
        log.warning("could not write to the cache directory: %s", error)
