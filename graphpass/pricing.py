"""What each product of a graph costs in seconds: exact, by a method, and all that is no product.

Seconds come from this machine's calibration, or else from published figures of a machine like it;
every price says from which. Published figures of a GPU say little of how near kernels come to them:
there the products that a plan would approximate are timed once, exact and approximated, and the
figures are remembered (`confirm`). So a product that the vendor's library computes faster stays
with it.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import sympy
import torch
from torch._guards import tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily

from codegen.cache import cache_dir, write_atomically
from codegen.gpu import choice
from codegen.gpu.source import tf32_settings
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
# How the kinds of the vendor's products begin that are not convolutions.
_MATRICES = ("mm", "bmm", "attention")
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

    def confirm(self, chosen: Iterable["Chosen"]) -> bool:
        """Time what a plan would do, where that is called for; return whether a price changed."""


# A product, and what approximates it.
Chosen = tuple[Site, Method, Any]


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
        self.measured.update(_load(self.analysis.device, self.threads))

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

    def confirm(self, chosen: Iterable[Chosen]) -> bool:
        """Time what a plan would do, where a GPU has no better prices; return whether one changed.

        Args:
            chosen: the products that would be approximated.
        """
        if not self.guesses_about_a_gpu:
            return False
        before = len(self.measured)
        for site, method, params in chosen:
            self.measure(site)
            self.measure(site, method, params)
        return len(self.measured) > before

    @property
    def guesses_about_a_gpu(self) -> bool:
        """Whether prices are published ones of a GPU that is here."""
        on_gpu = self.analysis.device == "cuda" and torch.cuda.is_available()
        return on_gpu and not self.hardware.calibrated

    def measure(self, site: Site, method: Method | None = None, params: Any = None) -> Price:
        """Time a product on this machine, once, and remember it.

        Args:
            site: the product.
            method: what approximates it; None for the exact product.
            params: parameters of the method.

        Returns:
            The price measured; where the product cannot be timed, the one predicted.
        """
        key = self._key(site, method, params)
        if key not in self.measured and site.op != "attention":
            # Graphs are planned while they are being compiled, on fake tensors.
            with unset_fake_temporarily(), tracing(None):
                self.measured[key] = self._time(site, method, params)
            _store(self.measured, self.analysis.device, self.threads)
        return self.exact(site) if method is None else self.approximate(site, method, params)

    def _time(self, site: Site, method: Method | None, params: Any) -> float:
        device = self.analysis.device
        known = trial.bound(site, self.analysis.hints)
        given = trial.operands(known, device)
        if method is None:
            run = trial.exact(known, given)
        elif device == "cpu":
            run = trial.approximate(known, method, params, given)
        else:
            # Compiling every candidate would take minutes.
            run = trial.uncompiled(known, method, params, given)
        return best_s(run, _CALLS_S) if device == "cpu" else choice.seconds_of(run)

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
        return [self._bind(kernel) for kernel in map(self._narrowed, kernels)]

    def _narrowed(self, kernel: KernelCost) -> KernelCost:
        """Return a kernel in the type that a GPU multiplies float32 as, where that is allowed."""
        is_product = kernel.dtype == "float32" and "taps" in kernel.sizes
        if self.analysis.device != "cuda" or not is_product:
            return kernel
        of_maps, of_matrices = tf32_settings()
        allowed = of_matrices if kernel.kind.startswith(_MATRICES) else of_maps
        return replace(kernel, dtype="tf32") if allowed else kernel

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
