"""What is remembered on disk about a graph, so that the next process need not trace it."""

import contextlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sympy

from codegen.cache import cache_dir, write_atomically
from cost_model import Dim
from graphpass.capture import Analysis
from graphpass.errors import Reason
from graphpass.site import ConvGeometry, Gradient, Site

# Files of another format are looked at anew.
_VERSION = 3

log = logging.getLogger(__name__)

# What reading a file that holds something else, or a part of what was written, may raise.
_CORRUPT = (
    OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


def load(key: str) -> Analysis | None:
    """Return the remembered analysis of the graph with this digest, or None."""
    path = _path(key)
    try:
        record = json.loads(path.read_text())
        if record["version"] != _VERSION:
            return None
        sites = tuple(_site_from(entry) for entry in record["sites"])
        return Analysis(
            sites,
            dict(record["hints"]),
            int(record["saved_bytes"]),
            dict(record["variants"]),
            flow=_pairs(record["flow"]),
            ends=_pairs(record["ends"]),
            remembered=True,
            rest_bytes=tuple(map(int, record["rest_bytes"])),
            device=str(record["device"]),
        )
    except FileNotFoundError:
        return None
    except _CORRUPT as error:
        log.warning("ignoring the unreadable file %s: %s", path, error)
        return None


def store(key: str, analysis: Analysis) -> None:
    """Remember an analysis; a cache that cannot be written is no reason to fail."""
    record = {"version": _VERSION, **asdict(analysis)}
    try:
        write_atomically(_path(key), json.dumps(record, default=str))
    except OSError as error:
        log.warning("could not write to the cache directory: %s", error)


def forget(key: str) -> None:
    """Remove what is remembered of a graph, where that can be done."""
    with contextlib.suppress(OSError):
        _path(key).unlink(missing_ok=True)


def _path(key: str) -> Path:
    return cache_dir() / "graphs" / f"{key}.json"


def _dim_from(dim: int | str) -> Dim:
    return dim if isinstance(dim, int) else sympy.sympify(dim)


def _pairs(record: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(tail), int(head)) for tail, head in record)


def _site_from(record: dict[str, Any]) -> Site:
    conv = record.pop("conv")
    geometry = None
    if conv is not None:
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in conv.items()}
        geometry = ConvGeometry(**lists)
    shapes = tuple(tuple(map(_dim_from, shape)) for shape in record.pop("shapes"))
    output = tuple(map(_dim_from, record.pop("output")))
    gradient = Gradient(record.pop("gradient"))
    reason = record.pop("reason")
    factors = tuple(record.pop("factors"))
    return Site(
        **record,
        shapes=shapes,
        output=output,
        gradient=gradient,
        conv=geometry,
        factors=factors,
        reason=None if reason is None else Reason(reason),
    )
