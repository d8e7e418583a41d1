"""The rewrite: that damage to a graph is noticed, and what follows when a method fails."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

import graphpass
from graphpass import products, rewrite, variants, verify
from graphpass.errors import RewriteError
from graphpass.method import Method, get_method
from graphpass.rewrite import Replacement, seed_placeholder
from graphpass.site import Gradient, Site

# What is tested here are graphs, not the loops that Inductor writes for them.
pytestmark = pytest.mark.usefixtures("interpreted")

STEPS = 3
SITE = Site(
    name="fc",
    path="fc",
    gradient=Gradient.WEIGHT,
    op="mm",
    node="mm",
    result=None,
    layer=1,
    shapes=((3, 4), (4, 5)),
    output=(3, 5),
    dtype="float32",
    itemsize=4,
)


# --- verify.check: a graph of three results, and everything that can happen to one of them


def small_graph() -> Graph:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, None]:
        product = torch.mm(x, w)
        return product, product.sum(0, keepdim=True).relu(), None

    module = make_fx(function, tracing_mode="fake")(torch.ones(3, 4), torch.ones(4, 5))
    return module.graph


def results(graph: Graph) -> list[Any]:
    (output,) = graph.find_nodes(op="output")
    return list(output.args[0])


def set_results(graph: Graph, values: list[Any]) -> None:
    (output,) = graph.find_nodes(op="output")
    output.args = (tuple(values),)


def reshow(graph: Graph, index: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change what a result claims to be."""
    node = results(graph)[index]
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = change(value)


def rename(graph: Graph) -> None:
    results(graph)[0].name = "something_else"


def drop(graph: Graph) -> None:
    set_results(graph, results(graph)[:-1])


def add(graph: Graph) -> None:
    set_results(graph, [*results(graph), None])


def swap(graph: Graph) -> None:
    first, second, third = results(graph)
    set_results(graph, [second, first, third])


def lose(graph: Graph) -> None:
    set_results(graph, [None, *results(graph)[1:]])


def gain(graph: Graph) -> None:
    first, second, _ = results(graph)
    set_results(graph, [first, second, first])


def forget_value(graph: Graph) -> None:
    del results(graph)[0].meta["val"]


def use_before_definition(graph: Graph) -> None:
    product, relu, _ = results(graph)
    relu.append(product)


def foreign_node(graph: Graph) -> None:
    (product,) = small_graph().find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    results(graph)[1].args = (product,)


