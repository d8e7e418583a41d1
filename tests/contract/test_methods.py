"""What every method promises, checked on the method's own samples.

A sample's layer becomes `relu(layer(relu(x) + shift))` and is run for a few steps. The gradient of
`shift` is then the layer's input gradient, and what autograd hands to the layer is known exactly:
`cotangent * (out > 0)`; the last ReLU is left out where the forward product is approximated. So
each product can be recomputed in float64 from the very operands that the compiled code saw.
A new file in `graphpass/methods` is tested here without an edit.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

import graphpass
from codegen import draws as random_draws
from cost_model import total
from graphpass import callers, variants
from graphpass.capture import Analysis
from graphpass.errors import ConfigError, Reason
from graphpass.method import Method, Sample, get_method, methods, register, salt_of
from graphpass.plan import Plan
from graphpass.rewrite import Replacement
from graphpass.site import Gradient, Site
from graphpass.state import State, with_state
from tests.compiling import interpreted

SEED = 7
STEPS = 2
# Roundings to the dtype of operands, of intermediate results and of the product itself.
ROUNDINGS = 8
# Draws over which a mean is taken; by chance, one mean in two million is 5 standard errors off.
DRAWS = 400
STANDARD_ERRORS = 5
# How far a noise formula may be off.
NOISE_FACTOR = 1.5
# Parameters that say how much of the work is done, so that FLOPs fall when they do.
WORK_PARAMETERS = ("k", "keep")

# Beside float32, in which every sample is compiled.
DTYPES = (torch.float64, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Case:
    """One sample of one method, in one element type."""

    method: str
    index: int
    dtype: torch.dtype = torch.float32

    @property
    def sample(self) -> Sample:
        return get_method(self.method).samples()[self.index]

    @property
    def with_generated_code(self) -> bool:
        """Whether Inductor writes C++ for it.

        That takes seconds, and less where samples have the layer and input of one that was compiled
        before: what surrounds the product is then the same.
        """
        return self.index == 0

    def __str__(self) -> str:
        """Name the test case."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.method}-{self.index}-{self.sample.gradient.value}-{dtype}"


def _cases(wanted: Callable[[Method, Sample], bool]) -> list[Case]:
    return [
        Case(name, index)
        for name, method in methods().items()
        for index, sample in enumerate(method.samples())
        if wanted(method, sample)
    ]


# A sample of a gradient that the method does not have: no site, but the user's mistake.
FOREIGN = _cases(lambda method, sample: sample.gradient not in method.gradients)
REJECTED = _cases(
    lambda method, sample: sample.rejected and sample.gradient in method.gradients,
)
ACCEPTED = _cases(lambda method, sample: not sample.rejected)
# Compiled in float32; the other element types run through the same lowering eagerly.
# With the scope, all tests of a case follow each other, and one worker compiles it for all.
by_case = pytest.mark.parametrize("case", ACCEPTED, ids=str, scope="module")


class Problem(nn.Module):
    """The layer of a sample between non-linearities."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(case.sample.x, dtype=case.dtype))
        self.layer = case.sample.module().to(case.dtype)
        # Of a forward product that is drawn, the mask would change from step to step.
        self.rectified = case.sample.gradient is not Gradient.FORWARD

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product = self.layer(torch.relu(x) + self.shift)
        return torch.relu(product) if self.rectified else product * 1, product.detach()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What compiling and training a problem gave.

    Attributes:
        layer: the layer, as it was throughout.
        x: what it was applied to.
        grad: what it was given in backward.
        site: the product that the sample is about.
        results: "forward" product, "input", "weight" and "bias" gradient of every step.
        again: the same of step 0, run once more.
        rewritten: the sites of each time that a graph was rewritten.
        report: what the user is told.
    """

    layer: nn.Module
    x: Tensor
    grad: Tensor
    site: Site
    results: tuple[dict[str, Tensor], ...]
    again: dict[str, Tensor]
    rewritten: tuple[tuple[str, ...], ...]
    report: graphpass.Report

    @property
    def operands(self) -> dict[str, Tensor]:
        """The operands of the site, by the names that methods use."""
        return _operands(self.site, self.grad, self.x, self.layer.weight.detach())

    @property
    def addend(self) -> Tensor:
        """What is added to the site's product: the bias, to a forward product."""
        bias = getattr(self.layer, "bias", None)
        if self.site.gradient is not Gradient.FORWARD or bias is None:
            return torch.zeros((), dtype=torch.float64)
        shape = [-1] + [1] * (self.x.dim() - 2)
        return bias.detach().double().view(shape)  # type: ignore[no-any-return]


