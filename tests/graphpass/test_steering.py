"""Plans that are measured and changed while a compiled model trains."""

import contextlib
import copy
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import graphpass
from graphpass import (
    ConfigError,
    callers,
    controller,
    measuring,
    pricing,
    prior,
    steering,
    variants,
)
from graphpass.capture import Analysis
from graphpass.dispatcher import Dispatcher
from graphpass.errors import Reason
from graphpass.noise import LocalNoise
from graphpass.plan import Plan
from graphpass.pricing import Price
from graphpass.site import Site

pytestmark = pytest.mark.usefixtures("interpreted")

WIDTH, BATCH, EVERY, WINDOW, FIRST = 16, 64, 12, 4, 10


class Cheap:
    """Prices at which every approximation takes half of the time."""

    def exact(self, site: Site) -> Price:
        del site
        return Price(1.0, {}, "calibrated")

    def approximate(self, site: Site, method: Any, params: Any) -> Price:
        del site, method, params
        return Price(0.5, {}, "calibrated")

    def rest(self, approximated: float = 0.0) -> Price:
        return Price(1.0, {}, "calibrated")

    def confirm(self, doubtful: Any) -> bool:
        del doubtful
        return False


def cheap(analysis: Analysis, threads: int, replays: bool) -> Cheap:
    del analysis, threads, replays
    return Cheap()


@pytest.fixture(autouse=True)
def _cheap_and_short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pricing, "of", cheap)
    monkeypatch.setattr(controller, "_WINDOW", WINDOW)
    monkeypatch.setattr(steering, "_FIRST_STEP", FIRST)
    monkeypatch.setattr(variants, "_WARNED", set())
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


class Net(nn.Module):
    """Two layers, the same in every instance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.body(x)))
        return y


class Training:
    """A run: model, optimizer, and its steps."""

    def __init__(self, **options: Any) -> None:
        self.model = Net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        wanted: dict[str, Any] = {
            "budget": 1.0,
            "methods": ["int8"],
            "probe_every": EVERY,
            "strict": True,
        }
        self.call = torch.compile(self.model, backend="approx", options=wanted | options)
        self.session = graphpass.session(self.model)

    def run(self, steps: range, exact: Collection[int] = ()) -> None:
        for step in steps:
            x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            with self.session.exact() if step in exact else contextlib.nullcontext():
                loss = (self.call(x) - x.roll(1, 1)).square().sum()
            loss.backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "session": json.loads(json.dumps(self.session.state_dict())),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.load_state_dict(state["session"])


def test_a_run_is_measured_and_goes_on_bit_for_bit() -> None:
    whole = Training()
    whole.run(range(3))
    assert whole.session.noise is None
    early = whole.state()
    whole.run(range(3, 2 * EVERY + 10))
    noise = whole.session.noise
    assert noise is not None and 0 < noise.tau < 1
    assert noise.table.source == "measured" and set(noise.table.variance) >= {"head:weight"}
    assert noise.tau == pytest.approx(noise.predicted.tau, rel=1.0)
    assert {d.method for d in whole.session.plan.approximated} == {"int8"}
    assert counters["stats"]["unique_graphs"] >= 1
    resumed = Training()
    resumed.load(early)
    resumed.run(range(3, 2 * EVERY + 10))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert resumed.session.noise == noise
    # The plan is changed by a new budget, without another measurement.
    whole.session.set_budget(1e-9)
    whole.run(range(100, 102))
    assert whole.session.plan.approximated == ()
    with pytest.raises(ConfigError, match="budget=-1"):
        whole.session.set_budget(-1)


class Idle(Cheap):
    """Prices at which the products are a thousandth of a step."""

    def rest(self, approximated: float = 0.0) -> Price:
        return Price(6000.0, {}, "calibrated")


@pytest.mark.parametrize("budget", ["auto", 0.0])
def test_nothing_is_measured_where_no_noise_at_all_would_not_pay(
    budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pricing, "of", lambda *_: Idle())
    training = Training(budget=budget)
    training.run(range(FIRST + EVERY))
    assert training.session.noise is None and training.session.step == FIRST + EVERY
    reason = Reason.NOTHING_PAYS if budget == "auto" else Reason.BUDGET_ZERO
    assert training.session.notes == (reason.value,)


def test_what_pays_without_noise_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the prior it is too noisy: that may be wrong of this model."""
    monkeypatch.setattr(prior, "local_noise", lambda *_: LocalNoise(1e6, 0.0, 1.0))
    training = Training(budget="auto")
    assert not training.session.plan.approximated
    training.run(range(FIRST + EVERY))
    assert training.session.noise is not None


