"""Compiled variants of one graph: what they share, what they must not, and when they are made."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import Graph, Node
from torch.utils.checkpoint import checkpoint

import graphpass
from codegen import draws
from graphpass import Schedule, planner, report, schedule, variants
from graphpass.method import Method
from graphpass.site import Gradient, Site

WIDTH = 6
BATCH = 4
EVERY_OTHER = Schedule("every other", every_step=2, phase=1)

# What one compiled frame hands to the next is no leaf, and torch looks at its `.grad`; the warning
# is hidden by replacing `showwarning`, too late for "error" (2.13, meta_utils.py).
NO_LEAF_WARNING = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "_WARNED", set())
    monkeypatch.setattr(report, "_GRAPHS", [])
    counters.clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Return the graphs that reach Inductor to be compiled; the list grows while a test runs.

    Captures are left out: they are abandoned before anything is compiled.
    """
    finished: list[Graph] = []
    original = variants.compile_fx

    def counting(gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        graph = gm.graph
        result = original(gm, *args, **kwargs)
        finished.append(graph)
        return result

    monkeypatch.setattr(variants, "compile_fx", counting)
    return finished


def batch(number: int, size: int = BATCH) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(number))


def compiled(model: nn.Module, options: dict[str, Any], **more: Any) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(model, backend="approx", options=options, **more)
    return result


def grads_of(model: nn.Module) -> list[Tensor]:
    """Return every gradient, and leave none behind."""
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None]


def zeroed(model: nn.Module) -> list[str]:
    """Return the names of the weights whose gradient is zero, and leave none behind."""
    names = [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.grad is not None and not parameter.grad.any()
    ]
    model.zero_grad()
    return names


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


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


def inductor_grads(number: int, size: int = BATCH) -> list[Tensor]:
    """Return the gradients of a `Net`, compiled by Inductor alone, on one batch."""
    model = Net()
    torch.compile(model, backend="inductor")(batch(number, size)).square().sum().backward()
    return grads_of(model)


# What the user holds is not overwritten.


class Held(nn.Module):
    """Returns a tensor that backward reads as well, beside one whose inner value is donated.

    Exact, forward keeps (x, h, u) for backward, and u (number 2) is donated: nobody else holds it.
    With both weight gradients zero it keeps (h, u), and number 1 is donated. A backward part that
    takes the numbers of the other variant writes into h, which the user holds.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.left(x))
        u = self.right(x)
        return h, u * u


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in first out", "last in first out"])
@pytest.mark.parametrize("start", [0, 1], ids=["exact first", "approximate first"])
def test_outputs_in_the_users_hands_stay_as_they_are(order: tuple[int, int], start: int) -> None:
    model = Held()
    rule = Schedule("alternating", every_step=2, phase=1 - start)
    call = compiled(model, {"methods": {"*": "zero"}, "schedule": rule})
    for number in range(2):
        held = [call(batch(2 * number + i)) for i in range(2)]
        before = [[output.detach().clone() for output in outputs] for outputs in held]
        for i in order:
            (held[i][0].sum() + held[i][1].sum()).backward()
            assert zeroed(model) == ([] if i == start else ["left", "right"])
        for outputs, copies in zip(held, before, strict=True):
            assert equal([output.detach() for output in outputs], copies)


def test_outputs_stay_as_they_are_when_every_step_ends_before_the_next() -> None:
    model = Held()
    call = compiled(model, {"methods": {"*": "zero"}, "schedule": EVERY_OTHER})
    for number in range(4):
        held = call(batch(number))
        before = [output.detach().clone() for output in held]
        (held[0].sum() + held[1].sum()).backward()
        assert equal([output.detach() for output in held], before)


@pytest.mark.usefixtures("aten_only")
def test_the_variant_of_a_backward_is_that_of_its_forward() -> None:
    """Also when the next step has begun, and when backward runs twice."""
    model = Net()
    call = compiled(model, {"methods": {"body": "zero"}, "schedule": EVERY_OTHER})
    losses = [call(batch(number)).square().sum() for number in range(4)]
    for number in (2, 3, 0, 1):
        losses[number].backward()
        assert zeroed(model) == ([] if number % 2 == 0 else ["body"])


# Draws.


class Dropped(nn.Module):
    """Draws from torch's own generator between two approximated layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.tanh(self.head(x)), 0.5, self.training)
        y: Tensor = self.body(x)
        return y


