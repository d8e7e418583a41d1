"""What each product of a graph costs in seconds: exact, by a method, and all that is no product.

Seconds come from this machine's calibration, or else from published figures of a machine like it;
every price says from which, and how far off it may be. What a plan turns on and is not known well
enough is timed (`confirm`), once on a machine: close calls, products unlike all that was
calibrated, and everything that would be approximated where nothing was calibrated, as on a GPU.
So a product that the vendor's library computes faster stays with it.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import sympy
import torch

from codegen.gpu.source import tf32_settings
from codegen.kernel import kernels
from cost_model import DATASHEETS, Cost, Hardware, KernelCost, counted_once, seconds
from graphpass import calibration, kernels_of
from graphpass.capture import Analysis
from graphpass.method import Method
from graphpass.site import Site
from graphpass.timings import Timings, Way

log = logging.getLogger(__name__)

# A kernel this many octaves from what was measured, all its sizes together, is a guess.
_FAR = 3.0
# How far off prices may be, relative to them. Of the vendor's products, three in four predicted
# from a calibration are closer to what they take (16 % in fp32, 23 % in bf16: predicted.json). On a
# GPU without one nothing is known of how near kernels come to its published figures.
_CALIBRATED_ERROR, _GUESS_ERROR, _GPU_ERROR = 0.25, 0.5, 1.0
# What it takes on a CPU to get to a kernel of ours, through Python, beside a launch; measured ones
# have it in their figures. Warm, on the smallest operands: 8.7 us, a vendor's product 3.5 us.
_DISPATCH_S = 5e-6
# What the host takes on a GPU to get from one kernel of a step to the next, and for a kernel of
# ours, which launches two or three: that of an H200 took 31 ms for a bf16 step of ResNet-50, whose
# 24 longest kernels took 13, and 56 to 90 us for calls of ours, 25 for the vendor's
# (gpu_steps.json).
_HOST_S, _GPU_CALL_S = 60e-6, 60e-6
# A step whose kernels take so many times what its host takes does not wait for the host.
_AHEAD = 2.0
# How long products may be timed for the plans of one graph, in seconds, by the type of device. On
# a GPU nothing is known before, and kernels take longer to compile, if for the step as well.
TIMING_S = {"cpu": 5.0, "cuda": 60.0}
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
        error: how far off the seconds may be, relative to them.
    """

    seconds: float
    shared: Mapping[str, float]
    source: str
    error: float = 0.0


class Pricing(Protocol):
    """What the planner asks for."""

    def exact(self, site: Site) -> Price:
        """Return the price of the exact product."""

    def approximate(self, site: Site, method: Method, params: Any) -> Price:
        """Return the price of a product by a method."""

    def rest(self, approximated: float = 0.0) -> Price:
        """Return the price of all that is no product, the optimizer excluded."""

    def confirm(self, doubtful: Iterable[Sequence[Way]]) -> bool:
        """Time what is compared, as far as there is time; return whether a price changed."""


def of(analysis: Analysis, threads: int, replays: bool = False) -> "HardwarePricing":
    """Return the prices of a graph on the machine it will run on.

    Args:
        analysis: what the graph holds.
        threads: threads that a CPU runs it with.
        replays: whether a GPU replays it as CUDA graphs.
    """
    if analysis.device != "cpu":
        return HardwarePricing(_gpu(analysis.device), analysis, threads, replays)
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
            return calibration.of_gpu(hardware)
    log.info("there are no figures of %r: those of %s stand in", name or device, _UNKNOWN_GPU)
    return DATASHEETS[_UNKNOWN_GPU]


