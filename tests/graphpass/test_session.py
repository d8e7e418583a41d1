"""The session of a model: what counts as a step, exact sections, saving and resuming."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphpass
from graphpass import ConfigError, Schedule, Session, report, variants
from graphpass.dispatcher import Dispatcher

# What is tested here are graphs, not the loops that Inductor writes for them.
pytestmark = pytest.mark.usefixtures("aten_only")

Step = Callable[[int], Tensor]

WIDTH = 6
BATCH = 4
# The weight gradient of the layer in the middle is drawn: it shows which draws a call got.
DRAWN: dict[str, Any] = {"methods": {"body": {"name": "random", "std": 1.0}}}
# The same layer on every odd step alone: its weight gradient shows which variant a call got.
ON_ODD_STEPS: dict[str, Any] = {"methods": {"body": "zero"}, "schedule": "ga-2"}


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "_WARNED", set())
    monkeypatch.setattr(report, "_GRAPHS", [])


class Net(nn.Module):
    """Three linear layers, the same in every instance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.tail = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(torch.tanh(self.body(torch.tanh(self.head(x)))))
        return y

    @property
    def drawn(self) -> nn.Parameter:
        """The parameter that the options below are about."""
        return self.body.weight


def batch(number: int, size: int = BATCH) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(number))


def compiled(model: nn.Module, options: dict[str, Any], **more: Any) -> Callable[..., Tensor]:
    result: Callable[..., Tensor] = torch.compile(model, backend="approx", options=options, **more)
    return result


def grad_of(parameter: nn.Parameter) -> Tensor:
    """Return the gradient, and leave none behind."""
    assert parameter.grad is not None
    grad, parameter.grad = parameter.grad.clone(), None
    return grad


def trainer(options: dict[str, Any]) -> tuple[Net, Session, Step]:
    """Return a model, its session, and a function: batch number -> drawn weight gradient."""
    model = Net()
    call = compiled(model, options)

    def step(number: int) -> Tensor:
        call(batch(number)).square().sum().backward()
        return grad_of(model.drawn)

    return model, graphpass.session(model), step


def test_a_training_forward_is_a_step() -> None:
    _, session, step = trainer(DRAWN)
    assert session.step == 0
    drawn = []
    for done in range(1, 4):
        drawn.append(step(0))
        assert session.step == done
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_a_forward_without_backward_is_a_step_too() -> None:
    model = Net()
    call = compiled(model, DRAWN)
    for done in range(1, 4):
        call(batch(0))
        assert graphpass.session(model).step == done


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    runs = []
    for seed in (0, 0, 7):
        torch._dynamo.reset()
        _, _, step = trainer(DRAWN | {"seed": seed})
        runs.append([step(number) for number in range(3)])
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not any(map(torch.equal, runs[0], runs[2]))


class Broken(nn.Module):
    """Two graphs a forward, each with an approximated layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        y: Tensor = self.second(x)
        return y


# Dynamo looks at `.grad` of what the first graph hands to the second, and hides the warning by
# replacing `showwarning` (2.13, torch/_dynamo/variables/builder.py): too late for "error".
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_graph_break_does_not_make_two_steps_of_one() -> None:
    model = Broken()
    call = compiled(model, {"methods": {"*": "zero"}, "schedule": Schedule.until(2)})
    for number in range(4):
        call(batch(number)).square().sum().backward()
        assert graphpass.session(model).step == number + 1
        grads = [grad_of(layer.weight) for layer in (model.first, model.second)]
        assert [bool(grad.any()) for grad in grads] == [number >= 2] * 2
    assert [row.layer for r in graphpass.reports() for row in r.approximated] == [1, 2]
    layers = {(d.site, d.layer) for d in graphpass.session(model).plan.approximated}
    assert layers == {("first:weight", 1), ("second:weight", 2)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


class Loop(nn.Module):
    """Blocks of one class; a graph break in a loop leaves a compiled frame for each of them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


def test_blocks_that_share_a_compiled_graph_make_one_step_and_draw_apart() -> None:
    model = Loop(depth=4)
    call = compiled(model, {"methods": {"*.inner": {"name": "random", "std": 1.0}}})
    for done in range(1, 3):
        # With a gradient of its own, the input is to the first block what it is to the others.
        call(batch(0).requires_grad_()).square().sum().backward()
        assert graphpass.session(model).step == done
        grads = [grad_of(parameter) for parameter in model.parameters() if parameter.dim() > 1]
        pairs = [(a, b) for i, a in enumerate(grads) for b in grads[:i]]
        assert not any(torch.equal(a, b) for a, b in pairs)
    # Each block has a report under its own names.
    assert len(graphpass.reports()) == 4


