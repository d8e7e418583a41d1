"""What was measured on this machine, as it is kept between processes, and the record made of it."""

import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from codegen.cache import cache_dir, write_atomically
from cost_model import DATASHEETS, Cost, EfficiencyTable, Figure, Hardware, KernelCost

log = logging.getLogger(__name__)

_VERSION = 3
# What reading a file that holds something else, or a part of what was written, may raise.
CORRUPT = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
# The kind that bandwidth and the time of a call are taken from.
_MOVING = "elementwise"
# GPUs that are one processor, by their names in `DATASHEETS`.
_HOPPER = ("H100", "H200")
# A launch is no more than this share of what was measured: the rest is what the kernel does.
_LARGEST_LAUNCH = 0.5


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds of one kernel on this machine.

    Attributes:
        kind: key of its efficiency table.
        dtype: element type that it computes in.
        sizes: what its efficiency depends on.
        flops: floating-point operations.
        moved_bytes: bytes read and written.
        seconds: of the fastest call.
    """

    kind: str
    dtype: str
    sizes: Mapping[str, float]
    flops: int
    moved_bytes: int
    seconds: float

    @property
    def identity(self) -> tuple[object, ...]:
        """What was measured, whatever came of it."""
        sizes = tuple(sorted(self.sizes.items()))
        return self.kind, self.dtype, sizes, self.flops, self.moved_bytes

    @classmethod
    def of(cls, kernel: KernelCost, seconds: float) -> "Measurement":
        """Return the record of a kernel whose sizes are all known."""
        flops, read, written = kernel.cost.evaluate()
        sizes = {name: float(size) for name, size in kernel.sizes.items()}
        return cls(kernel.kind, kernel.dtype, sizes, flops, read + written, seconds)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a calibration is good for.

    Attributes:
        processor: its name, and how many there are.
        threads: threads of torch.
        torch: version of torch.
    """

    processor: str
    threads: int
    torch: str

    @classmethod
    def this(cls, threads: int) -> "Machine":
        """Return the machine that this process runs on."""
        return cls(_processor(), threads, torch.__version__)


def path_of(threads: int) -> Path:
    """Return the file that a calibration for this many threads is kept in."""
    return cache_dir() / f"calibration-{threads}.json"


def _command(threads: int) -> str:
    return f"run `python -m graphpass calibrate --threads {threads}`"


def store(found: Iterable[Measurement], threads: int) -> Path:
    """Write measurements of this machine to the user's cache directory.

    Raises:
        OSError: if that cannot be written.
    """
    record = {
        "version": _VERSION,
        "machine": asdict(Machine.this(threads)),
        "measurements": [asdict(measurement) for measurement in found],
    }
    path = path_of(threads)
    write_atomically(path, json.dumps(record))
    return path


def load(threads: int) -> Hardware | str:
    """Return this machine as it was measured, or why that cannot be had, with what to do."""
    found = measurements(threads)
    if isinstance(found, str):
        return found
    try:
        return hardware_of(found, Machine.this(threads))
    except ValueError as error:
        return f"{path_of(threads)} is not complete ({error}): {_command(threads)} again"


def measurements(threads: int) -> list[Measurement] | str:
    """Return what was measured on this machine, or why that cannot be had, with what to do."""
    path = path_of(threads)
    command = _command(threads)
    try:
        record = json.loads(path.read_text())
        machine = Machine(**record["machine"])
        if record["version"] != _VERSION:
            return f"{path} is of another version of graphpass: {command} again"
        if machine != Machine.this(threads):
            return f"{path} was measured elsewhere ({_describe(machine)}): {command} here"
        return [Measurement(**entry) for entry in record["measurements"]]
    except FileNotFoundError:
        return f"this machine was not measured with {threads} threads: {command}"
    except CORRUPT as error:
        return f"{path} cannot be read ({error}): {command} again"


def hardware_of(found: Iterable[Measurement], machine: Machine) -> Hardware:
    """Return a machine's record: the best figures seen, and the share of them each kernel reached.

    Raises:
        ValueError: if nothing was measured in float32 or of what moves bytes, or a figure is
            nonsense.
    """
    given = list(found)
    moved = [one for one in given if one.kind == _MOVING and one.dtype == "float32"]
    if not moved:
        raise ValueError("no bandwidth was measured")
    source = f"measured on {_describe(machine)}"
    peaks: dict[str, float] = {}
    for one in given:
        if one.kind != _MOVING:
            peaks[one.dtype] = max(peaks.get(one.dtype, 1.0), one.flops / one.seconds)
    largest = max(moved, key=lambda one: one.moved_bytes)
    bare = Hardware(
        name=_describe(machine),
        peak_flops_per_s={dtype: Figure(peak, source) for dtype, peak in peaks.items()},
        bandwidth_bytes_per_s=Figure(largest.moved_bytes / largest.seconds, source),
        launch_s=Figure(min(one.seconds for one in moved), source),
        calibrated=True,
    )
    return Hardware(
        bare.name, bare.peak_flops_per_s, bare.bandwidth_bytes_per_s, bare.launch_s,
        _tables(given, bare), calibrated=True,
    )  # fmt: skip


def of_gpu(bare: Hardware) -> Hardware:
    """Return a GPU's record with the shares of its figures that kernels reach, where known.

    They were measured on an H200 (`benchmarks/gpu_measurements.py`), and hold for an H100 as well,
    which differs in nothing but its memory.
    """
    if bare.name not in _HOPPER:
        return bare
    text = files("graphpass").joinpath("h200.json").read_text(encoding="utf-8")
    given = [Measurement(**entry) for entry in json.loads(text)["measurements"]]
    return replace(bare, efficiencies=_tables(given, DATASHEETS["H200"]))


def _tables(given: list[Measurement], bare: Hardware) -> dict[tuple[str, str], EfficiencyTable]:
    rows: dict[tuple[str, str], list[Measurement]] = {}
    for one in given:
        rows.setdefault((one.kind, one.dtype), []).append(one)
    tables = {}
    for key, same in rows.items():
        names = tuple(sorted(same[0].sizes))
        points = tuple(tuple(one.sizes[name] for name in names) for one in same)
        tables[key] = EfficiencyTable(names, points, tuple(_efficiency(one, bare) for one in same))
    return tables


def _efficiency(one: Measurement, bare: Hardware) -> float:
    cost = Cost(one.flops, one.moved_bytes, 0)
    ideal = bare.ideal_s(KernelCost(one.kind, cost, one.dtype, sizes=one.sizes))
    launch = min(bare.launch_s.value, _LARGEST_LAUNCH * one.seconds)
    return ideal / (one.seconds - launch)


def _describe(machine: Machine) -> str:
    return f"{machine.processor}, {machine.threads} threads, torch {machine.torch}"


def _processor() -> str:
    """Return the processor's name, where the system tells it, and how many there are."""
    name: Any = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
        known = {key.strip(): value.strip() for key, value in fields.items()}
        family = f"family {known.get('cpu family', '?')}, model {known.get('model', '?')}"
        name = f"{known['model name']} ({family})" if "model name" in known else name
    return f"{name} x {os.cpu_count()}"
