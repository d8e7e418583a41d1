"""Top-k: the weight gradient from the k largest output gradients of every map.

Wang, Nelaturu, Amarasinghe, "Accelerated CNN Training Through Gradient Approximation", 2019,
Algorithm 1: for every sample n and output channel c only the position p of the largest |g[n, c]|
is kept, weighted by the sum of the whole map, and the input patch it looks at is accumulated:

    dw[c] = scale * sum_n sum_p v[n, c, p] * patch(x[n], p),     sum_p v[n, c, p] = sum g[n, c].

For k > 1 the paper leaves the weights open. Here a kept value keeps what it has, and what the
dropped values sum to is shared out evenly: v[p] = g[p] + (sum g - sum of kept g) / k. The sum of
the map is kept for every k, k = 1 is Algorithm 1, and k = all positions is the exact gradient.

Biased: the choice is deterministic, so the estimate at k < positions is not centred on dw. The
input is read in backward at places known only then, so all of it is kept for backward.
"""

import math
import sys
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from codegen.kernel import kernels, unavailable
from cost_model import Cost, KernelCost, element_count, elementwise
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.feedback import check_feedback, with_feedback
from graphpass.kernels_of import product
from graphpass.method import Method, Sample, no_draw, register
from graphpass.site import ConvGeometry, Gradient, Site

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of the top-k method.

    Attributes:
        k: positions kept of every map.
        scale: factor on the result; the paper's experiments use 1 / 128 with a batch of 128.
        min_positions: least number of map positions per kept one; layers below it stay exact.
            On a 2-core AVX-512 machine the kernel was 3.5 times faster than the vendor library
            with 4 positions, and 3 to 11 times with more; without a compiler, in plain torch, it
            is slower below 64. 1 applies it everywhere.
        feedback: whether a weight gradient is given later what it was not given (error feedback).
    """

    k: int = 1
    scale: float = 1.0
    min_positions: int = 4
    feedback: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        for name in ("k", "min_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"method 'topk': {name}={value!r}; give an integer >= 1")
        is_number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        # Also refuses NaN, and integers larger than every floating-point number.
        if not is_number or not abs(self.scale) <= sys.float_info.max:
            raise ConfigError(f"method 'topk': scale={self.scale!r}; give a finite number")
        check_feedback("topk", self.feedback)


def reference(
    site: Site, params: Params, template: Tensor, draws: None, grad: Tensor, x: Tensor
) -> Tensor:
    """Return the exact weight gradient of the output gradient with all but k values dropped.

    Args:
        site: the weight gradient of a convolution.
        params: parameters of the method.
        template: [Co, Ci/groups, *kernel].
        draws: none.
        grad: [B, Co, *out].
        x: [B, Ci, *in].
    """
    del draws
    conv = _geometry(site)
    maps = grad.flatten(2)
    positions, values = _select(maps, params.k)
    kept = torch.zeros_like(maps).scatter(2, positions, values).view_as(grad)
    weight = torch.empty(template.shape, dtype=template.dtype, device=template.device)
    # A convolution's three products are computed by one operator; the mask asks for dw alone.
    dw: Tensor
    _, dw, _ = aten.convolution_backward(
        kept, x, weight, None, conv.stride, conv.padding, conv.dilation, conv.transposed,
        conv.output_padding, conv.groups, [False, True, False],
    )  # fmt: skip
    return dw * params.scale


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the cost of selecting positions and accumulating patches, which one kernel does."""
    x, w, y = site.shapes
    kept = element_count(y[:2]) * params.k
    patch = element_count(w[1:])
    # |g|, its maximum and its sum are taken in one pass over g.
    selected = elementwise(element_count(y), 1, 0, site.itemsize, flops_per_element=3)
    # One patch of x a kept value: patches overlap, and memory gives each value of x once.
    patches = sympy.Min(kept * patch, element_count(x))
    # They are scaled and added to their filters: one FMA an element.
    summed = Cost(
        2 * kept * patch, patches * site.itemsize, element_count(site.output) * site.itemsize
    )
    return (product(site, "top_patches", selected + summed),)


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept convolutions with enough positions in a map."""
    if site.conv is None:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "a matrix product has no map of positions")
    if site.conv.transposed:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "transposed convolution")
    positions = element_count(site.shapes[2][2:])
    if not isinstance(positions, int):
        return None
    if positions < params.k * params.min_positions:
        detail = f"{positions} positions for k={params.k}, needs {params.min_positions} each"
        return Rejected(Reason.NOT_CHEAPER, detail)
    return None


def lower(
    site: Site, params: Params, template: Tensor, seed: Tensor, salt: int, grad: Tensor, x: Tensor
) -> Tensor:
    """Return the patches that the kept values look at, weighted and summed over samples."""
    del seed, salt
    conv, kernel = _geometry(site), kernels()["top_patches"]
    geometry = map(list, (template.shape[2:], conv.stride, conv.padding, conv.dilation))
    args = (grad, x, *geometry, conv.groups, params.k, float(params.scale))
    if unavailable(kernel, *args) is None:
        result: Tensor = kernel.op(*args)
        return result
    return _lower_in_torch(params, template, conv, grad, x)


def _lower_in_torch(
    params: Params, template: Tensor, conv: ConvGeometry, grad: Tensor, x: Tensor
) -> Tensor:
    """Return the same in plain torch.

    Everything after the selection is one indirect load, one product and one sum, which Inductor
    fuses into a single loop over contiguous channels; no patch is ever stored.
    """
    positions, values = _select(grad.flatten(2), params.k)
    corners = _unravel(positions, tuple(grad.shape[2:]))
    index, inside = _patch_index(corners, tuple(x.shape[2:]), tuple(template.shape[2:]), conv)
    batch, channels = grad.shape[:2]
    samples = torch.arange(batch, device=grad.device)[:, None, None, None]
    group = torch.arange(channels, device=grad.device) // (channels // conv.groups)
    # [B, *in, groups, Ci/groups]: the channels of one pixel are the contiguous axis.
    pixels = x.unflatten(1, (conv.groups, x.shape[1] // conv.groups)).movedim((1, 2), (-2, -1))
    patches = pixels[(samples, *index, group[None, :, None, None])]
    weights = torch.where(inside, (values * params.scale)[..., None], 0.0)
    # [B, Co, k, taps, Ci/groups] -> [Co, taps, Ci/groups]
    dw = (patches * weights[..., None]).sum((0, 2))
    result: Tensor = dw.transpose(1, 2).reshape(template.shape).to(template.dtype)
    return result


def _geometry(site: Site) -> ConvGeometry:
    assert site.conv is not None, site.id
    return site.conv


def _select(maps: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return positions and weights of the kept values: [B, Co, positions] -> [B, Co, k], twice."""
    total = maps.sum(2, keepdim=True)
    if k == 1:
        # arg-max is a plain reduction that fuses with the sum; topk is a library call.
        return maps.abs().argmax(2, keepdim=True), total
    positions = maps.abs().topk(k, dim=2, sorted=False).indices
    values = maps.gather(2, positions)
    return positions, values + (total - values.sum(2, keepdim=True)) / k


