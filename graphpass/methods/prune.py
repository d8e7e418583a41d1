"""Prune: both gradients of a convolution from a stochastically pruned output gradient.

Ye et al., "Accelerating CNN Training by Pruning Activation Gradients", 2020, sections 3.2 and 4.
With the threshold tau, a value of the output gradient g is replaced by

    g  if |g| >= tau;    otherwise  sign(g) tau  with probability |g| / tau,  and 0 with the rest.

Unbiased, given tau: for |g| < tau, E = sign(g) tau |g| / tau = g; both products are linear in g, so
E dx and E dw are exact. A pruned value has the variance |g| tau - g^2, and values are drawn
independently. `block` > 1 prunes blocks b of neighbouring channels of one pixel with one draw: the
same with |b| for |g| and b / |b| for the sign.

The threshold (DBTD) supposes g ~ N(0, sigma^2) and lets a share p of the values be smaller:

    sigma = sqrt(pi / 2) mean |g|,    tau = Phi^-1((1 + p) / 2) sigma.

(The paper prints sqrt(2 / pi) and Phi^-1((1 - p) / 2), which is negative.) The expected share of
non-zeros, min(1, |g| / tau) on average, is at most mean |g| / tau: 0.31 at p = 0.99, and 0.15 to
0.25 in trained networks, whose gradients have heavier tails.

Where to prune: behind batch normalisation the paper prunes the gradient that enters a convolution's
backward pass, and without it the input gradient that leaves one, before the ReLU masks it. Pruning
a value and masking it commute, so both are the pruning of g here, if the mean is taken over those
values that no mask has set to zero; behind batch normalisation that is all of them.

Both products of a layer draw the same numbers, so they see one and the same pruned g. It pays from
16 input channels a group on: the kernels multiply vectors of them.
"""

import math
import zlib
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from codegen import draws as random_draws
from codegen import pruning
from codegen.kernel import kernels, unavailable
from cost_model import Cost, KernelCost, element_count, elementwise, reduce
from graphpass.errors import ConfigError, Reason, Rejected
from graphpass.kernels_of import mover, product, shared_name
from graphpass.method import Method, Prior, Sample, register
from graphpass.site import ConvGeometry, Gradient, Site

aten = torch.ops.aten

_BLOCKS = (1, 2, 4, 8, 16)
# A hash of about 20 integer operations, a product and a comparison; drawn once for both products,
# or twice: that is the kernels' business.
_FLOPS_PER_DRAW = 25
# How many more channels than in 32 bits make it worthwhile in 16.
_NARROW_FACTOR = 4


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of stochastic pruning.

    Attributes:
        p: share of the values below the threshold, if they are normally distributed; in (0, 1).
        block: channels that are pruned together; a power of two up to 16.
        min_channels: least number of input channels a group; layers below it stay exact. On an
            AVX-512 core, input gradients were 1.6 times faster than the vendor's with 16 channels,
            weight gradients as fast. Four times as many are needed in 16 bits, which the vendor
            multiplies twice as fast. 1 applies it everywhere.
    """

    p: float = 0.99
    block: int = 1
    min_channels: int = 16

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        is_number = isinstance(self.p, (int, float)) and not isinstance(self.p, bool)
        if not is_number or not 0 < self.p < 1:
            raise ConfigError(f"method 'prune': p={self.p!r}; give a number between 0 and 1")
        if isinstance(self.block, bool) or self.block not in _BLOCKS:
            raise ConfigError(
                f"method 'prune': block={self.block!r}; give one of {', '.join(map(str, _BLOCKS))}"
            )
        least = self.min_channels
        if not isinstance(least, int) or isinstance(least, bool) or least < 1:
            raise ConfigError(f"method 'prune': min_channels={least!r}; give an integer >= 1")


def draw(site: Site, params: Params, template: Tensor, seed: Tensor, salt: int) -> Tensor:
    """Return a uniform number for each block of g: float32, flat, channels inside pixels."""
    del template, salt
    count = element_count(site.shapes[2]) // params.block
    return random_draws.uniform(seed, count, _salt(site))


def reference(
    site: Site, params: Params, template: Tensor, draws: Tensor, grad: Tensor, other: Tensor
) -> Tensor:
    """Return the exact product of the pruned output gradient.

    Args:
        site: the weight or input gradient of a convolution.
        params: parameters of the method.
        template: [Co, Ci/groups, *kernel] or [B, Ci, *in].
        draws: [B * out * Co/block], uniform in (0, 1).
        grad: [B, Co, *out].
        other: the input [B, Ci, *in], or the weight [Co, Ci/groups, *kernel].
    """
    batch, channels, *out = grad.shape
    uniform = draws.view(batch, *out, channels // params.block).movedim(-1, 1)
    pruned = pruning.prune(grad, threshold(grad, params), uniform, params.block)
    return _product(site, pruned, other, template.shape)


def threshold(grad: Tensor, params: Params) -> Tensor:
    """Return tau: 0-d, in float32 or wider.

    Blocks that are zero, by a ReLU's mask, do not count.
    """
    norms = pruning.norms(grad.to(torch.promote_types(grad.dtype, torch.float32)), params.block)
    mean = norms.sum() / (norms != 0).sum().clamp(min=1)
    return mean / largest_density(params)


def largest_density(params: Params) -> float:
    """Return the largest share of non-zeros to be expected among values that no mask set to 0."""
    return math.sqrt(2 / math.pi) / NormalDist().inv_cdf((1 + params.p) / 2)


def density(grad: Tensor, params: Params) -> Tensor:
    """Return the share of g that is expected to be left: the paper's rho_nnz, 0-d."""
    norms = pruning.norms(grad.to(torch.promote_types(grad.dtype, torch.float32)), params.block)
    return torch.where(norms > 0, norms / threshold(grad, params), 0.0).clamp(max=1).mean()


