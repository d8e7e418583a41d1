"""What is supposed of the noise of a model before it was measured.

Methods know what they added when they computed one product of every layer of ResNet-20 on CIFAR-10
(`Method.prior`). From that follows the local noise of a site, by the formula of
`graphpass.propagation` read backwards, if all layers have the same noise. On another model this is
a guess, and is called so: everything that comes of it is labelled "prior".
"""

from collections.abc import Iterable, Mapping
from typing import Any

from graphpass.capture import Analysis
from graphpass.method import Method, Prior
from graphpass.noise import Key, LocalNoise, NoiseTable, key_of
from graphpass.site import Gradient, Site

SOURCE = "prior"
# V / |E g|^2: 1.2 after 200 steps of ResNet-20, and about 4 over a run of it.
_NOISE_RATIO = 4.0
# Layers of ResNet-20 with a weight, the classifier among them; all but the first were approximated.
_LAYERS = 20
_APPROXIMATED = range(2, _LAYERS + 1)
# Parts of the gradient that the errors of all their input gradients reach, added up.
_REACHED = sum((layer - 1) / _LAYERS for layer in _APPROXIMATED)


def noise_table(
    analysis: Analysis, offered: Mapping[str, Iterable[tuple[Method, Any]]]
) -> NoiseTable:
    """Return the noise that is supposed before any is measured.

    Args:
        analysis: what the graph holds.
        offered: methods and parameters to be considered for each site, by its id.
    """
    weights = [site.id for site in analysis.sites if site.gradient is Gradient.WEIGHT]
    entries: dict[Key, LocalNoise] = {}
    for site in analysis.sites:
        for method, params in offered.get(site.id, ()):
            local = local_noise(site, method, params)
            if local is not None:
                entries[key_of(site.id, method.name, params)] = local
    return NoiseTable(
        entries,
        variance=dict.fromkeys(weights, 1.0),
        square=dict.fromkeys(weights, 1 / _NOISE_RATIO),
        source=SOURCE,
    )


def local_noise(site: Site, method: Method, params: Any) -> LocalNoise | None:
    """Return the noise of a site that would add up to a method's prior over ResNet-20.

    None where the method has none for these parameters.
    """
    prior = None if method.prior is None else method.prior(site, params)
    return None if prior is None else of_site(site, prior)


def of_site(site: Site, prior: Prior) -> LocalNoise:
    """Return the noise of a site that would add up to a prior over ResNet-20."""
    if site.gradient is Gradient.WEIGHT:
        share = _LAYERS / len(_APPROXIMATED)
        return LocalNoise(
            prior.tau * share, prior.bias * share / _NOISE_RATIO, 1.0 + 1 / _NOISE_RATIO
        )
    # An error in a forward product reaches all layers, and one in an input gradient some.
    reached = len(_APPROXIMATED) if site.gradient is Gradient.FORWARD else _REACHED
    return LocalNoise(
        noise=prior.tau / reached / (1 + 1 / _NOISE_RATIO),
        bias=prior.bias / reached / (_NOISE_RATIO + 1),
        square=1.0,
    )