def test_no_ordinary_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are read on the host where a round ends, and nowhere else."""
    reads: list[int] = []
    run = Training()
    original = measuring.Round.read

    def reading(self: Any) -> Any:
        reads.append(run.session.step)
        return original(self)

    monkeypatch.setattr(measuring.Round, "read", reading)
    originals = {
        name: getattr(Tensor, name) for name in ("item", "tolist", "__bool__", "__float__")
    }
    waits: list[int] = []
    called = Dispatcher.__call__

    def dispatch(self: Dispatcher, *args: Any) -> Any:
        known, waited = len(self.variants.compiled), len(waits)
        for name, function in originals.items():

            def waiting(tensor: Tensor, function: Any = function) -> Any:
                waits.append(run.session.step)
                return function(tensor)

            monkeypatch.setattr(Tensor, name, waiting)
        try:
            return called(self, *args)
        finally:
            for name, function in originals.items():
                monkeypatch.setattr(Tensor, name, function)
            if len(self.variants.compiled) > known:
                # Compilers read what they like.
                del waits[waited:]

    run.run(range(2))
    monkeypatch.setattr(Dispatcher, "__call__", dispatch)
    run.run(range(2, 2 * EVERY))
    assert reads and set(waits) <= set(reads)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"methods": {"*": "int8"}}, "the plan was given"),
        ({"budget": 0}, "the budget is 0"),
        ({"methods": ["zero"]}, "saves"),
    ],
    ids=["forced", "zero", "nothing"],
)
def test_why_nothing_is_measured(options: dict[str, Any], reason: str) -> None:
    run = Training(**options)
    run.run(range(2))
    assert run.session.noise is None
    assert any(reason in note for note in run.session.notes)


def test_no_budget_helps_where_the_plan_was_given() -> None:
    run = Training(methods={"*": "int8"})
    run.run(range(2))
    with pytest.raises(ConfigError, match="no plan of this model is made by the planner"):
        run.session.set_budget(0.1)


def test_another_budget_is_planned_for_where_there_was_none() -> None:
    run = Training(budget=0)
    run.run(range(FIRST))
    run.session.set_budget(0.1)
    assert run.session.notes == ()
    run.run(range(FIRST, FIRST + EVERY))
    assert run.session.noise is not None and run.session.plan.approximated
    run.session.set_budget(0)
    run.run(range(FIRST + EVERY, FIRST + EVERY + 2))
    assert not run.session.plan.approximated


def test_another_budget_changes_nothing_where_nothing_pays() -> None:
    run = Training(methods=["zero"])
    run.run(range(2))
    run.session.set_budget(0.1)
    run.run(range(2, 4))
    assert run.session.notes == (Reason.NOTHING_PAYS.value,)
    assert run.session.step == 4 and not run.session.plan.approximated


def test_a_plan_with_forward_products_is_measured_without_them() -> None:
    products = ["weight", "input", "forward"]
    run = Training(methods=["bf16"], gradients=products, max_bias=0.1)
    run.run(range(2 * EVERY + 10))
    assert run.session.noise is not None and run.session.noise.table.source == "measured"
    measured = {site.partition(":")[2] for site, _, _ in run.session.noise.table.entries}
    assert measured == {"weight", "input"}
    planned = {d.site.partition(":")[2] for d in run.session.plan.approximated}
    assert "forward" in planned


def test_candidates_that_lose_by_far_are_not_measured_and_the_report_says_so() -> None:
    run = Training(methods=["int8", "crs"])
    run.run(range(1))
    before = run.session.plan
    run.run(range(1, 2 * EVERY + 10))
    assert before.approximated and run.session.plan.approximated == before.approximated
    assert run.session.noise is not None
    assert {method for _, method, _ in run.session.noise.table.entries} == {"int8"}
    report = graphpass.Report.from_json(graphpass.reports()[-1].to_json())
    (row,) = (row for row in report.rows if row.site == "head:weight")
    assert row.prediction is not None and row.prediction.noise_source == "measured"
    (sampled,) = (text for text in row.prediction.others if text.startswith("crs"))
    assert "prior none; not measured, as another way takes no longer" in sampled


def test_a_plan_that_stays_keeps_its_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its schedule needs as many as there may be."""
    schedule = graphpass.Schedule(rule=lambda layer, step: layer == 1 + step % 2)
    run = Training(schedule=schedule, max_variants=2)
    run.run(range(FIRST))
    compiled = list[object]()
    original = variants.RewritePass

    def rewriting(*args: Any) -> Any:
        compiled.append(args)
        return original(*args)

    monkeypatch.setattr(variants, "RewritePass", rewriting)
    run.run(range(FIRST, 3 * EVERY + 10))
    assert run.session.noise is not None and not compiled