def cost(site: Site, params: Params) -> tuple[KernelCost, ...]:
    """Return the expected cost of a threshold, of drawing and of the products that are left."""
    exact, values = site.cost, element_count(site.shapes[2])
    # The mean of the norms; where g is computed, if it is fused with that.
    mean = reduce(values, 1, site.itemsize)
    shared = shared_name("prune threshold", site, "grad", params.p, params.block)
    # g is read once more, pruned and multiplied at once.
    pruned = (
        elementwise(values, 0, 0, site.itemsize, flops_per_element=_FLOPS_PER_DRAW)
        + Cost(exact.flops, 0, 0) * largest_density(params)
        + Cost(0, exact.bytes_read, exact.bytes_written)
    )
    kind = "pruned_wgrad" if site.gradient is Gradient.WEIGHT else "pruned_dgrad"
    return (mover("reduce", mean, site.dtype, shared), product(site, kind, pruned))


def reject(site: Site, params: Params) -> Rejected | None:
    """Accept convolutions of two spatial axes with enough input channels."""
    if site.conv is None:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "a matrix product has no sparse form here")
    if site.conv.transposed:
        return Rejected(Reason.UNSUPPORTED_SHAPE, "transposed convolution")
    if len(site.conv.stride) != 2:
        return Rejected(Reason.UNSUPPORTED_SHAPE, f"{len(site.conv.stride)} spatial axes")
    _, w, y = site.shapes
    if isinstance(y[1], int) and y[1] // site.conv.groups % params.block:
        detail = f"{y[1] // site.conv.groups} channels in blocks of {params.block}"
        return Rejected(Reason.UNSUPPORTED_SHAPE, detail)
    narrow = site.itemsize <= torch.bfloat16.itemsize and params.min_channels > 1
    least = params.min_channels * (_NARROW_FACTOR if narrow else 1)
    if isinstance(w[1], int) and w[1] < least:
        detail = f"{w[1]} input channels a group, needs {least} in {site.dtype}"
        return Rejected(Reason.NOT_CHEAPER, detail)
    return None


def operands(site: Site, params: Params) -> tuple[str, ...]:
    """Name the operands: the output gradient and what it is multiplied with."""
    del params
    return ("grad", "input" if site.gradient is Gradient.WEIGHT else "weight")


def lower(
    site: Site,
    params: Params,
    template: Tensor,
    seed: Tensor,
    salt: int,
    grad: Tensor,
    other: Tensor,
) -> Tensor:
    """Return the product by a kernel that prunes what it reads, or else in plain torch."""
    del salt
    conv, tau = _geometry(site), threshold(grad, params)
    weight = site.gradient is Gradient.WEIGHT
    kernel = kernels()["pruned_wgrad" if weight else "pruned_dgrad"]
    sizes = template.shape[2:] if weight else template.shape
    lists = map(list, (sizes, conv.stride, conv.padding, conv.dilation))
    args = (grad, other, tau, seed, *lists, conv.groups, _salt(site), params.block)
    if unavailable(kernel, *args) is None:
        result: Tensor = kernel.op(*args)
        return result
    uniform = pruning.uniforms(grad, seed, _salt(site), params.block)
    return _product(site, pruning.prune(grad, tau, uniform, params.block), other, template.shape)


