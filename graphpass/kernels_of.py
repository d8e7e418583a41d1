"""The kernels of a product, as the cost model prices them: what vendors' ones and ours depend on.

A product of a convolution and one of a linear layer are described alike: `in` and `out` channels
of a group, `groups`, `rows` (output pixels of all samples, or rows of the layer), `taps` of the
kernel, `stride` (the product over the axes) and `width` (pixels in a row of the output map, as far
as that matters). What only moves data depends on the number of its bytes.
"""

from collections.abc import Mapping
from typing import Any

import sympy

from cost_model import Cost, Dim, KernelCost, Shape, element_count
from graphpass.site import Gradient, Site

# What is no product, fused: with other data in the caches, and with its operands there.
FUSED_COLD, FUSED_WARM = FUSED = ("fused", "fused_warm")
# Kernels work on vectors of pixels; longer rows make no difference.
_WIDEST = 32


def exact(site: Site) -> tuple[KernelCost, ...]:
    """Return the one kernel that computes a product exactly: the vendor's."""
    return (product(site, vendor_kind(site), site.cost),)


def vendor_kind(site: Site) -> str:
    """Return the kind of a product: its operator's and, where it matters, its gradient's name."""
    op = {"addmm": "mm", "baddbmm": "bmm"}.get(site.op, site.op)
    # A batch of products has no weight: its three products are the same to the vendor.
    return op if op == "bmm" else f"{op}_{site.gradient.value}"


def product(
    site: Site, kind: str, cost: Cost, dtype: str | None = None, rows: Dim | None = None
) -> KernelCost:
    """Return a kernel that computes the product of a site, whole or in part.

    Args:
        site: the product.
        kind: what computes it.
        cost: what that takes.
        dtype: element type that it computes in; None for that of the operands.
        rows: how many rows it takes, if not all of them.
    """
    sizes = dict(layer_sizes(site))
    if rows is not None:
        sizes["rows"] = rows
    return KernelCost(kind, cost, dtype or site.dtype, sizes=sizes)


def mover(kind: str, cost: Cost, dtype: str, shared: str = "") -> KernelCost:
    """Return a kernel whose time depends on how many bytes it moves."""
    return KernelCost(kind, cost, dtype, shared, {"bytes": cost.bytes})


def layer_sizes(site: Site) -> Mapping[str, Dim]:
    """Return the sizes of the layer that a product belongs to, whatever its gradient."""
    if site.conv is not None:
        x, w, y = site.shapes
        groups = site.conv.groups
        return {
            "in": x[1] // groups, "out": y[1] // groups, "groups": groups,
            "rows": y[0] * element_count(y[2:]), "taps": element_count(w[2:]),
            "stride": element_count(site.conv.stride), "width": sympy.Min(y[-1], _WIDEST),
        }  # fmt: skip
    if site.op == "attention":
        query, key, value = site.shapes
        return {
            "in": query[-1], "out": value[-1], "groups": element_count(query[:-2]),
            "rows": query[-2], "taps": key[-2], "stride": 1, "width": _WIDEST,
        }  # fmt: skip
    first, second = site.shapes
    rows, inner, columns = first[-2], first[-1], second[-1]
    # Forward is [rows, in] @ [in, out]; the gradients of its factors contract another axis each.
    into, out, number = {
        Gradient.FORWARD: (inner, columns, rows),
        Gradient.INPUT: (columns, inner, rows),
        Gradient.WEIGHT: (columns, rows, inner),
    }[Gradient.FORWARD if vendor_kind(site) == "bmm" else site.gradient]
    return {
        "in": into, "out": out, "groups": element_count(first[:-2]), "rows": number,
        "taps": 1, "stride": 1, "width": sympy.Min(number, _WIDEST),
    }  # fmt: skip


def shared_name(work: str, site: Site, operand: str, *parameters: Any) -> str:
    """Return the name of work on an operand that products of the same layer have in common."""
    number = f".{site.number}" if site.number > 1 else ""
    return " ".join([work, f"{site.name}:{operand}{number}", *map(str, parameters)])


def operand_shape(site: Site, operand: str) -> Shape:
    """Return the shape of an operand, by the name that methods use."""
    names = ("input", "weight", "grad") if site.conv is not None else ("left", "right")
    return site.shapes[names.index(operand)]


def layer_name(site: Site, operand: str) -> str:
    """Return what an operand is to its layer; the factors of a product are named by their places.

    Raises:
        ValueError: if the site has no such operand.
    """
    if site.conv is not None:
        return operand
    names = {
        Gradient.FORWARD: ("input", "weight"),
        Gradient.INPUT: ("grad", "weight"),
        Gradient.WEIGHT: ("grad", "input"),
    }[site.gradient]
    return names[("left", "right").index(operand)]