def test_nothing_is_measured_where_sizes_are_dynamic() -> None:
    model = Net()
    options: dict[str, Any] = {"budget": 1.0, "methods": ["int8"]}
    call = torch.compile(model, backend="approx", options=options, dynamic=True)
    call(torch.randn(BATCH, WIDTH)).sum().backward()
    assert any("sizes are dynamic" in note for note in graphpass.session(model).notes)


def test_a_budget_falls_with_the_learning_rate() -> None:
    run = Training(decay_budget=True)
    run.session.follow(run.optimizer)
    assert run.session.decay(wanted=True) == 1
    run.optimizer.param_groups[0]["lr"] /= 4
    assert run.session.decay(wanted=True) == pytest.approx(0.25)
    assert run.session.decay(wanted=False) == 1


def test_states_of_earlier_versions_still_load() -> None:
    session = graphpass.session(Net())
    session.load_state_dict({"version": 1, "step": 7, "counts_forwards": True, "calls": []})
    assert session.step == 7


# Failures of ours while training.


_NOTES = "approx.leave_notes.default"


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("a bug of ours")


def backward_of(probes: bool) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what lets Inductor fail over the backward parts of probes, or of other variants."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        compile_fx = torch._inductor.compile_fx
        original = compile_fx.fx_codegen_and_compile

        def compiling(gm: Any, *args: Any, **settings: Any) -> Any:
            called = {str(node.target) for node in gm.graph.nodes}
            ours = any(name.startswith("approx.") for name in called)
            if settings["is_backward"] and ours and probes == (_NOTES in called):
                # As passes do that come before a failure.
                gm.graph.erase_node(gm.graph.output_node())
                broken()
            return original(gm, *args, **settings)

        patch.setattr(compile_fx, "fx_codegen_and_compile", compiling)

    return spoil


def change_of_mind(patch: pytest.MonkeyPatch) -> None:
    """Let the planner leave out input gradients, from the next plan on."""
    planner = steering.make_plan

    def planning(analysis: Any, options: Any, *args: Any) -> Plan:
        return planner(analysis, replace(options, gradients=("weight",)), *args)

    patch.setattr(steering, "make_plan", planning)
    patch.setattr(controller.Controller, "_better", lambda *_: True)


def no_comparison(patch: pytest.MonkeyPatch) -> None:
    """Let the planner change its mind, and predictions of what that brings fail."""
    better = controller.Controller._better
    change_of_mind(patch)
    patch.setattr(controller.Controller, "_better", better)
    patch.setattr(steering, "predict", broken)