@cache
def outcome(case: Case) -> Outcome:
    """Compile and train the problem of a case, once for all tests."""
    torch.manual_seed(SEED)
    problem = Problem(case)
    x = torch.randn(case.sample.x, dtype=case.dtype)
    spec = {
        "name": case.method,
        "gradient": case.sample.gradient.value,
        **dataclasses.asdict(case.sample.params),
    }
    options = {"methods": {"layer": spec}, "seed": SEED, "strict": True}
    sites: list[Site] = []
    rewritten: list[tuple[str, ...]] = []
    with (
        pytest.MonkeyPatch.context() as patch,
        torch._functorch.config.patch(
            # A graph that comes out of the cache would not be rewritten.
            enable_autograd_cache=False
        ),
        # Inductor compiles the first sample of a method. For the others the same graphs are run
        # as they are: what a method gives does not depend on how they were compiled.
        contextlib.nullcontext() if case.with_generated_code else interpreted(),
    ):
        _listen(patch, sites, rewritten)
        compiled = torch.compile(problem, backend="approx", options=options)
        session = graphpass.session(compiled)
        start = session.state_dict()
        runs = []
        for step in range(STEPS + 1):
            if step == STEPS:
                session.load_state_dict(start)
            problem.zero_grad()
            out, product = compiled(x)
            cotangent = _distinct(out.shape).to(case.dtype)
            out.backward(cotangent)
            runs.append({"forward": product.clone(), **_gradients(problem)})
    (site,) = (site for site in sites if site.gradient is case.sample.gradient)
    return Outcome(
        layer=problem.layer,
        x=(torch.relu(x) + problem.shift).detach(),
        grad=(cotangent * (out > 0)).detach() if problem.rectified else cotangent,
        site=site,
        results=tuple(runs[:STEPS]),
        again=runs[STEPS],
        rewritten=tuple(rewritten),
        report=graphpass.reports()[-1],
    )


def _listen(patch: pytest.MonkeyPatch, sites: list[Site], rewritten: list[tuple[str, ...]]) -> None:
    """Write down the sites that are planned for, and those that are rewritten."""
    make_plan, rewrite = callers.make_plan, variants.rewrite

    def note_sites(analysis: Analysis, *args: Any) -> Plan:
        sites[:] = analysis.sites
        return make_plan(analysis, *args)

    def note_rewrite(graph: Graph, replacements: Sequence[Replacement], seed: Node) -> None:
        rewrite(graph, replacements, seed)
        rewritten.append(tuple(replacement.site.id for replacement in replacements))

    patch.setattr(callers, "make_plan", note_sites)
    patch.setattr(variants, "rewrite", note_rewrite)


def _gradients(problem: Problem) -> dict[str, Tensor]:
    parameters = {"input": problem.shift, **dict(problem.layer.named_parameters())}
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    return {name: grad.detach().clone() for name, grad in gradients.items() if grad is not None}


def _distinct(shape: torch.Size) -> Tensor:
    """Return values of random sign whose magnitudes differ within a map, in every dtype.

    bfloat16 resolves 128 steps between 1 and 2. Without ties, the largest values of a map are the
    same whatever the precision they are compared in.
    """
    generator = torch.Generator().manual_seed(SEED)
    maps = torch.rand(shape, generator=generator).flatten(min(2, len(shape) - 1))
    magnitude = 1 + (maps.argsort(-1) % 128) / 128
    sign = torch.rand(shape, generator=generator).sub(0.5).sign()
    return sign * magnitude.view(shape)