def noise(site: Site, params: Params, grad: Tensor, other: Tensor) -> Tensor:
    """Return the expected squared error: each block's variance times what it is multiplied with.

    With r = tau / |b| - 1 where |b| < tau, and 0 elsewhere, a value's variance is g^2 r. Summed
    over dw, that is contracted with x^2. In dx, the values of a block meet in the same sums: the
    error of a block through one tap has the norm of sum g w, squared and times r.
    """
    norms, tau, block = pruning.norms(grad, params.block), threshold(grad, params), params.block
    ratio = torch.where((norms > 0) & (norms < tau), tau / norms - 1, 0.0)
    ratio = ratio.repeat_interleave(block, 1)
    shape = site.shapes[0] if site.gradient is Gradient.INPUT else site.shapes[1]
    if site.gradient is Gradient.WEIGHT or block == 1:
        return _product(site, grad.square() * ratio, other.square(), torch.Size(shape)).sum()
    total = grad.new_zeros(())
    errors = grad * ratio.sqrt()
    blocks = grad.shape[1] // block
    apart = torch.Size((shape[0], blocks * other.shape[1], *shape[2:]))
    taps = other.flatten(2)
    for tap in range(taps.shape[2]):
        # A single tap takes each output pixel to one input pixel; a group for every block.
        alone = torch.zeros_like(taps).index_copy(
            2, torch.tensor([tap], device=taps.device), taps[:, :, tap : tap + 1]
        )
        single = _product(site, errors, alone.view_as(other), apart, groups=blocks)
        total = total + single.square().sum()
    return total


def _salt(site: Site) -> int:
    """Return what tells apart the draws of two layers; the two gradients of one share it."""
    return zlib.crc32(site.name.encode()) & 0x3FFFFFFF


def _geometry(site: Site) -> ConvGeometry:
    assert site.conv is not None, site.id
    return site.conv


def _product(
    site: Site, grad: Tensor, other: Tensor, shape: torch.Size, groups: int | None = None
) -> Tensor:
    """Return the exact weight or input gradient, which has the given shape."""
    conv, index = _geometry(site), 1 if site.gradient is Gradient.WEIGHT else 0
    missing = torch.empty(shape, dtype=grad.dtype, device=grad.device)
    if other.dim() == 4 and other.stride(1) == 1:
        missing = missing.contiguous(memory_format=torch.channels_last)
    x, w = (other, missing) if index == 1 else (missing, other)
    result: Tensor = aten.convolution_backward(
        grad, x, w, None, conv.stride, conv.padding, conv.dilation, False, conv.output_padding,
        groups or conv.groups, [index == 0, index == 1, False],
    )[index]  # fmt: skip
    return result


def ladder(site: Site) -> tuple[Params, ...]:
    """Return a mild and the usual share of pruned values."""
    del site
    return (Params(p=0.9), Params())


def prior(site: Site, params: Params) -> Prior | None:
    """Return what was measured at p = 0.99, both gradients together 0.25.

    It grows with the square of the threshold: 0.02, 0.05 and 0.115 were simulated for the weight
    gradients at p = 0.9, 0.99 and 0.9999, in which the squares are as 0.41 : 1 : 2.28.
    """
    if params.block > 1:
        return None
    usual = largest_density(Params()) / largest_density(params)
    return Prior((0.16 if site.gradient is Gradient.WEIGHT else 0.09) * usual**2)


def samples() -> tuple[Sample, ...]:
    """Return both products of a few geometries, and what must be rejected."""
    nn = torch.nn
    free, blocks = Params(p=0.9, min_channels=1), Params(block=4, min_channels=1)
    return (
        Sample((5, 16, 7, 6), lambda: nn.Conv2d(16, 8, 3, padding=1), Gradient.WEIGHT, Params()),
        Sample((5, 16, 7, 6), lambda: nn.Conv2d(16, 8, 3, padding=1), Gradient.INPUT, Params()),
        Sample(
            (3, 6, 12, 11),
            lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (2, 0), (1, 2), groups=2),
            Gradient.INPUT,
            free,
        ),
        Sample((3, 6, 9, 8), lambda: nn.Conv2d(6, 8, 3, 2, 1), Gradient.WEIGHT, blocks),
        Sample((3, 6, 9, 8), lambda: nn.Conv2d(6, 8, 3, 2, 1), Gradient.INPUT, blocks),
        Sample((5, 3, 7, 6), lambda: nn.Conv2d(3, 8, 3), Gradient.WEIGHT, Params(), rejected=True),
        Sample((2, 16, 20), lambda: nn.Conv1d(16, 4, 3), Gradient.WEIGHT, free, rejected=True),
        Sample((70, 16), lambda: nn.Linear(16, 6), Gradient.WEIGHT, Params(), rejected=True),
    )


register(
    Method(
        name="prune",
        summary="small values of the output gradient become zero or the threshold, at random",
        source="Ye et al. 2020, section 3.2 and Algorithm 1",
        unbiased=True,
        gradients=(Gradient.WEIGHT, Gradient.INPUT),
        params=Params,
        reject=reject,
        cost=cost,
        operands=operands,
        draw=draw,
        reference=reference,
        lower=lower,
        samples=samples,
        noise=noise,
        density=lambda site, params, grad, other: density(grad, params),
        ladder=ladder,
        prior=prior,
        fast_on_cpu=True,
        fast_on_gpu=False,
    )
)