def test_forwards_that_train_nothing_are_no_steps() -> None:
    model, session, step = trainer(DRAWN)
    call = compiled(model, DRAWN)
    expected = [step(0), step(0)]

    torch._dynamo.reset()
    model, session, step = trainer(DRAWN)
    call = compiled(model, DRAWN)
    first = step(0)
    with torch.no_grad():
        call(batch(1))
    with torch.inference_mode():
        call(batch(2))
    model.eval()
    call(batch(3))
    with torch.no_grad():
        call(batch(4))
    model.train()
    assert session.step == 1
    assert torch.equal(first, expected[0])
    assert torch.equal(step(0), expected[1])


def test_gradients_in_eval_mode_are_exact_and_no_step() -> None:
    reference = Net()
    torch.compile(reference, backend="inductor")(batch(3)).square().sum().backward()
    model, session, step = trainer(DRAWN)
    step(0)
    model.zero_grad()
    model.eval()
    compiled(model, DRAWN)(batch(3)).square().sum().backward()
    assert session.step == 1
    for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(grad_of(got), grad_of(wanted))


def test_counting_goes_on_when_another_batch_size_recompiles() -> None:
    model = Net()
    call = compiled(model, ON_ODD_STEPS)
    for number, size in enumerate((4, 4, 3, 3, 5, 5, 4, 4)):
        call(batch(number, size)).square().sum().backward()
        assert graphpass.session(model).step == number + 1
        assert bool(grad_of(model.drawn).any()) == (number % 2 == 0)


def test_after_advance_only_advance_counts() -> None:
    _, session, step = trainer(ON_ODD_STEPS)
    assert step(0).any()
    session.advance()
    for done in range(1, 5):
        assert session.step == done
        # Three micro-batches of one step see the same variant.
        assert [bool(step(number).any()) for number in range(3)] == [done % 2 == 0] * 3
        assert session.step == done
        session.advance()


