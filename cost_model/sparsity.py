"""What sparse training saves, as its papers count it: FLOPs, weights and activations.

A layer is sparse in its weights (forward product, input gradient) and in its activations (weight
gradient); a value that is zero costs nothing. That is the count of Raihan, Aamodt 2020, "Sparse
Weight Activation Training" (SWAT), not what a machine saves that multiplies zeros. Densities are
shares of values that are kept, in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class SparseLayer:
    """One convolution or linear layer, for one sample.

    Attributes:
        name: module path.
        weight: shape of the weight, [Co, Ci / groups, *kernel] or [Co, Ci].
        positions: output positions; 1 for a linear layer.
        inputs: values of its input.
    """

    name: str
    weight: tuple[int, ...]
    positions: int
    inputs: int

    @property
    def flops(self) -> int:
        """FLOPs of each of its products."""
        return 2 * prod(self.weight) * self.positions


@dataclass(frozen=True, slots=True)
class Saved:
    """Shares that are saved, in [0, 1].

    Attributes:
        training_flops: of forward product and both gradients; the first layer has no input
            gradient.
        inference_flops: of the forward product.
        weights: of all weights.
        layer_inputs: of the values that are inputs of the layers.
        activations: of the values kept for backward: inputs of layers and of normalisations.
    """

    training_flops: float
    inference_flops: float
    weights: float
    layer_inputs: float
    activations: float


def saved(
    layers: Sequence[SparseLayer],
    densities: Sequence[float],
    normalised: int,
    activation_densities: Sequence[float] | None = None,
) -> Saved:
    """Return what a network saves.

    Args:
        layers: in forward order.
        densities: of the weights, one a layer.
        normalised: values that are inputs of normalisations, which are kept whole.
        activation_densities: of the layers' inputs; None for those of the weights.
    """
    acts = densities if activation_densities is None else activation_densities
    training = inference = 0.0
    dense = 0
    for number, (layer, weight, act) in enumerate(zip(layers, densities, acts, strict=True)):
        backward = 0 if number == 0 else 1
        # forward and input gradient from sparse weights, weight gradient from sparse activations
        training += layer.flops * ((1 + backward) * (1 - weight) + (1 - act))
        dense += layer.flops * (2 + backward)
        inference += layer.flops * (1 - weight)
    counts = [prod(layer.weight) for layer in layers]
    inputs = [layer.inputs for layer in layers]
    zeros = sum(count * (1 - act) for count, act in zip(inputs, acts, strict=True))
    return Saved(
        training_flops=training / dense,
        inference_flops=inference / sum(layer.flops for layer in layers),
        weights=sum(c * (1 - d) for c, d in zip(counts, densities, strict=True)) / sum(counts),
        layer_inputs=zeros / sum(inputs),
        activations=zeros / (sum(inputs) + normalised),
    )


def uniform_densities(layers: Sequence[SparseLayer], density: float) -> tuple[float, ...]:
    """Return the same density for all layers but the first, which stays dense (SWAT-U)."""
    return (1.0, *(density for _ in layers[1:]))


def erk_densities(shapes: Sequence[tuple[int, ...]], density: float) -> tuple[float, ...]:
    """Return densities by Erdos-Renyi-Kernel: in proportion to sum(shape) / prod(shape), at most 1.

    Evci et al. 2020, "Rigging the Lottery" (arXiv:1911.11134), section 3: the factor is such that
    `density` of all weights are kept; layers that would have more than all of theirs are dense.

    Args:
        shapes: of the weights.
        density: of all weights together, in (0, 1].

    Raises:
        ValueError: if the density is out of range, or there is no layer.
    """
    if not 0 < density <= 1 or not shapes:
        raise ValueError(f"need layers, and a density in (0, 1], got {density}")
    raw = [sum(shape) / prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        wanted = density * sum(map(prod, shapes)) - sum(prod(shapes[i]) for i in dense)
        free = [i for i in range(len(shapes)) if i not in dense]
        if not free:
            return (1.0,) * len(shapes)
        factor = wanted / sum(raw[i] * prod(shapes[i]) for i in free)
        over = {i for i in free if factor * raw[i] > 1}
        if not over:
            return tuple(1.0 if i in dense else factor * raw[i] for i in range(len(shapes)))
        # As in the reference implementation, the one furthest over becomes dense first.
        dense.add(max(over, key=lambda i: raw[i]))
