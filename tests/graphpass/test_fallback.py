"""What happens when something of ours fails, and to programs of unusual shapes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import graphpass
from graphpass import ConfigError, Schedule, capture, report, variants

# What is tested here are graphs, not the loops that Inductor writes for them.
pytestmark = pytest.mark.usefixtures("interpreted")

WIDTH = 6
BATCH = 4
ZERO: dict[str, Any] = {"methods": {"body": "zero"}}
LATE: dict[str, Any] = {**ZERO, "schedule": Schedule.after(2)}


# Dynamo makes an instance of the base class to stand for `ctx` (2.13, side_effects.py).
FUNCTION_WARNING = pytest.mark.filterwarnings(
    "ignore:.*torch.autograd.function.Function.* should not be instantiated:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "_WARNED", set())
    monkeypatch.setattr(report, "_GRAPHS", [])


def batch(number: int) -> Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(number))


class Net(nn.Module):
    """Two linear layers, the same in every instance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.tail = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(torch.tanh(self.body(x)))
        return y


def compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, backend="approx", options=options)
    return result


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every gradient, and leave none behind."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def zeroed(model: nn.Module) -> list[str]:
    return [name for name, grad in grads_of(model).items() if not grad.any()]


def train(backend: str, options: dict[str, Any] | None, make: type[nn.Module]) -> dict[str, Tensor]:
    """Return the gradients of one step on batch 0."""
    model = make()
    torch.compile(model, backend=backend, options=options)(batch(0)).square().sum().backward()
    return grads_of(model)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, grad in one.items():
        assert torch.equal(grad, other[name]), name


# Internal failures.


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("a bug of ours")


@pytest.fixture
def uncached() -> Iterator[None]:
    """Compile every graph anew: what comes from a cache is not rewritten."""
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@pytest.fixture(params=["capture", "rewrite"])
def bug(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    uncached: None,
) -> str:
    """Break the analysis of graphs or their rewriting."""
    del uncached
    # Nothing is remembered.
    monkeypatch.setenv("GRAPHPASS_CACHE_DIR", str(tmp_path))
    where = {"capture": (capture, "find_sites"), "rewrite": (variants, "rewrite")}
    monkeypatch.setattr(*where[request.param], broken)
    return str(request.param)


@pytest.mark.usefixtures("bug")
def test_an_internal_failure_warns_once_and_trains_exactly() -> None:
    wanted = train("inductor", None, Net)
    with pytest.warns(UserWarning) as caught:
        got = train("approx", ZERO, Net)
        torch._dynamo.reset()
        again = train("approx", ZERO, Net)
    text = [str(warning.message) for warning in caught]
    assert len(text) == 1
    assert "the model is compiled exactly instead" in text[0]
    assert "a bug of ours" in text[0]
    assert_same(got, wanted)
    assert_same(again, wanted)


@pytest.mark.usefixtures("bug")
def test_an_internal_failure_raises_where_that_is_asked_for() -> None:
    with pytest.raises(BackendCompilerFailed, match="a bug of ours"):
        train("approx", {**ZERO, "strict": True}, Net)


@pytest.mark.parametrize("bug", ["rewrite"], indirect=True)
def test_the_report_of_a_failed_plan_says_that_all_is_exact(bug: str) -> None:
    del bug
    with pytest.warns(UserWarning, match="a bug of ours"):
        train("approx", ZERO, Net)
    assert [row.where for r in graphpass.reports() for row in r.approximated] == []


@pytest.mark.usefixtures("uncached")
def test_a_late_variant_that_fails_runs_exactly_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = train("inductor", None, Net)
    model = Net()
    call = compiled(model, LATE)
    for number in range(2):
        call(batch(number)).square().sum().backward()
        assert zeroed(model) == []
    monkeypatch.setattr(variants, "rewrite", broken)
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            call(batch(0)).square().sum().backward()
            assert_same(grads_of(model), wanted)
    text = [str(warning.message) for warning in caught]
    assert len(text) == 1
    assert "a variant could not be compiled and runs exactly instead" in text[0]
    assert "a bug of ours" in text[0]
    assert graphpass.session(model).step == 5


@pytest.mark.usefixtures("uncached")
def test_a_late_variant_that_fails_raises_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Net()
    call = compiled(model, {**LATE, "strict": True})
    for number in range(2):
        call(batch(number))
    monkeypatch.setattr(variants, "rewrite", broken)
    with pytest.raises(Exception, match="a bug of ours"):
        call(batch(2))