def drop_and_draw(backend: str, options: dict[str, Any] | None) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of four training steps, and torch's generator after them."""
    torch._dynamo.reset()
    model = Dropped()
    call = torch.compile(model, backend=backend, options=options)
    torch.manual_seed(5)
    outputs = []
    for number in range(4):
        output = call(batch(number))
        output.square().sum().backward()
        outputs.append(output.detach())
    return outputs, torch.get_rng_state()


@pytest.mark.parametrize("rule", [EVERY_OTHER, Schedule.after(2)], ids=["two", "late"])
@pytest.mark.usefixtures("aten_only")
def test_torchs_generator_is_left_alone(rule: Schedule) -> None:
    """Not even a variant that is compiled late draws from it: dropout masks stay the same."""
    wanted, wanted_state = drop_and_draw("inductor", None)
    options = {"methods": {"body": "random"}, "schedule": rule}
    outputs, state = drop_and_draw("approx", options)
    assert equal(outputs, wanted)
    assert torch.equal(state, wanted_state)


@dataclass(frozen=True, slots=True)
class _Nothing:
    """No parameters."""


def _half(site: Site, params: Any, template: Tensor, seed: Tensor, salt: int, *x: Tensor) -> Tensor:
    """Keep the even or the odd ones of the contracted rows.

    The half of the right factor is smaller than the factor, and so what is kept for backward: it is
    chosen forward, the half of the left factor backward, and both must be the same half.
    """
    del site, params, template
    left, right = x
    odd = (draws.uniform(seed, 1, salt) < 0.5).long()
    kept = 2 * torch.arange(BATCH // 2) + odd
    return left[:, kept] @ (right[kept] * 2.0)


HALF = Method(
    name="half",
    summary="half of the rows",
    source="this test",
    unbiased=True,
    gradients=(Gradient.WEIGHT,),
    params=_Nothing,
    reject=lambda site, params: None,
    cost=lambda site, params: (),
    operands=lambda site, params: ("left", "right"),
    draw=lambda *_: None,
    reference=_half,
    lower=_half,
    samples=lambda: (),
)


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Node]]:
    """Return the nodes of every graph rewritten in a test; nothing comes from a cache."""
    nodes: list[Node] = []
    original = variants.rewrite

    def spying(graph: Graph, *args: Any) -> None:
        original(graph, *args)
        nodes.extend(graph.nodes)

    monkeypatch.setattr(variants, "rewrite", spying)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield nodes