def test_micro_batches_of_a_step_draw_apart() -> None:
    _, session, step = trainer(DRAWN)
    session.advance()
    first = [step(0) for _ in range(3)]
    session.advance()
    second = [step(0) for _ in range(3)]
    assert session.step == 2
    drawn = first + second
    pairs = [(a, b) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_following_an_optimizer_counts_its_steps() -> None:
    model, session, step = trainer(ON_ODD_STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.follow(optimizer)
    for done in range(4):
        assert session.step == done
        assert [bool(step(number).any()) for number in range(2)] == [done % 2 == 0] * 2
        optimizer.step()
    assert session.step == 4


def test_a_step_may_hold_several_forwards() -> None:
    model = Net()
    call = compiled(model, ON_ODD_STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    graphpass.session(model).follow(optimizer)
    for number in range(4):
        left, right = call(batch(0)), call(batch(1))
        (left - right).square().sum().backward()
        assert bool(grad_of(model.drawn).any()) == (number % 2 == 0)
        optimizer.step()
    assert graphpass.session(model).step == 4


def test_exact_sections_equal_inductor_and_count() -> None:
    reference = Net()
    torch.compile(reference, backend="inductor")(batch(1)).square().sum().backward()
    model, session, step = trainer(DRAWN)
    expected = [step(0) for _ in range(3)]

    torch._dynamo.reset()
    model, session, step = trainer(DRAWN)
    call = compiled(model, DRAWN)
    assert torch.equal(step(0), expected[0])
    model.zero_grad()
    with session.exact(), session.exact():
        call(batch(1)).square().sum().backward()
    assert session.step == 2
    for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(grad_of(got), grad_of(wanted))
    # The section took step 1 and the draws that would have been its.
    assert torch.equal(step(0), expected[2])


def test_an_exact_section_ends_with_an_error_too() -> None:
    session = graphpass.session(Net())
    with pytest.raises(RuntimeError, match="from inside"), session.exact():
        raise RuntimeError("from inside")
    assert not session.is_exact


def test_the_backward_of_an_exact_forward_is_exact_after_the_section() -> None:
    model, session, _ = trainer({"methods": {"body": "zero"}})
    call = compiled(model, {"methods": {"body": "zero"}})
    with session.exact():
        loss = call(batch(0)).square().sum()
    loss.backward()
    assert grad_of(model.drawn).any()


def test_a_session_exists_before_the_first_forward() -> None:
    model = Net()
    session = graphpass.session(compiled(model, ON_ODD_STEPS))
    assert (session.step, session.plan.decisions) == (0, ())
    session.load_state_dict({"version": 1, "step": 1, "counts_forwards": True, "calls": []})
    compiled(model, ON_ODD_STEPS)(batch(0)).square().sum().backward()
    assert not grad_of(model.drawn).any()
    assert session.step == 2


def test_wrapper_and_model_have_one_session() -> None:
    model = Net()
    wrapper = torch.compile(model, backend="approx", options=DRAWN)
    assert graphpass.session(wrapper) is graphpass.session(model)
    in_place = Net()
    in_place.compile(backend="approx", options=DRAWN)
    in_place(batch(0)).square().sum().backward()
    assert graphpass.session(in_place).step == 1
    assert graphpass.session(in_place) is not graphpass.session(model)


@pytest.mark.parametrize("given", [None, lambda x: x, 3])
def test_only_a_module_has_a_session(given: Any) -> None:
    with pytest.raises(ConfigError, match="is no module; give what torch"):
        graphpass.session(given)


def test_steps_are_counted_where_the_plan_is_empty() -> None:
    model = Net()
    call = compiled(model, {"budget": 0})
    for done in range(1, 3):
        call(batch(0)).square().sum().backward()
        assert graphpass.session(model).step == done


def test_where_nothing_is_approximated_nothing_is_dispatched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A training call goes straight to Inductor's code, and is counted; others are not counted."""
    model, session, step = trainer({"budget": 0})
    step(0)

    def dispatched(*args: Any) -> Any:
        raise AssertionError(args)

    with monkeypatch.context() as patch:
        patch.setattr(Dispatcher, "__call__", dispatched)
        assert torch.equal(step(1), step(1))
    assert session.step == 3
    model.eval()
    step(1)
    model.train()
    assert session.step == 3
    step(1)
    assert session.step == 4


STATE = {"version": 1, "step": 3, "counts_forwards": True, "calls": []}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no state of a graphpass session: {}; give what"),
        (None, "no state of a graphpass session"),
        ([1, 2], "no state of a graphpass session"),
        ({**STATE, "calls": None}, "no state of a graphpass session"),
        ({**STATE, "version": 2}, "version 2 at step 3 cannot be loaded; this version reads"),
        ({**STATE, "step": -1}, "at step -1 cannot be loaded"),
        ({**STATE, "step": "3"}, "at step '3' cannot be loaded"),
    ],
)
def test_a_bad_state_is_refused(state: Any, message: str) -> None:
    session = graphpass.session(Net())
    with pytest.raises(ConfigError, match=message):
        session.load_state_dict(state)
    assert session.step == 0


@pytest.mark.parametrize("calls", [["1"], [None], [-1], "12"])
def test_a_bad_count_of_calls_is_refused(calls: Any) -> None:
    session = graphpass.session(Net())
    with pytest.raises(ConfigError, match="state of a graphpass session"):
        session.load_state_dict({**STATE, "counts_forwards": False, "calls": calls})


class Run:
    """A training run that can be saved after any micro-batch and resumed elsewhere."""

    def __init__(self, micro_batches: int | None) -> None:
        """Begin a run.

        Args:
            micro_batches: forwards an optimizer step; None for one, counted by default.
        """
        # What a new process would not have.
        torch._dynamo.reset()
        self.model = Net()
        self.call = compiled(
            self.model,
            {
                "methods": {"body": {"name": "random", "std": 0.1}, "tail": "zero"},
                "schedule": Schedule("late pairs", first_layer=2, every_step=2, phase=1),
                "seed": 3,
            },
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.session = graphpass.session(self.model)
        self.each = micro_batches or 1
        self.done = 0
        if micro_batches is not None:
            self.session.follow(self.optimizer)

    def train(self, until: int) -> None:
        """Run micro-batches up to number `until`."""
        for number in range(self.done, until):
            self.call(batch(number)).square().sum().backward()
            if (number + 1) % self.each == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.done = until

    def save(self) -> dict[str, Any]:
        """Return the state, and the gradients that are being accumulated."""
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            # As a file would keep it.
            "session": json.loads(json.dumps(self.session.state_dict())),
            "grads": [None if p.grad is None else p.grad.clone() for p in self.model.parameters()],
            "done": self.done,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.load_state_dict(state["session"])
        for parameter, grad in zip(self.model.parameters(), state["grads"], strict=True):
            parameter.grad = grad
        self.done = state["done"]


@pytest.mark.parametrize(
    ("micro_batches", "total", "saved_at"),
    [(None, 6, 3), (None, 6, 2), (3, 12, 6), (3, 12, 4), (3, 12, 8)],
    ids=["odd", "even", "between steps", "inside step 1", "inside step 2"],
)
def test_a_resumed_run_gives_the_same_bits(
    micro_batches: int | None, total: int, saved_at: int
) -> None:
    straight = Run(micro_batches)
    straight.train(total)
    begun = Run(micro_batches)
    begun.train(saved_at)
    state = begun.save()
    resumed = Run(micro_batches)
    resumed.load(state)
    resumed.train(total)
    assert resumed.session.step == straight.session.step
    for got, wanted in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(got, wanted)


def test_a_resumed_run_depends_on_the_session() -> None:
    """Without it, the comparison of bits above would prove nothing."""
    straight = Run(None)
    straight.train(6)
    begun = Run(None)
    begun.train(3)
    state = begun.save()
    resumed = Run(None)
    resumed.load(state | {"session": STATE | {"step": 0}})
    resumed.train(6)
    assert not torch.equal(resumed.model.drawn, straight.model.drawn)


def test_a_state_loaded_into_a_session_in_use_rolls_it_back() -> None:
    run = Run(3)
    run.train(4)
    state = run.save()
    run.train(9)
    once = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.load(state)
    run.train(9)
    assert all(map(torch.equal, once, run.model.parameters()))