def _unravel(positions: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Return the coordinate along each axis of flat positions in a map of `sizes`."""
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(positions % size)
        positions = positions // size
    return coordinates[::-1]


def _patch_index(
    corners: list[Tensor], sizes: tuple[int, ...], kernel: tuple[int, ...], conv: ConvGeometry
) -> tuple[list[Tensor], Tensor]:
    """Return where the taps of each kept output look, and which of them lie inside the input.

    Args:
        corners: output coordinates, [B, Co, k] an axis.
        sizes: the input's spatial sizes.
        kernel: the kernel's spatial sizes.
        conv: geometry of the convolution.

    Returns:
        Input coordinates clamped into the input, [B, Co, k, taps] an axis; bool mask of that shape.
    """
    taps = torch.arange(math.prod(kernel), device=corners[0].device)
    inside = torch.ones((), dtype=torch.bool, device=corners[0].device)
    index = []
    for axis, tap in enumerate(_unravel(taps, kernel)):
        at = (
            corners[axis][..., None] * conv.stride[axis]
            + tap * conv.dilation[axis]
            - conv.padding[axis]
        )
        inside = inside & (at >= 0) & (at < sizes[axis])
        # Padding is a weight of zero on a clamped load: no padded copy of x is made.
        index.append(at.clamp(0, sizes[axis] - 1))
    return index, inside


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, the exact setting, and what must be rejected."""
    nn = torch.nn
    free = Params(min_positions=1)
    return (
        Sample((5, 3, 9, 7), lambda: nn.Conv2d(3, 4, 3, padding=1), Gradient.WEIGHT, Params()),
        Sample(
            (3, 6, 12, 11),
            lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (2, 0), (1, 2), groups=2),
            Gradient.WEIGHT,
            Params(k=3, scale=0.5, min_positions=1),
        ),
        Sample((4, 4, 8, 8), lambda: nn.Conv2d(4, 4, 3, groups=4), Gradient.WEIGHT, free),
        Sample(
            (2, 3, 20),
            lambda: nn.Conv1d(3, 5, 5, padding=2),
            Gradient.WEIGHT,
            Params(k=2, min_positions=1),
        ),
        Sample((2, 2, 5, 4, 6), lambda: nn.Conv3d(2, 3, 2), Gradient.WEIGHT, free),
        Sample(
            (3, 2, 5, 5),
            lambda: nn.Conv2d(2, 3, 3),
            Gradient.WEIGHT,
            Params(k=9, min_positions=1),
            exact=True,
        ),
        Sample(
            (5, 3, 9, 7),
            lambda: nn.Conv2d(3, 4, 3, padding=1),
            Gradient.WEIGHT,
            Params(feedback=True),
        ),
        Sample(
            (5, 3, 5, 5), lambda: nn.Conv2d(3, 4, 3), Gradient.WEIGHT, Params(k=3), rejected=True
        ),
        Sample(
            (2, 3, 9, 9),
            lambda: nn.ConvTranspose2d(3, 5, 3),
            Gradient.WEIGHT,
            Params(),
            rejected=True,
        ),
        Sample((70, 10), lambda: nn.Linear(10, 6), Gradient.WEIGHT, Params(), rejected=True),
    )


register(
    with_feedback(
        Method(
            name="topk",
            summary="the k largest output gradients of every map, weighted to keep the map's sum",
            source="Wang, Nelaturu, Amarasinghe 2019, section 2.3 and Algorithm 1",
            unbiased=False,
            gradients=(Gradient.WEIGHT,),
            params=Params,
            reject=reject,
            cost=cost,
            operands=lambda site, params: ("grad", "input"),
            draw=no_draw,
            reference=reference,
            lower=lower,
            samples=samples,
            fast_on_cpu=True,
            fast_on_gpu=False,
        )
    )
)