def test_a_draw_is_the_same_wherever_the_compiler_puts_it(
    rewritten: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn once for forward and once for backward, it would halve the mean."""
    monkeypatch.setattr(planner, "get_method", lambda name: HALF)
    model = Net()
    # The input of the first layer is kept for its weight gradient alone, so half of it is enough.
    call = compiled(model, {"methods": {"head": "half"}})
    x, steps = batch(0), 400
    total = torch.zeros_like(model.head.weight)
    for _ in range(steps):
        call(x).square().sum().backward()
        total += grads_of(model)[0]

    exact = Net()
    outer = exact.head(x)
    outer.retain_grad()
    exact.tail(torch.tanh(exact.body(torch.tanh(outer)))).square().sum().backward()
    assert outer.grad is not None
    rows = outer.grad[:, :, None] * x[:, None, :]
    # A draw is twice the sum over the even rows or over the odd ones.
    deviation = (rows[::2].sum(0) - rows[1::2].sum(0)).abs() / steps**0.5
    # A normal variable leaves six standard deviations once in 500 million draws.
    assert ((total / steps - rows.sum(0)).abs() <= 6 * deviation).all()
    targets = {node.target for node in rewritten if isinstance(node.target, torch._ops.OpOverload)}
    assert torch.ops.aten.bitwise_xor.Tensor in targets
    assert not {t for t in targets if torch.Tag.nondeterministic_seeded in t.tags}


# Number and time of compilations.


class SmallConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(1, 2, 3)
        self.two = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.relu(self.one(x)))
        return y


def test_a_hundred_steps_compile_two_variants_of_one_graph(compilations: list[Graph]) -> None:
    model = SmallConv()
    call = compiled(model, {"methods": {"*": "zero"}, "schedule": "ga-2"})
    x = torch.randn(2, 1, 6, 6)
    for number in range(2):
        call(x).square().sum().backward()
        assert zeroed(model) == ["two"] * number
    assert len(compilations) == 2
    seen = (counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(98):
            call(x).square().sum().backward()
            assert zeroed(model) == ["two"] * (number % 2)
    assert len(compilations) == 2
    assert seen == (counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"])
    assert counters["stats"]["unique_graphs"] == 1
    assert [r.variants for r in graphpass.reports()] == [2]


@pytest.mark.usefixtures("aten_only")
def test_switching_touches_no_guard(compilations: list[Graph]) -> None:
    """Nor does an exact section."""
    model = Net()
    options = {"methods": {"body": "zero"}, "schedule": Schedule("third", every_step=3, phase=2)}
    call = compiled(model, options)
    call(batch(0)).square().sum().backward()
    seen = []
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(5):
            call(batch(number)).square().sum().backward()
            seen.append(zeroed(model))
        with graphpass.session(model).exact():
            call(batch(0)).square().sum().backward()
            seen.append(zeroed(model))
    assert seen == [[], ["body"], [], [], ["body"], []]
    assert counters["stats"]["unique_graphs"] == 1
    assert len(compilations) == 2


@pytest.mark.usefixtures("aten_only")
def test_an_exact_part_after_an_approximate_one_equals_inductor(compilations: list[Graph]) -> None:
    model = Net()
    call = compiled(model, {"methods": {"body": "zero"}, "schedule": Schedule.until(3)})
    for number in range(3):
        call(batch(number)).square().sum().backward()
        assert zeroed(model) == ["body"]
        assert len(compilations) == 1
    for number in range(3, 6):
        call(batch(number)).square().sum().backward()
        assert equal(grads_of(model), inductor_grads(number))
        assert len(compilations) == 2


@pytest.mark.usefixtures("aten_only")
def test_a_late_approximate_variant_follows_an_exact_start(compilations: list[Graph]) -> None:
    model = Net()
    call = compiled(model, {"methods": {"body": "zero"}, "warmup_steps": 2})
    for number in range(4):
        call(batch(number)).square().sum().backward()
        assert zeroed(model) == ([] if number < 2 else ["body"])
        assert len(compilations) == (1 if number < 2 else 2)


@pytest.mark.usefixtures("aten_only")
def test_a_late_variant_of_a_static_graph_has_static_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    symbols = []
    original = variants.compile_fx

    def looking(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        context = torch._guards.TracingContext.try_get()
        assert context is not None and context.fake_mode is not None
        assert context.fake_mode.shape_env is not None
        symbols.append(set(context.fake_mode.shape_env.var_to_range))
        return result

    monkeypatch.setattr(variants, "compile_fx", looking)
    model = Net()
    # Other sizes than in other tests: what Inductor finds in its cache it does not trace.
    call = compiled(model, {"methods": {"body": "zero"}, "schedule": Schedule.until(1)})
    for number in range(2):
        call(batch(number, 7)).square().sum().backward()
    assert symbols == [set(), set()]


@pytest.mark.usefixtures("aten_only")
def test_gradients_in_eval_mode_compile_the_exact_variant_when_first_asked_for(
    compilations: list[Graph],
) -> None:
    model = Net()
    call = compiled(model, {"methods": {"body": "zero"}})
    call(batch(0)).square().sum().backward()
    assert zeroed(model) == ["body"]
    assert len(compilations) == 1
    model.eval()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            call(batch(1)).square().sum().backward()
            assert equal(grads_of(model), inductor_grads_under_stance(1))
    assert len(compilations) == 2
    model.train()
    call(batch(2)).square().sum().backward()
    assert zeroed(model) == ["body"]


def inductor_grads_under_stance(number: int) -> list[Tensor]:
    with torch.compiler.set_stance("default"):
        return inductor_grads(number)


def rotating(layers: int) -> Schedule:
    """Return the schedule that selects one layer a step, in turn."""
    return Schedule("rotating", rule=lambda layer, step: layer == 1 + step % layers)


LAYERS = ["head", "body", "tail"]


@pytest.mark.usefixtures("aten_only")
def test_more_variants_than_allowed_run_exactly_with_one_warning(
    compilations: list[Graph],
) -> None:
    model = Net()
    options = {"methods": {"*": "zero"}, "schedule": rotating(3), "max_variants": 2}
    call = compiled(model, options)
    seen = []
    with pytest.warns(UserWarning) as caught:
        for number in range(9):
            call(batch(number)).square().sum().backward()
            seen.append(zeroed(model))
    assert seen == [["head"], ["body"], []] * 3
    text = [str(warning.message) for warning in caught]
    assert len(text) == 1
    assert "one more combination of approximated layers, but there are 2 already" in text[0]
    assert "or raise max_variants" in text[0]
    call(batch(8)).square().sum()
    # Two approximate ones and the exact one, each once.
    assert len(compilations) == 3


# Symbolic sizes.


@pytest.mark.usefixtures("aten_only")
def test_with_symbolic_sizes_every_variant_is_compiled_at_once(compilations: list[Graph]) -> None:
    model = Net()
    call = compiled(model, {"methods": {"*": "zero"}, "schedule": rotating(3)}, dynamic=True)
    call(batch(0)).square().sum().backward()
    assert zeroed(model) == ["head"]
    # The exact one too: evaluation with gradients may want it, and exact sections.
    assert len(compilations) == 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number, size in enumerate((4, 5, 5, 7, 3, 4, 9), start=1):
            call(batch(number, size)).square().sum().backward()
            assert zeroed(model) == [LAYERS[number % 3]]
        with graphpass.session(model).exact():
            call(batch(0, 8)).square().sum().backward()
            assert zeroed(model) == []
    assert len(compilations) == 4
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("aten_only")
def test_symbolic_variants_give_inductors_gradients_where_exact() -> None:
    model = Net()
    options = {"methods": {"body": "zero"}, "schedule": EVERY_OTHER}
    call = compiled(model, options, dynamic=True)
    reference = Net()
    wanted = torch.compile(reference, backend="inductor", dynamic=True)
    for number, size in enumerate((4, 5, 9, 3)):
        call(batch(number, size)).square().sum().backward()
        wanted(batch(number, size)).square().sum().backward()
        got, exact = grads_of(model), grads_of(reference)
        if number % 2:
            assert not got[2].any()
            got[2] = exact[2]
        assert equal(got, exact)


@pytest.mark.usefixtures("aten_only")
def test_a_combination_not_foreseen_is_exact_with_one_warning_where_sizes_are_symbolic(
    compilations: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "_LOOK_AHEAD_STEPS", 2)
    model = Net()
    call = compiled(model, {"methods": {"*": "zero"}, "schedule": rotating(3)}, dynamic=True)
    seen = []
    with pytest.warns(UserWarning) as caught:
        for number in range(6):
            call(batch(number)).square().sum().backward()
            seen.append(zeroed(model))
    assert seen == [["head"], ["body"], []] * 2
    text = [str(warning.message) for warning in caught]
    assert len(text) == 1
    assert "combination of approximated layers, but sizes are dynamic: those steps are" in text[0]
    assert len(compilations) == 3


@pytest.mark.usefixtures("aten_only")
def test_a_graph_with_symbolic_sizes_has_a_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRAPHPASS_CACHE_DIR", str(tmp_path))
    call = compiled(Net(), {"methods": {"body": "zero"}}, dynamic=True)
    call(batch(0)).square().sum().backward()
    (only,) = graphpass.reports()
    assert set(only.sizes.values()) == {BATCH}
    exact = {(r.where, r.gradient): r.exact_flops for r in only.rows}
    assert exact["body", "weight"] == 2 * BATCH * WIDTH * WIDTH


# What is kept alive.


@pytest.fixture
def few_objects() -> None:
    """Let the collector look at what is made from now on only, or it takes most of the time."""
    gc.freeze()


def batch_of_a_step(call: Callable[..., Any], number: int) -> "weakref.ref[Tensor]":
    x = batch(number)
    call(x).square().sum().backward()
    return weakref.ref(x)


@pytest.mark.usefixtures("aten_only", "few_objects")
@pytest.mark.parametrize(
    ("rule", "dynamic"),
    [("always", False), (EVERY_OTHER, False), (Schedule.until(1), False), (EVERY_OTHER, True)],
    ids=["one", "two", "late", "symbolic"],
)
def test_no_batch_outlives_its_step(rule: str | Schedule, dynamic: bool) -> None:
    options = {"methods": {"body": "zero"}, "schedule": rule}
    call = compiled(Net(), options, dynamic=dynamic)
    for number in range(3):
        alive = batch_of_a_step(call, number)
        gc.collect()
        assert alive() is None


@pytest.mark.usefixtures("few_objects")
def test_what_the_training_loop_lets_go_of_is_not_kept() -> None:
    call = compiled(Net(), {"methods": {"body": "zero"}})
    x = batch(0)
    alive = weakref.ref(x)
    call(x).square().sum().backward()
    del x
    gc.collect()
    assert alive() is None


@pytest.mark.usefixtures("few_objects")
def test_a_model_is_not_kept_alive() -> None:
    def train() -> list[weakref.ref[Any]]:
        model = Net()
        call = compiled(model, {"methods": {"body": "zero"}, "schedule": EVERY_OTHER})
        for number in range(2):
            call(batch(number)).square().sum().backward()
        return [weakref.ref(model), weakref.ref(model.body.weight)]

    alive = train()
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


# Several models in one process.


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.only = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.only(x)
        return y


@pytest.mark.usefixtures("aten_only")
def test_two_models_have_steps_and_plans_of_their_own() -> None:
    one, other = Net(), Narrow()
    call_one = compiled(one, {"methods": {"body": "zero"}, "schedule": EVERY_OTHER})
    call_other = compiled(other, {"methods": {"only": "zero"}})
    for number in range(3):
        call_one(batch(number)).square().sum().backward()
        assert zeroed(one) == ["body"] * (number % 2)
    with graphpass.session(one).exact():
        call_other(batch(0)).square().sum().backward()
    assert zeroed(other) == ["only"]
    sessions = [graphpass.session(call_one), graphpass.session(call_other)]  # type: ignore[arg-type]
    assert [session.step for session in sessions] == [3, 1]
    assert [d.site for d in sessions[0].plan.approximated] == ["body:weight"]
    assert [d.site for d in sessions[1].plan.approximated] == ["only:weight"]


@pytest.mark.usefixtures("aten_only")
def test_two_models_of_one_class_have_sessions_of_their_own() -> None:
    options = {"methods": {"body": "zero"}, "schedule": EVERY_OTHER}
    one, other = Net(), Net()
    call_one, call_other = compiled(one, options), compiled(other, options)
    for number in range(2):
        call_one(batch(number)).square().sum().backward()
    assert zeroed(one) == []
    call_other(batch(0)).square().sum().backward()
    call_other(batch(1)).square().sum().backward()
    call_other(batch(2)).square().sum().backward()
    assert [graphpass.session(model).step for model in (one, other)] == [2, 3]


@pytest.mark.usefixtures("aten_only")
def test_an_exact_section_and_eval_mode_are_those_of_the_model_that_runs() -> None:
    options = {"methods": {"body": "zero"}}
    one, other = Net(), Net()
    call_one, call_other = compiled(one, options), compiled(other, options)
    call_one(batch(0)).square().sum().backward()
    seen = []
    with graphpass.session(other).exact():
        call_other(batch(0)).square().sum().backward()
        seen.append(zeroed(other))
    one.eval()
    call_other(batch(0)).square().sum().backward()
    seen.append(zeroed(other))
    assert seen == [[], ["body"]]


@pytest.mark.usefixtures("aten_only")
def test_recompiling_a_model_with_other_options_plans_it_anew() -> None:
    model = Net()
    for number, layer in enumerate(LAYERS):
        call = compiled(model, {"methods": {layer: "zero"}})
        call(batch(0)).square().sum().backward()
        assert zeroed(model) == [layer]
        session = graphpass.session(model)
        assert session.step == number + 1
        assert [(d.site, d.layer) for d in session.plan.approximated] == [
            (f"{layer}:weight", number + 1)
        ]


# Checkpoints, distributed training, single blocks.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


class Blocks(nn.Module):
    """Blocks that are compiled one by one, and the rest eager."""

    def __init__(self, depth: int, options: dict[str, Any], recomputed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.recomputed = recomputed
        for block in self.blocks:
            block.compile(backend="approx", options=options)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return x


DRAWN = {"methods": {"inner": "random"}}


def train_blocks(model: Blocks, steps: int) -> list[list[Tensor]]:
    """Return the gradients of each step."""
    grads = []
    for number in range(steps):
        # The first block sees a gradient like the others, and shares their graph.
        model(batch(number).requires_grad_()).square().sum().backward()
        grads.append(grads_of(model))
    return grads


@pytest.mark.usefixtures("aten_only")
@pytest.mark.parametrize(
    "options",
    [
        DRAWN | {"schedule": Schedule("every other", every_step=2, phase=1)},
        {"methods": {"inner": "zero"}, "schedule": Schedule("every other", every_step=2, phase=1)},
    ],
    ids=["random", "zero"],
)
def test_a_checkpoint_around_a_block_changes_no_gradient(options: dict[str, Any]) -> None:
    plain = train_blocks(Blocks(1, options), 4)
    recomputed = train_blocks(Blocks(1, options, recomputed=True), 4)
    assert [bool(grads[0].any()) for grads in plain] == (
        [True, False, True, False] if options["methods"]["inner"] == "zero" else [True] * 4
    )
    for one, other in zip(plain, recomputed, strict=True):
        assert equal(one, other)


@pytest.mark.usefixtures("aten_only")
def test_checkpoints_around_blocks_that_share_a_graph_change_no_gradient() -> None:
    plain = train_blocks(Blocks(3, DRAWN), 2)
    recomputed = train_blocks(Blocks(3, DRAWN, recomputed=True), 2)
    for one, other in zip(plain, recomputed, strict=True):
        assert equal(one, other)


@pytest.mark.usefixtures("aten_only")
def test_a_checkpoint_recomputes_the_variant_of_its_own_forward() -> None:
    """Two forwards, then two backwards: the second forward is the last one for both."""
    options = {"methods": {"inner": "zero"}, "schedule": EVERY_OTHER}
    model = Blocks(1, options, recomputed=True)
    losses = [model(batch(number).requires_grad_()).square().sum() for number in range(2)]
    for number, loss in enumerate(losses):
        loss.backward()
        assert zeroed(model) == ["blocks.0.inner"] * number


@pytest.mark.usefixtures("aten_only")
def test_a_checkpoint_in_eval_mode_is_exact() -> None:
    options = {"methods": {"inner": "zero"}}
    model = Blocks(1, options, recomputed=True)
    assert not train_blocks(model, 1)[0][0].any()
    model.eval()
    assert train_blocks(model, 1)[0][0].any()


@pytest.mark.usefixtures("aten_only")
def test_a_reentrant_checkpoint_is_approximated_too() -> None:
    model = Block()
    model.compile(backend="approx", options={"methods": {"inner": "zero"}})
    for _ in range(2):
        checkpoint(model, batch(0).requires_grad_(), use_reentrant=True).sum().backward()
        assert zeroed(model) == ["inner"]


@pytest.mark.usefixtures("aten_only")
def test_blocks_compiled_one_by_one_train() -> None:
    model = Blocks(3, {"methods": {"inner": "zero"}, "schedule": EVERY_OTHER})
    for number in range(4):
        model(batch(number).requires_grad_()).square().sum().backward()
        assert zeroed(model) == [f"blocks.{i}.inner" for i in range(3)] * (number % 2)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    file = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Wide(nn.Module):
    """Three layers of 1 MiB of parameters: buckets of 1 MiB split the graph in three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(512, 512)
        self.body = nn.Linear(512, 512)
        self.tail = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(torch.relu(self.body(torch.relu(self.head(x)))))
        return y


def parallel(model: nn.Module, bucket_mb: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket_mb)


@pytest.mark.usefixtures("aten_only")
@NO_LEAF_WARNING
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("bucket_mb", "rule"),
    [(25, EVERY_OTHER), (1, EVERY_OTHER), (1, Schedule.until(1))],
    ids=["whole", "split", "split, late variant"],
)
def test_data_parallel_models_train(bucket_mb: int, rule: Schedule) -> None:
    x = torch.randn(BATCH, 512)
    reference = Wide()
    torch.compile(parallel(reference, bucket_mb), backend="inductor")(x).sum().backward()
    wanted = dict(reference.named_parameters())
    model = Wide()
    options = {"methods": {"*.body": "zero", "*.tail": "zero"}, "schedule": rule, "strict": True}
    call = compiled(parallel(model, bucket_mb), options)
    for number in range(3):
        call(x).sum().backward()
        skipped = {"body.weight", "tail.weight"} if rule.selects(2, number) else set()
        for name, parameter in model.named_parameters():
            grad, exact = parameter.grad, wanted[name].grad
            assert grad is not None and exact is not None
            assert torch.equal(grad, torch.zeros_like(exact) if name in skipped else exact)
        model.zero_grad()
    assert graphpass.session(call).step == 3  # type: ignore[arg-type]