def test_a_mistake_of_the_user_is_no_internal_failure() -> None:
    with pytest.raises(ConfigError, match="unknown method 'zeroo': legal are"):
        train("approx", {"methods": {"body": "zeroo"}}, Net)


# Graphs with parts that are compiled on their own.


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(
            x.sum() > 0,
            lambda x: self.tail(torch.tanh(self.body(x))),
            lambda x: self.tail(self.body(x)),
            (x,),
        )
        return y


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class WithFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(Double.apply(self.body(x)))
        return y


@FUNCTION_WARNING
@pytest.mark.parametrize("make", [Branching, WithFunction])
def test_nested_regions_train_as_inductor_trains_them(make: type[nn.Module]) -> None:
    assert_same(train("approx", ZERO, make), train("inductor", None, make))


@FUNCTION_WARNING
@pytest.mark.parametrize("make", [Branching, WithFunction])
def test_the_report_says_why_nested_regions_are_exact(make: type[nn.Module]) -> None:
    train("approx", ZERO, make)
    assert "control flow or nested regions" in "".join(map(str, graphpass.reports()))


# Functions, where no module is compiled.


def report_of_weights() -> list[tuple[str, str]]:
    (only,) = graphpass.reports()
    return [(row.where, row.method) for row in only.rows if row.gradient == "weight"]


EXPECTED = [("tail", "exact"), ("body", "zero")]
SHARED = Net()


def test_a_function_that_closes_over_a_model() -> None:
    model = Net()

    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().sum()

    compiled(loss_of, ZERO)(batch(0)).backward()
    assert zeroed(model) == ["body.weight"]
    assert report_of_weights() == EXPECTED
    assert graphpass.session(model).step == 1


def test_a_function_with_a_global_model() -> None:
    SHARED.zero_grad()

    def loss_of(x: Tensor) -> Tensor:
        return SHARED(x).square().sum()

    compiled(loss_of, ZERO)(batch(0)).backward()
    assert zeroed(SHARED) == ["body.weight"]
    assert report_of_weights() == EXPECTED


def loss_of_model(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().sum()
    return loss


def test_a_function_that_is_given_a_model() -> None:
    model = Net()
    step = compiled(loss_of_model, ZERO)
    for done in range(1, 3):
        step(model, batch(0)).backward()
        assert zeroed(model) == ["body.weight"]
        assert graphpass.session(model).step == done
    assert report_of_weights() == EXPECTED
    model.eval()
    step(model, batch(0)).backward()
    assert zeroed(model) == []
    model.train()
    with graphpass.session(model).exact():
        step(model, batch(0)).backward()
        assert zeroed(model) == []


def test_a_training_step_with_its_backward_inside() -> None:
    def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    model, reference = Net(), Net()
    steps = [compiled(train_step, ZERO), train_step]
    for one, step in zip((model, reference), steps, strict=True):
        step(one, torch.optim.SGD(one.parameters(), lr=0.1), batch(0))
    assert report_of_weights() == EXPECTED
    assert torch.equal(model.body.weight, Net().body.weight)
    assert not torch.equal(model.body.bias, Net().body.bias)
    # Sums of WIDTH and of BATCH products: each rounds once a term, in either order.
    tolerance = 2 * (WIDTH + BATCH) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        model.tail.weight, reference.tail.weight, rtol=tolerance, atol=tolerance
    )


def loss_with_criterion(model: nn.Module, criterion: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = criterion(model(x), torch.zeros_like(x))
    return loss


def test_a_function_that_is_given_a_model_and_a_loss() -> None:
    model = Net()
    step = compiled(loss_with_criterion, {"methods": {"*body": "zero"}})
    step(model, nn.MSELoss(), batch(0)).backward()
    assert zeroed(model) == ["body.weight"]
    assert report_of_weights() == EXPECTED
    assert graphpass.session(model).step == 1


def test_a_function_without_parameters_compiles() -> None:
    """Its inputs need gradients, so it has a joint graph; nothing in it was asked for."""
    x = batch(0).requires_grad_()
    weight = torch.randn(WIDTH, WIDTH)

    def function(x: Tensor) -> Tensor:
        return torch.tanh(x @ weight).sum()

    compiled(function, ZERO)(x).backward()
    got, x.grad = x.grad, None
    torch.compile(function, backend="inductor")(x).backward()
    assert got is not None and x.grad is not None
    assert torch.equal(got, x.grad)
