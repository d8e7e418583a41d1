"""Column-row sampling: its noise, its probabilities, products of several matrices, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import graphpass
from graphpass.column_row import choose, taken
from graphpass.errors import ConfigError
from graphpass.method import get_method
from graphpass.pairs import ChannelPairs
from graphpass.site import ConvGeometry, Gradient, Site
from tests.compiling import interpreted

GEOMETRY = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
X, W, Y = (2, 12, 6, 6), (5, 12, 3, 3), (2, 5, 6, 6)
CONV = Site("c", "c", Gradient.FORWARD, "convolution", "c", None, 2, (X, W, Y), Y, "float64", 8,
            GEOMETRY)  # fmt: skip
TAKEN = 4


def pairs() -> ChannelPairs:
    """Return a convolution behind a ReLU: channels have means, and differ in size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(X, generator=generator, dtype=torch.float64).relu()
    x = x * torch.linspace(0.2, 2, X[1])[None, :, None, None]
    w = torch.randn(W, generator=generator, dtype=torch.float64)
    return ChannelPairs(CONV, torch.empty(Y, dtype=torch.float64), (x, w))


def expected_error(terms: ChannelPairs, probabilities: Tensor) -> float:
    """Return E|O - Õ|^2 of sampling with replacement: the paper's equation 14."""
    exact = terms.weighted(torch.ones(1, X[1], dtype=torch.float64)).square().sum()
    return float(((terms.energies()[0] / probabilities).sum() - exact) / TAKEN)


def test_norms_corrected_by_e_and_r_are_those_of_the_terms() -> None:
    """|I|^2 |K|^2 - E + R of proposition 2 is |I * K|^2, written out tap by tap."""
    terms = pairs()
    x, w = terms.operands
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    seen = padded.flatten(4)  # [B, Ci, OH, OW, taps]
    filters = w.flatten(2)  # [Co, Ci, taps]
    own = torch.einsum("bihwt,oit->i", seen.square(), filters.square())
    all_taps = x.square().sum((0, 2, 3)) * filters.square().sum((0, 2))
    e = all_taps - own
    crossed = torch.einsum("bihwt,bihwu,oit,oiu->i", seen, seen, filters, filters)
    r = crossed - own
    torch.testing.assert_close(all_taps - e + r, terms.energies()[0])
    assert (e >= 0).all() and not torch.allclose(all_taps, terms.energies()[0], rtol=0.1)


def test_optimal_probabilities_err_least_and_norms_come_close() -> None:
    terms = pairs()
    best = terms.energies()[0].sqrt()
    norms, uniform = terms.masses()[0], torch.ones(X[1], dtype=torch.float64)
    optimal, by_norm, even = (expected_error(terms, p / p.sum()) for p in (best, norms, uniform))
    assert optimal < by_norm < even
    # Leaving out E and R costs a fraction of what sampling by norm gains.
    assert by_norm - optimal < 0.25 * (even - optimal)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = best * torch.rand(X[1], generator=generator, dtype=torch.float64).add(0.5)
        assert expected_error(terms, other / other.sum()) > optimal


@pytest.mark.parametrize("replacement", [True, False])
def test_choice_by_norm_gives_weights_of_expectation_one(replacement: bool) -> None:
    params = get_method("crs").params(keep=0.4, replacement=replacement, least=1)
    masses = torch.linspace(0.1, 3, 10, dtype=torch.float64).expand(20_000, -1)
    count = taken(10, params)
    generator = torch.Generator().manual_seed(2)
    width = count if replacement else 10
    draws = torch.rand(20_000, width, generator=generator, dtype=torch.float64)
    index, weight = choose(params, masses, draws, count)
    assert weight is not None and index.shape == (20_000, 4)
    if not replacement:
        assert (index.diff(dim=1) > 0).all()
    sums = torch.zeros_like(masses).scatter_add(1, index, weight)
    error = sums.std(0) / 20_000**0.5
    assert ((sums.mean(0) - 1).abs() < 5 * error).all()


def test_terms_of_mass_zero_and_masses_that_are_not_numbers() -> None:
    params = get_method("crs").params(keep=0.5, least=1)
    draws = torch.full((1, 4), 0.5)
    for masses in (torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.0, 2.0]])):
        index, weight = choose(params, masses, draws, 2)
        assert weight is not None and weight.isfinite().all() and (index < 4).all()
    _, weight = choose(params, torch.tensor([[1.0, torch.nan, 1.0, 1.0]]), draws, 2)
    assert weight is not None and weight.isnan().any()


def test_each_matrix_of_a_batch_has_its_own_terms() -> None:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    generator = torch.Generator().manual_seed(3)
    a = torch.randn(3, 5, 24, generator=generator, requires_grad=True)
    b = torch.randn(3, 24, 4, generator=generator)
    spec = {"name": "crs_unscaled", "gradient": "forward", "keep": 0.5}
    with interpreted():
        options = {"methods": {"*": spec}, "strict": True}
        found = torch.compile(product, backend="approx", options=options)(a, b)
    (row,) = graphpass.reports()[-1].approximated
    assert row.gradient == "forward" and row.planned_flops < row.exact_flops
    index = (a.norm(dim=1) * b.norm(dim=2)).topk(12, dim=1).indices
    assert len({tuple(sorted(each.tolist())) for each in index}) == 3
    wanted = [a[s][:, index[s]] @ b[s][index[s]] for s in range(3)]
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize(
    ("site", "given", "text"),
    [
        (CONV, {"axis": "samples"}, "no samples to leave out"),
        (CONV, {"axis": "channels"}, "no gradient of one convolution"),
        (CONV, {"keep": 0.9, "least": 12}, "12 terms, takes at least 12"),
        (
            replace(CONV, gradient=Gradient.WEIGHT, conv=replace(GEOMETRY, transposed=True)),
            {},
            "transposed convolution",
        ),
        (replace(CONV, op="attention", conv=None), {}, "no form for attention"),
    ],
)
def test_refusals_have_reasons(site: Site, given: dict[str, Any], text: str) -> None:
    method = get_method("crs")
    rejected = method.reject(site, method.params(**given))
    assert rejected is not None and text in str(rejected)


@pytest.mark.parametrize(
    ("method", "given", "text"),
    [
        ("crs", {"keep": 0}, r"keep=0; give a number in \(0, 1\]"),
        ("crs", {"sampling": "top"}, "sampling='top'; give 'norm' or 'uniform'"),
        ("crs_unscaled", {"replacement": True}, "taken once; give replacement=False"),
        ("crs", {"axis": "rows"}, "axis='rows'; give 'terms' or 'samples' or 'channels'"),
        ("crs", {"least": 0}, "least=0; give an integer >= 1"),
    ],
)
def test_parameters_out_of_range(method: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        get_method(method).params(**given)