@pytest.mark.usefixtures("aten_only")
@pytest.mark.usefixtures("process_group")
def test_the_layers_of_a_split_graph_are_numbered_through() -> None:
    call = compiled(parallel(Wide(), 1), {"methods": {"*.body": "zero", "*.tail": "zero"}})
    call(torch.randn(BATCH, 512)).sum().backward()
    plan = graphpass.session(call).plan  # type: ignore[arg-type]
    layers = {(d.site, d.layer) for d in plan.approximated}
    assert layers == {("module.body:weight", 2), ("module.tail:weight", 3)}


@pytest.mark.usefixtures("aten_only")
@NO_LEAF_WARNING
def test_the_layers_of_frames_with_the_same_code_are_numbered_through() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                # A graph break in a loop leaves a compiled frame for each block. The second one
                # has another graph, as its input needs a gradient.
                x = block(x)
                torch._dynamo.graph_break()
            return x

    model = Loop()
    compiled(model, {"methods": {"*": "zero"}})(batch(0)).sum().backward()
    layers = {(d.site, d.layer) for d in graphpass.session(model).plan.approximated}
    assert layers == {("blocks.0.inner:weight", 1), ("blocks.1.inner:weight", 2)}


@pytest.mark.usefixtures("aten_only")
def test_a_warning_is_given_once() -> None:
    with pytest.warns(UserWarning, match="graphpass: something") as caught:
        variants.warn_once("something")
        variants.warn_once("something")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variants.warn_once("something")