# What breaks at the first measurement, and the steps that are exact all the same: those of probes
# that were compiled, or were to be. There is a probe of the candidates, and two of the plan.
PROBES = range(FIRST, FIRST + 3)
FAILURES: list[tuple[str, Callable[[pytest.MonkeyPatch], None], Collection[int]]] = [
    ("planner", lambda patch: patch.setattr(steering, "make_plan", broken), PROBES),
    ("prediction", no_comparison, PROBES),
    ("reading", lambda patch: patch.setattr(measuring.Round, "read", broken), PROBES),
    ("sketch", lambda patch: patch.setattr(controller, "Sketch", broken), ()),
    ("probe", lambda patch: patch.setattr(variants, "ProbePass", broken), (FIRST,)),
    ("backward of a probe", backward_of(probes=True), (FIRST,)),
]
failing = pytest.mark.parametrize(
    ("spoil", "exact"), [pytest.param(*rest, id=name) for name, *rest in FAILURES]
)


def reference(exact: Collection[int], steps: range) -> Training:
    """Return a run that measures nothing, exact on some steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering, "_FIRST_STEP", 1000)
        run = Training(strict=False)
        run.run(steps, exact)
    return run


def assert_same(run: Training, other: Training) -> None:
    pairs = zip(run.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@failing
def test_training_goes_on_under_the_plan_in_force(
    spoil: Callable[[pytest.MonkeyPatch], None], exact: Collection[int]
) -> None:
    run = Training(strict=False)
    run.run(range(FIRST))
    before = run.session.plan
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning) as caught:
        spoil(patch)
        run.run(range(FIRST, 3 * EVERY))
    assert ["a bug of ours" in str(warning.message) for warning in caught] == [True]
    assert before.approximated and run.session.plan == before
    assert "a bug of ours" in str(graphpass.reports()[-1])
    with pytest.raises(ConfigError, match=r"made by the planner .*a bug of ours"):
        run.session.set_budget(0.1)
    assert_same(run, reference(exact, range(3 * EVERY)))


@failing
def test_a_failure_raises_where_that_is_asked_for(
    spoil: Callable[[pytest.MonkeyPatch], None], exact: Collection[int]
) -> None:
    del exact
    run = Training()
    run.run(range(FIRST))
    with (
        # Undone before what lets graphs run as they are.
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RuntimeError, match="a bug of ours"),
    ):
        spoil(patch)
        run.run(range(FIRST, 3 * EVERY))


REWRITING = [
    pytest.param(lambda patch: patch.setattr(variants, "rewrite", broken), id="forward"),
    pytest.param(backward_of(probes=False), id="backward"),
]


@pytest.mark.parametrize("spoil", REWRITING)
def test_a_new_plan_that_cannot_be_compiled_leaves_everything_exact(
    spoil: Callable[[pytest.MonkeyPatch], None],
) -> None:
    run = Training(strict=False)
    run.run(range(FIRST))
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match=r"runs exactly instead: .*a bug of ours") as caught,
    ):
        change_of_mind(patch)
        spoil(patch)
        # A window and two calls later it is read, and the new plan probed twice.
        run.run(range(FIRST, FIRST + WINDOW + 5))
    exact = reference((), range(1))
    exact.load(run.state() | {"session": exact.session.state_dict()})
    late = range(FIRST + WINDOW + 5, 4 * EVERY)
    run.run(late)
    exact.run(late, late)
    assert_same(run, exact)
    assert len(caught) == 1 and run.session.plan.approximated == ()
    report = graphpass.reports()[-1]
    assert report.approximated == () and "a bug of ours" in report.halted
    assert graphpass.Report.from_json(report.to_json()).halted == report.halted


def test_a_model_that_cannot_be_planned_for_runs_exactly() -> None:
    first, second = Training(strict=False), Training(strict=False)
    first.run(range(2))
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match=r"it runs exactly: .*a bug of ours") as caught,
    ):
        patch.setattr(callers, "make_plan", broken)
        second.run(range(4))
    assert len(caught) == 1 and "a bug of ours" in second.session.notes[0]
    first.run(range(2, 4), exact=range(4))
    assert first.session.plan.approximated and not second.session.plan.approximated
    assert_same(second, reference(range(4), range(4)))


def test_a_plan_that_nothing_can_steer_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "names_of", broken)
    run = Training(strict=False)
    with pytest.warns(UserWarning, match=r"noise is not measured .*a bug of ours"):
        run.run(range(3))
    assert "a bug of ours" in graphpass.reports()[-1].halted
    assert_same(run, reference((), range(3)))