DAMAGE = {
    "name": (rename, "a result changed: .*name='mm'.* now .*name='something_else'"),
    "dtype": (
        lambda graph: reshow(graph, 0, lambda value: value.double()),
        r"a result changed: .*torch\.float32.* now .*torch\.float64",
    ),
    "shape": (
        lambda graph: reshow(graph, 0, lambda value: value.new_empty(3, 6)),
        r"a result changed: .*shape=\(3, 5\).* now .*shape=\(3, 6\)",
    ),
    "rank": (
        lambda graph: reshow(graph, 0, lambda value: value.new_empty(3, 5, 1)),
        r"a result changed: .*shape=\(3, 5\).* now .*shape=\(3, 5, 1\)",
    ),
    "strides": (
        lambda graph: reshow(graph, 0, lambda value: value.new_empty(5, 3).t()),
        r"a result changed: .*strides=\(5, 1\).* now .*strides=\(1, 3\)",
    ),
    "dropped": (drop, "returns 2 values instead of 3"),
    "added": (add, "returns 4 values instead of 3"),
    "swapped": (swap, "a result changed: .*name='mm'.* now .*name='relu'"),
    "missing": (lose, "a result changed: .*name='mm'.* now .*name=None"),
    "invented": (gain, "a result changed: .*name=None.* now .*name='mm'"),
    "unknown": (forget_value, "a result changed: .*dtype=torch.float32.* now .*dtype=None"),
    "order": (use_before_definition, "malformed: .*before it has been defined"),
    "foreign": (foreign_node, "malformed: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(damage: str) -> None:
    inflict, message = DAMAGE[damage]
    graph = small_graph()
    before = verify.interface(graph)
    verify.check(graph, before, planned=2, fired=2)
    inflict(graph)
    with pytest.raises(RewriteError, match=message):
        verify.check(graph, before, planned=2, fired=2)


@pytest.mark.parametrize(("planned", "fired"), [(1, 0), (0, 1), (3, 2)])
def test_the_number_of_rewritten_sites_is_checked(planned: int, fired: int) -> None:
    graph = small_graph()
    with pytest.raises(RewriteError, match=f"{fired} sites were rewritten, {planned} were planned"):
        verify.check(graph, verify.interface(graph), planned, fired)


def test_what_consumers_do_not_see_may_change() -> None:
    graph = small_graph()
    before = verify.interface(graph)
    (total,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    total.name = "another_sum"
    # The stride of a dimension of one element has no meaning.
    reshow(graph, 1, lambda value: value.as_strided((1, 5), (77, 1)))
    verify.check(graph, before, planned=0, fired=0)


# --- rewrite: what is asked of a graph that does not have it


def test_a_site_that_the_graph_does_not_have() -> None:
    graph = small_graph()
    zero = get_method("zero")
    site = dataclasses.replace(SITE, node="mm_7")
    with pytest.raises(RewriteError, match="the graph has no node 'mm_7' for fc:weight"):
        rewrite.rewrite(graph, [Replacement(site, zero, zero.params())], results(graph)[0])


def test_the_seed_is_the_last_input_that_is_no_tangent() -> None:
    graph = seeded_graph(torch.int64, ())
    assert str(seed_placeholder(graph).target) == "primals_2"


@pytest.mark.parametrize(("dtype", "shape"), [(torch.int32, ()), (torch.int64, (1,))])
def test_something_else_is_not_taken_for_the_seed(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    with pytest.raises(AssertionError, match="primals_2"):
        seed_placeholder(seeded_graph(dtype, shape))


def seeded_graph(dtype: torch.dtype, shape: tuple[int, ...]) -> Graph:
    graph = Graph()
    for name, value in {
        "primals_1": torch.empty(3, 4),
        "primals_2": torch.empty(shape, dtype=dtype),
        "tangents_1": torch.empty((), dtype=torch.int64),
    }.items():
        graph.placeholder(name).meta["val"] = value
    return graph


# --- Methods and rewrites that fail, in a compilation


class Net(nn.Module):
    """One convolution that is approximated, one layer that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(torch.relu(self.conv(x)).mean((2, 3)))
        return result


def train(backend: str, **options: Any) -> list[Tensor]:
    """Return the parameters after a few steps."""
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model, backend=backend, options=options or None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        compiled(torch.randn(5, 3, 8, 8, generator=generator)).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def fail(*_: object) -> Any:
    raise ArithmeticError("no such product")


def wrong_shape(site: Site, params: Any, template: Tensor, *_: object) -> Tensor:
    return template.new_zeros(template.shape[1:])


def wrong_dtype(site: Site, params: Any, template: Tensor, *_: object) -> Tensor:
    return template.new_zeros(template.shape, dtype=torch.float64)


def nothing(*_: object) -> None:
    pass


def constant(site: Site, params: Any, template: Tensor, *_: object) -> Tensor:
    return torch.tensor([1.0, 2.0]).sum() * template.new_zeros(template.shape)


def look_at_values(site: Site, params: Any, template: Tensor, seed: Tensor, salt: int) -> Tensor:
    return template.new_zeros(template.shape) if seed > 0 else template.new_ones(template.shape)


BROKEN = {
    "lowering raises": ({"lower": fail}, "ArithmeticError: no such product"),
    "wrong shape": ({"lower": wrong_shape}, "RewriteError: the method returned"),
    "wrong dtype": ({"lower": wrong_dtype}, "RewriteError: the method returned"),
    "no result": ({"lower": nothing}, "AttributeError"),
    "constant": ({"lower": constant}, "a constant was captured"),
    "reads values": ({"lower": look_at_values}, "DataDependent"),
    "unknown operand": ({"operands": lambda site, params: ("grads",)}, "KeyError: 'grads'"),
    "operands raise": ({"operands": fail}, "ArithmeticError: no such product"),
}


@contextmanager
def registered(**broken: Any) -> Iterator[Method]:
    """Add a method that is broken somewhere, for a while."""
    method = dataclasses.replace(get_method("zero"), name="broken", **broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graphpass.method._REGISTRY, "broken", method)
        graphpass.method.methods.cache_clear()
        yield method
    graphpass.method.methods.cache_clear()


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which warnings were shown, and which graphs were compiled, in other tests."""
    monkeypatch.setattr(variants, "_WARNED", set())
    monkeypatch.setattr(graphpass.report, "_GRAPHS", [])


@contextmanager
def collected() -> Iterator[list[str]]:
    """Yield the warnings of this project that are given inside, instead of raising them."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    for warning in caught:
        if "graphpass" in str(warning.message):
            assert warning.category is UserWarning
            messages.append(str(warning.message))


@pytest.mark.parametrize("broken", BROKEN)
def test_strict_raises_and_names_site_and_method(broken: str) -> None:
    fields, message = BROKEN[broken]
    pattern = rf"(?s)RewriteError: could not rewrite conv:weight by broken Params\(\).*{message}"
    with registered(**fields), pytest.raises(BackendCompilerFailed, match=pattern) as caught:
        train("approx", methods={"conv": "broken"}, strict=True)
    assert isinstance(caught.value.inner_exception, RewriteError)
    assert "convolution_backward" in str(caught.value)


@pytest.mark.parametrize("broken", ["wrong shape", "wrong dtype"])
def test_a_wrong_result_is_described(broken: str) -> None:
    fields, _ = BROKEN[broken]
    found = r"\[3, 3, 3\]" if broken == "wrong shape" else "float64"
    with registered(**fields), pytest.raises(BackendCompilerFailed, match=found):
        train("approx", methods={"conv": "broken"}, strict=True)


@pytest.mark.parametrize("broken", BROKEN)
def test_without_strict_one_warning_and_exact_training(broken: str, forgetful: None) -> None:
    fields, message = BROKEN[broken]
    exact = train("inductor")
    with registered(**fields), collected() as messages:
        parameters = train("approx", methods={"conv": "broken"})
        again = train("approx", methods={"conv": "broken"})
    (warning,) = messages
    assert "compiled exactly instead" in warning and message in warning
    assert "conv:weight by broken" in warning
    for values in (parameters, again):
        assert all(map(torch.equal, values, exact))


def test_the_process_goes_on_after_a_failure(forgetful: None) -> None:
    with registered(lower=fail), collected() as messages:
        train("approx", methods={"conv": "broken"})
    assert len(messages) == 1
    start = Net().conv.weight
    weight, *_ = train("approx", methods={"conv": "zero"}, strict=True)
    assert torch.equal(weight, start)


def test_the_report_of_a_failure_says_that_all_is_exact(forgetful: None) -> None:
    with registered(lower=fail), collected():
        train("approx", methods={"conv": "broken"})
        *_, report = graphpass.reports()
        assert str(report)
    assert not report.approximated
    (row,) = (row for row in report.rows if (row.where, row.gradient) == ("conv", "weight"))
    assert row.method == "exact" and "no such product" in row.reason


def test_reports_survive_a_failure(forgetful: None) -> None:
    with registered(lower=fail), collected():
        train("approx", methods={"conv": "broken"})
        graphpass.reports()


@pytest.mark.parametrize("strict", [False, True])
def test_a_failing_rejection_is_an_internal_failure(strict: bool, forgetful: None) -> None:
    with registered(reject=fail), collected() as messages:
        if strict:
            with pytest.raises(BackendCompilerFailed, match="ArithmeticError: no such product"):
                train("approx", methods={"conv": "broken"}, strict=True)
        else:
            exact = train("inductor")
            assert all(map(torch.equal, train("approx", methods={"conv": "broken"}), exact))
    assert len(messages) == (0 if strict else 1)


# --- Damage by the rewrite itself, caught where it is handed over


def unnamed(graph: Graph, old: Node, new: Node) -> None:
    """Put a node in the place of another without giving it the name."""
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def mislaid(function: Callable[..., Tensor], layout: tuple[int, ...]) -> Callable[..., Tensor]:
    """Return the function with its result laid out the wrong way round."""

    def wrapped(*args: Any) -> Tensor:
        result = function(*args)
        order = tuple(range(result.dim()))[::-1]
        return torch.empty_permuted(result.shape, order, dtype=result.dtype).copy_(result)

    return wrapped


@pytest.mark.parametrize(
    ("name", "stand_in", "message"),
    [
        ("_replace", unnamed, "a result changed: .*name="),
        ("_laid_out", mislaid, "a result changed: .*strides="),
        ("_rewrite_node", lambda *_: 0, "0 sites were rewritten, 1 were planned"),
        ("_rewrite_node", lambda *_: 2, "2 sites were rewritten, 1 were planned"),
    ],
)
def test_a_faulty_rewrite_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    forgetful: None,
    name: str,
    stand_in: Callable[..., Any],
    message: str,
) -> None:
    monkeypatch.setattr(products if name == "_laid_out" else rewrite, name, stand_in)
    # A graph that comes out of the cache would not be rewritten.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        with pytest.raises(BackendCompilerFailed, match=f"RewriteError: {message}"):
            train("approx", methods={"conv": "zero"}, strict=True)
        with collected() as messages:
            parameters = train("approx", methods={"conv": "zero"})
    monkeypatch.undo()
    assert len(messages) == 1
    assert all(map(torch.equal, parameters, train("inductor")))


# --- Two products of one node, and the layout of results


def gradients(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model.zero_grad()
    x = x.clone().requires_grad_()
    backend = "approx" if options else "eager"
    torch.compile(model, backend=backend, options=options or None)(x).square().sum().backward()
    values = {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    return {name: value.clone() for name, value in values.items() if value is not None}


def test_both_products_of_one_node_are_replaced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())
    x = torch.randn(5, 3, 8, 8)
    exact = gradients(model, x)
    methods = {
        "0": {"name": "zero", "gradient": "input"},
        # Another pattern for the same module: the first stays in force for the other gradient.
        "[0]": {"name": "random", "gradient": "weight", "std": 0.5},
    }
    found = gradients(model, x, methods=methods, strict=True)
    planned = graphpass.session(model).plan.approximated
    assert {d.site: d.method for d in planned} == {"0:weight": "random", "0:input": "zero"}
    assert not found["input"].any()
    spread = float(found["0.weight"].std())
    count = found["0.weight"].numel()
    # The standard deviation of so many normal values, within five standard errors.
    assert abs(spread / 0.5 - 1) < 5 / (2 * count) ** 0.5
    # A bias gradient sums 5 * 36 derivatives of tanh(y)**2, which are all below 1.
    length = 5 * 36
    tolerance = length * torch.finfo(torch.float32).eps * length
    torch.testing.assert_close(found["0.bias"], exact["0.bias"], atol=tolerance, rtol=0)


def test_results_are_laid_out_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2))
    model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    exact = gradients(model, x)
    methods = {"0": {"name": "topk", "k": 2, "min_positions": 1}, "2": "random"}
    found = gradients(model, x, methods=methods, strict=True)
    assert {name: value.stride() for name, value in found.items()} == {
        name: value.stride() for name, value in exact.items()
    }