def _operands(site: Site, grad: Tensor, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    if site.conv is not None:
        return {"grad": grad, "input": x, "weight": weight}
    left, right = {
        Gradient.FORWARD: (x, weight.T),
        Gradient.WEIGHT: (grad.T, x),
        Gradient.INPUT: (grad, weight),
    }[site.gradient]
    assert (left.shape, right.shape) == site.shapes, site.id
    return {"left": left, "right": right, "forward_left": x, "forward_right": weight.T}


def _products(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the exact "forward" product, "input", "weight" and "bias" gradient in float64."""
    layer, x = copy.deepcopy(layer).double(), x.double().requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    with torch.enable_grad():
        product = layer(x)
        values = torch.autograd.grad(product, (x, *parameters), grad.double())
    return dict(zip(("forward", "input", *names), (product.detach(), *values), strict=True))


def _absolute_products(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the same products of absolute values: what bounds the error of each."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()
    return _products(layer, x.abs(), grad.abs())


def _length(which: str, layer: nn.Module, x: Tensor, grad: Tensor) -> int:
    """Return how many products the longest sum of a gradient may have."""
    if which in {"input", "forward"}:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.numel() // min(weight.shape[:2])
    return max(tensor.numel() // tensor.shape[1] for tensor in (x, grad))


def _tolerance(magnitude: Tensor, length: int, dtype: torch.dtype) -> float:
    """Return the rounding error of sums that are accumulated in float32 or wider."""
    accumulated = torch.promote_types(dtype, torch.float32)
    relative = length * torch.finfo(accumulated).eps + ROUNDINGS * torch.finfo(dtype).eps
    return float(magnitude.abs().max()) * relative


def _seed(step: int) -> Tensor:
    return torch.tensor(random_draws.mix(SEED, step, 0, 0))


def _template(site: Site, dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype).expand(site.output)


def _state(method: Method, sample: Sample, site: Site, step: int = 0) -> State | None:
    """Return the state of a first call, at a step; None if the method keeps nothing."""
    slots = method.state(site, sample.params)
    return State.fresh(slots, torch.tensor(step)) if slots else None


def _reference(
    method: Method,
    sample: Sample,
    site: Site,
    operands: dict[str, Tensor],
    step: int,
    state: State | None = None,
) -> Tensor:
    """Return the method's reference in float64; of a first call, if no state is given."""
    template = _template(site, torch.float64)
    draws = method.draw(site, sample.params, template, _seed(step), salt_of(site))
    names = method.operands(site, sample.params)
    given = [operands[name].double() for name in names]
    reference = with_state(method.reference, state or _state(method, sample, site, step))
    return reference(site, sample.params, template, draws, *given)


def _after(
    method: Method, sample: Sample, site: Site, operands: dict[str, Tensor], step: int
) -> Tensor:
    """Return the reference of a step, after those before it."""
    state = _state(method, sample, site)
    for before in range(step):
        _reference(method, sample, site, operands, before, state)
        state = state and state.at(torch.tensor(before + 1))
    return _reference(method, sample, site, operands, step, state)


def _check_against_reference(
    case: Case,
    seen: Outcome,
    operands: dict[str, Tensor],
    result: Tensor,
    step: int,
    with_addend: bool,
) -> None:
    """Compare a product of `operands` with the method's reference, both from the same draws."""
    method, which = get_method(case.method), case.sample.gradient.value
    expected = _after(method, case.sample, seen.site, operands, step)
    if with_addend:
        expected = expected + seen.addend
    absolute = {name: value.abs() for name, value in operands.items()}
    magnitude = torch.maximum(
        _after(method, case.sample, seen.site, absolute, step).abs(),
        _absolute_products(seen.layer, seen.x, seen.grad)[which],
    )
    length = _length(which, seen.layer, seen.x, seen.grad)
    tolerance = _tolerance(magnitude, length, case.sample.computes_in or case.dtype)
    assert result.dtype == case.dtype
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", FOREIGN, ids=str)
def test_a_gradient_that_the_method_does_not_have_is_refused(case: Case) -> None:
    assert case.sample.rejected
    with pytest.raises(ConfigError, match=f"gradient='{case.sample.gradient}'.*{case.method!r}"):
        outcome(case)


@pytest.mark.parametrize("case", REJECTED, ids=str)
def test_rejected_samples_stay_exact_for_a_named_reason(case: Case) -> None:
    seen = outcome(case)
    rejected = get_method(case.method).reject(seen.site, case.sample.params)
    assert rejected is not None and rejected.reason in Reason
    (row,) = (row for row in seen.report.rows if row.gradient == case.sample.gradient)
    assert (row.method, row.reason) == ("exact", str(rejected))
    assert row.planned_flops == row.exact_flops and row.planned_bytes == row.exact_bytes
    assert not seen.rewritten and not seen.report.approximated


@by_case
def test_the_rewrite_fires_exactly_once(case: Case) -> None:
    seen = outcome(case)
    assert get_method(case.method).reject(seen.site, case.sample.params) is None
    assert seen.rewritten == ((f"layer:{case.sample.gradient.value}",),)
    (row,) = seen.report.approximated
    assert (row.where, row.gradient, row.method) == ("layer", case.sample.gradient, case.method)
    assert row.params == dataclasses.asdict(case.sample.params) and row.reason == ""


@by_case
def test_compiled_result_equals_the_reference_on_the_same_draws(case: Case) -> None:
    seen = outcome(case)
    for step, results in enumerate(seen.results):
        result = results[case.sample.gradient.value]
        _check_against_reference(case, seen, seen.operands, result, step, with_addend=True)


@by_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lowering_run_eagerly_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    """In every element type, where compiling would take too long."""
    method, seen, case = (
        get_method(case.method),
        outcome(case),
        dataclasses.replace(case, dtype=dtype),
    )
    site = dataclasses.replace(seen.site, itemsize=dtype.itemsize)
    operands = {name: value.to(dtype) for name, value in seen.operands.items()}
    result = with_state(method.lower, _state(method, case.sample, site))(
        site,
        case.sample.params,
        _template(site, dtype),
        _seed(0),
        salt_of(site),
        *(operands[name] for name in method.operands(site, case.sample.params)),
    )
    _check_against_reference(case, seen, operands, result, step=0, with_addend=False)


@pytest.mark.parametrize("case", ACCEPTED + REJECTED, ids=str, scope="module")
def test_every_other_gradient_is_the_exact_one(case: Case) -> None:
    seen = outcome(case)
    exact = _products(seen.layer, seen.x, seen.grad)
    absolute = _absolute_products(seen.layer, seen.x, seen.grad)
    for results in (*seen.results, seen.again):
        assert set(results) == set(exact)
        for which in set(exact) - ({case.sample.gradient.value} if seen.rewritten else set()):
            length = _length(which, seen.layer, seen.x, seen.grad)
            tolerance = _tolerance(absolute[which], length, case.dtype)
            torch.testing.assert_close(
                results[which].double(), exact[which], atol=tolerance, rtol=0
            )


@by_case
def test_the_same_seed_gives_the_same_bits(case: Case) -> None:
    seen = outcome(case)
    assert seen.again.keys() == seen.results[0].keys()
    for which, gradient in seen.again.items():
        assert torch.equal(gradient, seen.results[0][which]), which


@by_case
def test_draws_differ_from_step_to_step_and_nothing_else_does(case: Case) -> None:
    method, seen = get_method(case.method), outcome(case)
    template = _template(seen.site, case.dtype)
    salt = salt_of(seen.site)
    draws = [method.draw(seen.site, case.sample.params, template, _seed(i), salt) for i in (0, 1)]
    for which in seen.results[0]:
        if which == case.sample.gradient and method.state(seen.site, case.sample.params):
            continue
        same = torch.equal(seen.results[0][which], seen.results[1][which])
        drawn = which == case.sample.gradient and draws[0] is not None and not case.sample.exact
        assert same is not drawn, which
    if draws[0] is not None and draws[1] is not None:
        assert not torch.equal(draws[0], draws[1])


def _drawn(method: Method, sample: Sample, site: Site, operands: dict[str, Tensor]) -> list[Tensor]:
    """Return results of many draws; one where nothing is drawn."""
    template = _template(site, torch.float64)
    random = method.draw(site, sample.params, template, _seed(0), salt_of(site)) is not None
    return [
        _reference(method, sample, site, operands, step) for step in range(DRAWS if random else 1)
    ]


@lru_cache(maxsize=1)
def _drawn_of(case: Case) -> list[Tensor]:
    """Return the draws of a case; its tests follow each other."""
    seen = outcome(case)
    return _drawn(get_method(case.method), case.sample, seen.site, seen.operands)


def _bias(values: Sequence[Tensor], exact: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far the mean of draws is from `exact`, and its standard error."""
    # A wrong factor shows best along the exact product itself.
    direction = exact / exact.norm()
    exact = torch.cat([exact.flatten(), exact.norm()[None]])
    along = [(value * direction).sum()[None] for value in values]
    stacked = torch.stack(
        [torch.cat([value.flatten(), on]) for value, on in zip(values, along, strict=True)]
    )
    error = stacked.std(0, correction=0) / math.sqrt(len(values))
    return (stacked.mean(0) - exact).abs(), error


def _is_biased(values: Sequence[Tensor], site: Site, exact: Tensor) -> bool:
    """Return whether the mean of draws is off by more than chance and rounding allow."""
    missed, error = _bias(values, exact)
    rounding = _tolerance(exact, sum(map(math.prod, site.shapes)), torch.float64)
    # Draws are float32 numbers: an estimator made of them is unbiased to their resolution.
    rounding += float(exact.abs().max()) * torch.finfo(torch.float32).eps
    return bool((missed > STANDARD_ERRORS * error + rounding).any())


@by_case
def test_samples_are_exact_or_biased_as_declared(case: Case) -> None:
    method, seen, which = get_method(case.method), outcome(case), case.sample.gradient.value
    exact = _products(seen.layer, seen.x, seen.grad)[which] - seen.addend
    if not case.sample.exact:
        biased = _is_biased(_drawn_of(case), seen.site, exact)
        assert biased is not method.unbiased
        return
    absolute = _absolute_products(seen.layer, seen.x, seen.grad)[which]
    length = _length(which, seen.layer, seen.x, seen.grad)
    tolerance = _tolerance(absolute, length, case.dtype)
    for results in seen.results:
        torch.testing.assert_close(results[which].double(), exact, atol=tolerance, rtol=0)


WITH_FORMULA = [
    case for case in ACCEPTED if get_method(case.method).noise is not None and not case.sample.exact
]


@pytest.mark.parametrize("case", WITH_FORMULA, ids=str, scope="module")
def test_the_noise_formula_predicts_what_draws_show(case: Case) -> None:
    method, seen, which = get_method(case.method), outcome(case), case.sample.gradient.value
    exact = _products(seen.layer, seen.x, seen.grad)[which] - seen.addend
    names = method.operands(seen.site, case.sample.params)
    operands = [seen.operands[name].double() for name in names]
    assert method.noise is not None
    predicted = float(method.noise(seen.site, case.sample.params, *operands))
    squared = [float((value - exact).square().sum()) for value in _drawn_of(case)]
    measured = sum(squared) / len(squared)
    assert measured / NOISE_FACTOR <= predicted <= measured * NOISE_FACTOR


def _sampled_rows(scale: float) -> Method:
    """Return a stand-in: every sample of the batch with probability 1/2, times `scale`."""

    def draw(site: Site, params: Any, template: Tensor, seed: Tensor, salt: int) -> Tensor:
        return random_draws.uniform(seed, site.shapes[0][-1], salt)

    def reference(
        site: Site, params: Any, template: Tensor, draws: Tensor, left: Tensor, right: Tensor
    ) -> Tensor:
        return left @ (right * (draws < 0.5)[:, None]) * scale

    zero = get_method("zero")
    operands = ("left", "right")
    return dataclasses.replace(
        zero, draw=draw, reference=reference, operands=lambda site, params: operands
    )


@pytest.mark.parametrize(("scale", "biased"), [(2.0, False), (1.7, True), (1.0, True)])
def test_a_bias_is_noticed(scale: float, biased: bool) -> None:
    """Without this, a check of bias that accepts everything would pass for every method."""
    left, right = torch.randn(6, 40), torch.randn(40, 10)
    site = Site(
        "fc", "fc", Gradient.WEIGHT, "mm", "mm", None, 1, ((6, 40), (40, 10)), (6, 10), "float32", 4
    )
    sample = get_method("zero").samples()[0]
    operands = {"left": left, "right": right}
    exact = left.double() @ right.double()
    values = _drawn(_sampled_rows(scale), sample, site, operands)
    assert _is_biased(values, site, exact) is biased


@by_case
def test_cost_is_a_count(case: Case) -> None:
    seen = outcome(case)
    cost = total(get_method(case.method).cost(seen.site, case.sample.params))
    figures = cost.evaluate()
    assert all(isinstance(figure, int) and figure >= 0 for figure in figures)
    assert figures[2] >= math.prod(seen.site.output) * seen.site.itemsize
    (row,) = seen.report.approximated
    assert (row.planned_flops, row.planned_bytes) == (figures[0], figures[1] + figures[2])


@by_case
def test_cost_of_a_symbolic_batch_is_the_same_formula(case: Case) -> None:
    method, site = get_method(case.method), outcome(case).site
    size, batch = case.sample.x[0], sympy.Symbol("B", integer=True, positive=True)
    symbolic = dataclasses.replace(
        site,
        shapes=tuple(_symbolic(shape, size, batch) for shape in site.shapes),
        output=_symbolic(site.output, size, batch),
    )
    assert method.reject(symbolic, case.sample.params) is None
    cost = total(method.cost(symbolic, case.sample.params))
    exact = total(method.cost(site, case.sample.params))
    assert cost.evaluate({batch: size}) == exact.evaluate()


def _symbolic(shape: Sequence[Any], size: int, symbol: sympy.Symbol) -> tuple[Any, ...]:
    return tuple(symbol if dim == size else dim for dim in shape)


@by_case
def test_flops_fall_with_the_work_that_is_kept(case: Case) -> None:
    method, site, params = get_method(case.method), outcome(case).site, case.sample.params
    names = [f.name for f in dataclasses.fields(params) if f.name in WORK_PARAMETERS]
    if not names:
        pytest.skip("the method has no parameter that sets its work")
    for name in names:
        flops = [
            total(method.cost(site, dataclasses.replace(params, **{name: value}))).evaluate()[0]
            for value in _falling(getattr(params, name))
        ]
        assert flops == sorted(set(flops), reverse=True)


def _falling(value: float) -> list[Any]:
    """Return ever smaller values of a parameter: counts down to 1, fractions by halves."""
    if isinstance(value, int):
        return list(range(value + 2, 0, -1))
    return [value, value / 2, value / 4]


@by_case
def test_the_ladder_and_the_prior(case: Case) -> None:
    method, site = get_method(case.method), outcome(case).site
    rungs = (method.params(),) if method.ladder is None else method.ladder(site)
    assert all(type(rung) is method.params for rung in rungs)
    assert len(set(rungs)) == len(rungs) > 0
    priors = {rung: None if method.prior is None else method.prior(site, rung) for rung in rungs}
    known = {rung: prior for rung, prior in priors.items() if prior is not None}
    for prior in known.values():
        assert 0 <= prior.tau < math.inf and 0 <= prior.bias < math.inf
        if method.unbiased and site.gradient is not Gradient.FORWARD:
            assert prior.bias == 0
    # The more is kept, the less noise.
    for name in WORK_PARAMETERS:
        if hasattr(rungs[0], name):
            taus = [known[rung].tau for rung in sorted(known, key=lambda r: getattr(r, name))]
            assert taus == sorted(taus, reverse=True)


@pytest.mark.parametrize("name", sorted(methods()))
def test_unknown_parameters_are_refused(name: str) -> None:
    method = get_method(name)
    with pytest.raises(ConfigError, match=rf"method {name!r} has no parameter 'no_such'.*legal"):
        method.make_params({"no_such": 1})
    assert method.make_params({}) == method.params()


@pytest.mark.parametrize("name", sorted(methods()))
def test_parameters_round_trip_as_a_user_writes_them(name: str) -> None:
    method = get_method(name)
    for sample in method.samples():
        assert method.make_params(dataclasses.asdict(sample.params)) == sample.params


@pytest.mark.parametrize("name", sorted(methods()))
def test_the_record_is_complete(name: str) -> None:
    method = get_method(name)
    assert method.name == name and method.summary and method.source
    assert method.gradients
    assert any(not sample.rejected for sample in method.samples())
    # A method that has a default gradient has a sample of it, and one of every other it can do.
    accepted = {sample.gradient for sample in method.samples() if not sample.rejected}
    assert accepted == set(method.gradients)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="two methods are called 'zero'"):
        register(get_method("zero"))


def test_the_registry_is_public_and_stays_callable() -> None:
    """The folder of the same name, once imported, must not take the place of the function."""
    assert graphpass.methods() is graphpass.methods() is methods()
    assert list(graphpass.methods()) == sorted(graphpass.methods())
