"""What each product of a graph costs in seconds: exact, by a method, and all that is no product.

Seconds come from this machine's calibration, or else from published figures of a machine like it;
every price says from which. Where a price decides, the product is timed once on this machine, and
the figure is remembered: `measure`.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import sympy
import torch

from codegen.cache import cache_dir, write_atomically
from cost_model import DATASHEETS, Cost, Hardware, KernelCost, seconds
from graphpass import calibration, fingerprint, kernels_of, trial
from graphpass.capture import Analysis
from graphpass.method import Method
from graphpass.site import Site
from graphpass.timing import best_s

log = logging.getLogger(__name__)

# A kernel this many octaves from what was measured, all its sizes together, is a guess.
_FAR = 3.0
# How long a product is called again and again to be timed.
_CALLS_S = 0.2
# Those of a data centre stand in for a GPU that has no record.
_UNKNOWN_GPU, _UNKNOWN_CPU = "A100", "AVX-512 CPU"


@dataclass(frozen=True, slots=True)
class Price:
    """Seconds of one product.

    Attributes:
        seconds: of the whole product, shared kernels included.
        shared: seconds of the shared kernels among them, by name.
        source: "datasheet", "calibrated" or "measured".
    """

    seconds: float
    shared: Mapping[str, float]
    source: str


class Pricing(Protocol):
    """What the planner asks for."""

    def exact(self, site: Site) -> Price:
        """Return the price of the exact product."""

    def approximate(self, site: Site, method: Method, params: Any) -> Price:
        """Return the price of a product by a method."""

    def rest(self) -> Price:
        """Return the price of all that is no product, the optimizer excluded."""


def of(analysis: Analysis, threads: int) -> "HardwarePricing":
    """Return the prices of a graph on the machine it will run on.

    Args:
        analysis: what the graph holds.
        threads: threads that a CPU runs it with.
    """
    if analysis.device != "cpu":
        return HardwarePricing(_gpu(analysis.device), analysis, threads)
    hardware = calibration.load(threads)
    if isinstance(hardware, str):
        log.info("prices are those of %s: %s", _UNKNOWN_CPU, hardware)
        hardware = DATASHEETS[_UNKNOWN_CPU]
    return HardwarePricing(hardware, analysis, threads)


def _gpu(device: str) -> Hardware:
    """Return the published figures of a GPU, or of one like it."""
    name = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else ""
    for known, hardware in DATASHEETS.items():
        if known.lower() in name.lower():
            return hardware
    log.info("there are no figures of %r: those of %s stand in", name or device, _UNKNOWN_GPU)
    return DATASHEETS[_UNKNOWN_GPU]


@dataclass(frozen=True, slots=True)
class HardwarePricing:
    """Prices from a machine's record, and from what was measured of single products.

    Attributes:
        hardware: the machine.
        analysis: the graph.
        threads: threads of a CPU.
        measured: seconds of the products that were timed, by their identity.
    """

    hardware: Hardware
    analysis: Analysis
    threads: int
    measured: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what earlier processes measured."""
        self.measured.update(_load(self.threads))

    @property
    def source(self) -> str:
        """Where prices come from that were not measured."""
        return "calibrated" if self.hardware.calibrated else "datasheet"

    def exact(self, site: Site) -> Price:
        """Return the price of the exact product."""
        return self._price(site, kernels_of.exact(site), self._key(site, None, None))

    def approximate(self, site: Site, method: Method, params: Any) -> Price:
        """Return the price of a product by a method."""
        return self._price(site, method.cost(site, params), self._key(site, method, params))

    def rest(self) -> Price:
        """Return the price of all that is no product, the optimizer excluded."""
        kernels = (
            kernels_of.mover("fused", Cost(0, moved, 0), "float32")
            for moved in self.analysis.rest_bytes
        )
        return Price(seconds(kernels, self.hardware), {}, self.source)

    def doubtful(self, site: Site, method: Method | None = None, params: Any = None) -> bool:
        """Return whether a price is a guess: far from all that was measured on this machine.

        Args:
            site: the product.
            method: what approximates it; None for the exact product.
            params: parameters of the method.
        """
        if self._key(site, method, params) in self.measured:
            return False
        kernels = method.cost(site, params) if method else kernels_of.exact(site)
        return any(
            self.hardware.efficiency(kernel).distance > _FAR for kernel in self._bound(kernels)
        )

    def measure(self, site: Site, method: Method | None = None, params: Any = None) -> Price:
        """Time a product on this machine, once, and remember it.

        Args:
            site: the product.
            method: what approximates it; None for the exact product.
            params: parameters of the method.

        Returns:
            The price measured; on another device than a CPU, the one predicted.
        """
        key = self._key(site, method, params)
        if self.analysis.device == "cpu" and key not in self.measured:
            known = trial.bound(site, self.analysis.hints)
            given = trial.operands(known)
            run = trial.exact(known, given)
            if method is not None:
                run = trial.approximate(known, method, params, given)
            self.measured[key] = best_s(run, _CALLS_S)
            _store(self.measured, self.threads)
        return self.exact(site) if method is None else self.approximate(site, method, params)

    def identity(self, site: Site) -> str:
        """Return what the time of an exact product depends on, not which layer it belongs to."""
        return self._key(site, None, None)

    def _price(self, site: Site, kernels: Iterable[KernelCost], key: str) -> Price:
        bound = self._bound(kernels)
        predicted = seconds(bound, self.hardware)
        shared = {k.shared: self.hardware.kernel_s(k) for k in bound if k.shared}
        if key not in self.measured:
            return Price(predicted, shared, self.source)
        # What was timed is the whole product: its shares are those predicted.
        factor = self.measured[key] / predicted
        scaled = {name: part * factor for name, part in shared.items()}
        return Price(self.measured[key], scaled, "measured")

    def _bound(self, kernels: Iterable[KernelCost]) -> list[KernelCost]:
        """Return kernels with the value of every symbolic size in its place."""
        return [self._bind(kernel) for kernel in kernels]

    def _bind(self, kernel: KernelCost) -> KernelCost:
        cost = kernel.cost
        symbols = cost.flops.free_symbols | cost.bytes.free_symbols
        for size in kernel.sizes.values():
            symbols |= sympy.sympify(size).free_symbols
        if not symbols:
            return kernel
        # By name: traced symbols carry assumptions with them.
        return kernel.subs({symbol: self.analysis.hints[str(symbol)] for symbol in symbols})

    def _key(self, site: Site, method: Method | None, params: Any) -> str:
        """Return what a product's time depends on; not which layer of a model it is."""
        plain = replace(site, name="", path="", node="", layer=0, reason=None, number=1)
        sizes = [self.analysis.hints.get(str(d), d) for s in plain.shapes for d in s]
        chosen = [method.name, asdict(params)] if method else "exact"
        return json.dumps(
            [plain.op, plain.gradient, plain.dtype, sizes, repr(plain.conv), chosen], default=str
        )


def _path(threads: int) -> Any:
    return cache_dir() / f"measured-{threads}.json"


def _identity(threads: int) -> dict[str, Any]:
    machine = asdict(calibration.Machine.this(threads))
    return {**machine, "code": fingerprint.source_digest()}


def _load(threads: int) -> dict[str, float]:
    """Return what was measured on this machine with this code; nothing if that is unreadable."""
    try:
        record = json.loads(_path(threads).read_text())
        if record["machine"] != _identity(threads):
            return {}
        return {str(key): float(value) for key, value in record["seconds"].items()}
    except FileNotFoundError:
        return {}
    except calibration.CORRUPT as error:
        log.warning("ignoring the unreadable file %s: %s", _path(threads), error)
        return {}


def _store(measured: Mapping[str, float], threads: int) -> None:
    """Remember what was measured; a cache that cannot be written is no reason to fail."""
    record = {"machine": _identity(threads), "seconds": {**_load(threads), **measured}}
    try:
        write_atomically(_path(threads), json.dumps(record))
    except OSError as error:
        log.warning("could not write to the cache directory: %s", error)