class HardwarePricing:
    """Prices from a machine's record, and from what was timed of single products.

    Attributes:
        hardware: the machine.
        analysis: the graph.
        replays: whether a GPU replays it as CUDA graphs.
        timings: what was timed.
    """

    def __init__(
        self, hardware: Hardware, analysis: Analysis, threads: int, replays: bool = False
    ) -> None:
        """Read what earlier processes timed; see `of`."""
        self.hardware = hardware
        self.replays = replays
        self.analysis = analysis
        self.timings = Timings(analysis.hints, analysis.device, threads)
        self._left_s = TIMING_S.get(analysis.device, 0.0)

    @property
    def source(self) -> str:
        """Where prices come from that were not measured."""
        return "calibrated" if self.hardware.calibrated else "datasheet"

    def exact(self, site: Site) -> Price:
        """Return the price of the exact product."""
        return self._price((site, None, None))

    def approximate(self, site: Site, method: Method, params: Any) -> Price:
        """Return the price of a product by a method.

        Where the exact product was timed, and this was not, it is supposed to take as many times
        what is predicted: what was timed is to be compared with its like.
        """
        price, exact = self._price((site, method, params)), (site, None, None)
        if price.source == "measured" or self.timings.of(exact) is None:
            return price
        factor = self._price(exact).seconds / self._predicted(exact).seconds
        return _scaled(price, price.seconds * factor)

    def rest(self, approximated: float = 0.0) -> Price:
        """Return the price of all that is no product, the optimizer excluded.

        Exact products fill the caches with their operands, approximations with a quarter of that,
        or less, and what was computed just before is still there. Under 8-bit gradients the
        generated code of ResNet-20 took 41 ms, in an exact step 59; that of ResNet-18, whose maps
        are larger than the cache of 32 MB, 0.93 to 0.99 of what it took.

        Args:
            approximated: share of the products' exact time that is approximated.
        """
        shares = zip(kernels_of.FUSED, (1 - approximated, approximated), strict=True)
        return Price(
            sum(share * self._rest_s(kind) for kind, share in shares if share), {}, self.source
        )

    def _rest_s(self, kind: str) -> float:
        moved = self.analysis.rest_bytes
        # Under autocast, what lies between products has their type, and is computed in float32.
        types = Counter(site.dtype for site in self.analysis.sites)
        dtype = max(types, key=types.__getitem__, default="float32")
        known = (kind, dtype) in self.hardware.efficiencies
        fused = (
            kernels_of.mover(kind, Cost(0, count, 0), dtype if known else "float32")
            for count in moved
        )
        return seconds(fused, self.hardware)

    def confirm(self, doubtful: Iterable[Sequence[Way]]) -> bool:
        """Time what is compared, as far as there is time; return whether a price changed.

        Nothing is timed where other processes train the same model: they would plan differently.

        Args:
            doubtful: ways to compute a product that are compared, in the order of importance.
        """
        before = len(self.timings.seconds)
        if self.can_time and self._left_s > 0:
            gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
            # A graph is planned in the midst of being compiled: what is traced, and on which
            # stand-ins, belongs to the thread that traces.
            with ThreadPoolExecutor(1, thread_name_prefix="graphpass-timing") as apart:
                apart.submit(self._time, doubtful, gpu).result()
        return len(self.timings.seconds) > before

    def _time(self, doubtful: Iterable[Sequence[Way]], gpu: int | None) -> None:
        """Time what is compared, in a thread that is new: it has no device and threads yet."""
        if gpu is not None:
            torch.cuda.set_device(gpu)
        torch.set_num_threads(self.timings.threads)
        for ways in doubtful:
            if self._left_s <= 0:
                log.info("%s keeps a doubtful price: there is no time left", ways[0][0].id)
                break
            start = time.perf_counter()
            for way in ways:
                self.timings.measure(way, self._kernels(way), self._kernel_s)
            self._left_s -= time.perf_counter() - start

    @property
    def can_time(self) -> bool:
        """Whether products can be timed in this process."""
        here = self.analysis.device == "cpu" or torch.cuda.is_available()
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        return here and not several

    def identity(self, site: Site) -> str:
        """Return what the time of an exact product depends on, not which layer it belongs to."""
        return self.timings.key((site, None, None))

    def _price(self, way: Way) -> Price:
        measured = self.timings.of(way)
        if measured is None:
            return self._predicted(way)
        return self._of_kernels(self._kernels(way), measured, "measured", 0.0)

    def _predicted(self, way: Way) -> Price:
        bound = self._kernels(way)
        seconds_of_each = [self._kernel_s(kernel) for kernel in counted_once(bound)]
        return self._of_kernels(bound, seconds_of_each, self.source, self._error(bound))

    def _of_kernels(
        self, bound: Sequence[KernelCost], each: Sequence[float], source: str, error: float
    ) -> Price:
        """Return the price of kernels that take so many seconds each, those that are run."""
        run = zip(counted_once(bound), each, strict=True)
        shared = {kernel.shared: kernel_s for kernel, kernel_s in run if kernel.shared}
        return Price(sum(each) + self._host_s(bound), shared, source, error)

    def _host_s(self, bound: Iterable[KernelCost]) -> float:
        """Return what a product takes longer for the host's sake.

        In a step of small kernels a GPU waits for the host, which every call of ours delays.
        """
        if self.analysis.device == "cpu" or not self._waits:
            return 0.0
        return _GPU_CALL_S * sum(kernel.kind in kernels() for kernel in counted_once(bound))

    @cached_property
    def _waits(self) -> bool:
        """Whether a GPU waits for the host in an exact step."""
        if self.replays:
            return False
        exact = [self._kernels((site, None, None)) for site in self.analysis.sites]
        busy_s = sum(self._kernel_s(kernel) for bound in exact for kernel in bound)
        busy_s += self._rest_s(kernels_of.FUSED_COLD)
        launched = len(exact) + len(self.analysis.rest_bytes)
        return busy_s < _AHEAD * _HOST_S * launched

    def _kernels(self, way: Way) -> list[KernelCost]:
        site, method, params = way
        return self._bound(method.cost(site, params) if method else kernels_of.exact(site))

    def _kernel_s(self, kernel: KernelCost) -> float:
        ours = self.analysis.device == "cpu" and kernel.kind in kernels()
        extra = _DISPATCH_S if ours and self._is_guess(kernel) else 0.0
        return self.hardware.kernel_s(kernel) + extra

    def _error(self, bound: Iterable[KernelCost]) -> float:
        """Return how far off a prediction may be."""
        on_cpu = self.analysis.device == "cpu"
        if any(map(self._is_guess, bound)):
            return _GUESS_ERROR if on_cpu else _GPU_ERROR
        # What is known of a GPU was measured on another one.
        return _CALIBRATED_ERROR if on_cpu else _GUESS_ERROR

    def _is_guess(self, kernel: KernelCost) -> bool:
        """Return whether a kernel is unlike all that was measured on this machine."""
        return self.hardware.efficiency(kernel).distance > _FAR

    def _bound(self, symbolic: Iterable[KernelCost]) -> list[KernelCost]:
        """Return kernels with the value of every symbolic size in its place."""
        return [self._bind(kernel) for kernel in map(self._narrowed, symbolic)]

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


def _scaled(price: Price, whole_s: float) -> Price:
    """Return a price of so many seconds: what was timed is a whole product, not what it shares."""
    factor = whole_s / price.seconds
    shared = {name: part * factor for name, part in price.shared.items()}
    return replace(price, seconds=whole_s, shared=shared)
