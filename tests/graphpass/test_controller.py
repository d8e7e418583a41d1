"""The controller: when it measures and plans anew, with probes whose numbers are given."""

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codegen import notes
from graphpass import ConfigError, controller, measuring, variants
from graphpass.controller import Controller, Groups, Policy, Subplan
from graphpass.measuring import Names
from graphpass.noise import NoiseTable
from graphpass.plan import Decision, Plan
from graphpass.propagation import Propagation
from graphpass.sheet import Probe, Subject
from graphpass.sketch import Sketch
from graphpass.variants import EXACT

WINDOW = 8
# Calls from the first of a round to the one in which it is read.
FULL, CHECK = WINDOW + 2, 4
CPU = torch.device("cpu")
SITES = ("one:weight", "two:weight")
# Noise of the approximations; those of the first site are the numbers 0 and 1.
NOISE = {0: 0.02, 1: 0.2, 2: 0.02, 3: 0.2}
METHODS = ("fine", "coarse")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "_WINDOW", WINDOW)
    monkeypatch.setattr(variants, "_WARNED", set())


def plan_of(*methods: str | None) -> Plan:
    """Return the plan that computes the sites by these methods."""
    return Plan(
        tuple(
            Decision(site, 1, "mm", (1, 1), method, {}, "" if method else "exact")
            for site, method in zip(SITES, methods, strict=True)
        )
    )


class World:
    """A model of two weights, its plan, and a planner that takes the coarsest methods it may."""

    def __init__(self, budget: float | None = 0.1, **policy: Any) -> None:
        self.plan = plan_of(None, None)
        self.budget = budget
        self.weights = {0: nn.Parameter(torch.zeros(4, 4)), 1: nn.Parameter(torch.zeros(4, 4))}
        self.truth = dict(NOISE)
        self.adopted: list[Plan] = []
        # What the whole plan adds, against the sum of its parts.
        self.surprise = 1.0
        self.finite = True
        self.asked: list[NoiseTable] = []
        keys = {2 * i + j: (SITES[i], METHODS[j], "{}") for i in range(2) for j in range(2)}
        # What is worth measuring, and what was known when that was asked.
        self.worth = frozenset(keys)
        self.known: list[NoiseTable] = []
        # Why the controller was switched off.
        self.said: list[str] = []
        self.names = Names(keys, {0: "a", 1: "b"}, {SITES[0]: (0,), SITES[1]: (1,)}, {})
        given: dict[str, Any] = {"probe_every": 20, "score": self.score, **policy}
        self.controller = Controller(
            Policy(replan=self.replan, groups=self.groups, budget=lambda: self.budget, **given),
            Subject((), (0, 1)),
            self.names,
            Subplan(
                lambda: self.plan,
                lambda _: self.numbers(),
                self.numbers,
                self.adopt,
                self.said.append,
            ),
        )
        self.ran: list[str] = []
        self.probed: list[Probe] = []

    def numbers(self) -> frozenset[int]:
        chosen = {(d.site, d.method) for d in self.plan.approximated}
        return frozenset(n for n, key in self.names.candidates.items() if key[:2] in chosen)

    def adopt(self, plan: Plan) -> None:
        self._take(plan)

    def _take(self, plan: Plan) -> None:
        self.plan = plan
        self.adopted.append(plan)

    def groups(self, table: NoiseTable, before: Groups) -> Groups:
        self.known.append(table)
        new = self.worth.difference(*before)
        return (*before, new) if new else before

    def replan(self, table: NoiseTable) -> Plan:
        return self._plan(table)

    def _plan(self, table: NoiseTable) -> Plan:
        self.asked.append(table)
        plans = [plan_of(a, b) for a in (*METHODS, None) for b in (*METHODS, None)]
        keys = {p: [(d.site, d.method, "{}") for d in p.approximated] for p in plans}
        plans = [p for p in plans if table.entries.keys() >= set(keys[p])]
        limit = float("inf") if self.budget is None else self.budget
        legal = [p for p in plans if Propagation(table, {}).plan(keys[p]).tau <= limit]  # type: ignore[arg-type]
        return min(legal, key=lambda p: self.score(p, table))

    def score(self, plan: Plan, table: NoiseTable) -> float:
        del table
        seconds = {"coarse": 0.5, "fine": 0.9, None: 1.0}
        return sum(seconds[d.method] for d in plan.decisions)

    def call(self, step: int) -> None:
        """Run one training call as the compiled graph would, with normal gradients."""
        key, page = self.controller.turn(step, self.weights, CPU)
        self.ran.append("probe" if isinstance(key, Probe) else "plan" if key else "exact")
        if isinstance(key, Probe):
            self.probed.append(key)
            assert page is not None
            self._note(key, page)
        generator = torch.Generator().manual_seed(step)
        scale = 1.0 if self.finite else float("nan")
        for weight in self.weights.values():
            weight.grad = None
            wanted = scale * torch.randn(4, 4, generator=generator) / 4 * 0.5**0.5
            (weight * wanted).sum().backward()

    def _note(self, probe: Probe, page: Tensor) -> None:
        """Leave what the probe would: V is about 1/2 a weight."""
        sheet = Subject((), (0, 1)).sheet(len(probe.candidates))
        found = {}
        for place, number in enumerate(sorted(probe.candidates)):
            found[sheet.of_candidate(place)] = torch.tensor([self.truth[number], 0.0, 1.0])
        for number in probe.plan:
            error = torch.tensor(self.truth[number] * self.surprise)
            found[sheet.of_parameter(number // 2)] = error
        values = [value if self.finite else value * torch.nan for value in found.values()]
        notes.leave_notes(torch.zeros(()), page, values, list(found))

    def run(self, steps: range) -> None:
        for step in steps:
            self.call(step)


def chosen(plan: Plan) -> tuple[str | None, ...]:
    return tuple(decision.method for decision in plan.decisions)


def test_a_round_comes_at_once_and_then_every_so_many_steps() -> None:
    world = World(budget=0.3)
    world.run(range(FULL))
    assert world.ran == ["probe"] + ["exact"] * (FULL - 1)
    assert world.controller.measured is None
    world.call(FULL)
    # One weight may be coarse; the new plan is probed twice, and left alone.
    assert sorted(map(str, chosen(world.plan))) == ["coarse", "fine"]
    world.run(range(FULL + 1, FULL + CHECK + 20))
    assert world.ran[FULL:] == ["probe", "probe"] + ["plan"] * (20 + 2)
    assert len(world.adopted) == 1
    measured = world.controller.measured
    assert measured is not None and measured.step == FULL + CHECK
    assert measured.tau == pytest.approx(measured.predicted.tau)
    noise = sum(measured.table.variance.values())
    assert measured.tau == pytest.approx(0.22 / noise)
    world.call(FULL + CHECK + 20)
    assert world.ran[-1] == "probe"


def test_a_plan_stays_until_another_is_clearly_better() -> None:
    world = World(budget=0.3)
    world.run(range(30))
    before = world.plan
    world.truth[0], world.truth[2] = 0.03, 0.01
    world.run(range(30, 60))
    assert len(world.asked) > 1 and world.plan == before
    world.truth[0], world.truth[1], world.truth[2], world.truth[3] = 0.01, 0.02, 0.01, 0.02
    world.run(range(60, 90))
    assert chosen(world.plan) == ("coarse", "coarse")


def test_a_plan_that_stays_is_told_what_was_measured() -> None:
    world = World(budget=0.3)
    world.run(range(30))
    before, adopted = world.plan, len(world.adopted)
    world.run(range(30, 60))
    assert world.plan == before and world.plan is world.adopted[-1] is not before
    # It is no change, after which it would be measured alone.
    assert len(world.adopted) == adopted + 1
    assert [bool(probe.candidates) for probe in world.probed] == [True, False, False] * 2


def test_a_broken_budget_changes_the_plan() -> None:
    world = World(budget=0.3)
    world.run(range(30))
    world.truth = {0: 0.05, 1: 0.9, 2: 0.05, 3: 0.9}
    world.run(range(30, 60))
    assert chosen(world.plan) == ("fine", "fine")
    assert world.controller.note == ""


def test_what_the_table_does_not_explain_makes_it_careful() -> None:
    world = World(budget=0.3)
    world.surprise = 3.0
    with pytest.warns(UserWarning, match="less is approximated"):
        world.run(range(20))
    assert chosen(world.plan) == ("fine", "fine")
    measured = world.controller.measured
    assert measured is not None and measured.tau == pytest.approx(3 * measured.predicted.tau)


def test_it_gives_in_and_says_so_once() -> None:
    world = World(budget=0.3)
    world.surprise = 1000.0
    with pytest.warns(UserWarning, match="over the budget of 0.3 after planning again") as caught:
        world.run(range(80))
    assert len(caught) == 1
    assert world.plan.approximated == ()


@pytest.mark.parametrize("tries", [3])
def test_numbers_that_are_not_finite_are_looked_at_again_but_not_for_ever(tries: int) -> None:
    world = World(budget=0.3)
    world.finite = False
    world.run(range(tries * FULL + 10))
    assert world.ran.count("probe") == tries
    assert world.controller.measured is None and "no finite number" in world.controller.note
    world.finite = True
    world.run(range(tries * FULL + 10, tries * FULL + 20 + FULL + 1))
    assert world.controller.measured is not None and world.controller.note == ""


def test_a_new_budget_needs_no_new_measurement() -> None:
    world = World(budget=0.3)
    world.run(range(FULL + CHECK + 1))
    asked = world.ran.count("probe")
    world.budget = 0.01
    world.controller.budget_changed()
    world.call(FULL + CHECK + 1)
    assert chosen(world.plan) == (None, None) and world.ran.count("probe") == asked


def test_the_plans_own_noise_is_no_noise_of_the_batch() -> None:
    table, _ = measuring.table_of(
        {},
        {0: (3.0, 10.0), 1: (1.0, 1.0)},
        0.5,
        World().names,
        NoiseTable(),
    )
    assert table.variance == {SITES[0]: 3.0, SITES[1]: 1.0}
    sheet = Subject((), (0, 1)).sheet(0)
    page = notes.fresh(sheet.size, CPU)
    notes.leave_notes(torch.zeros(()), page, [torch.tensor(2.0)], [sheet.of_parameter(0)])
    reading = sheet.read(page.tolist())
    assert reading is not None
    table, tau = measuring.table_of(
        {Probe(EXACT, frozenset({0})): [reading]},
        {0: (3.0, 10.0), 1: (1.0, 1.0)},
        0.5,
        World().names,
        NoiseTable(),
    )
    assert table.variance == {SITES[0]: 2.0, SITES[1]: 1.0}
    assert table.square == {SITES[0]: 7.0, SITES[1]: 0.0}
    assert tau == pytest.approx(2 / 3)


@pytest.mark.parametrize("stop", [1, 3, FULL, FULL + 2, FULL + CHECK + 5])
def test_a_resumed_controller_decides_the_same(stop: int) -> None:
    whole = World(budget=0.3)
    whole.run(range(40))
    first = World(budget=0.3)
    first.run(range(stop))
    state = json.loads(json.dumps(first.controller.state_dict()))
    second = World(budget=0.3)
    second.controller.load_state_dict(state)
    second.run(range(stop, 40))
    assert first.ran + second.ran == whole.ran
    assert second.plan == whole.plan
    assert second.controller.measured == whole.controller.measured


def test_what_comes_back_is_measured_beside_what_was_measured_before() -> None:
    world = World(budget=0.3)
    world.worth = frozenset({0, 2})
    world.run(range(FULL + CHECK))
    assert chosen(world.plan) == ("fine", "fine")
    assert world.known == [NoiseTable()]
    # The same probe again, which is compiled, and another for what is new.
    world.worth = frozenset({1, 2})
    world.run(range(FULL + CHECK, 60))
    of_candidates = [sorted(probe.candidates) for probe in world.probed if probe.candidates]
    assert of_candidates == [[0, 2], [0, 2], [1]]
    assert world.known[1] is not world.known[0] and len(world.known[1].entries) == 2
    assert chosen(world.plan) == ("coarse", "fine")


@pytest.mark.parametrize("stop", [3, FULL + CHECK + 5, FULL + CHECK + 21, 40])
def test_a_resumed_controller_measures_the_same(stop: int) -> None:
    def world() -> World:
        made = World(budget=0.3)
        made.worth = frozenset({0, 2})
        return made

    whole, first, second = world(), world(), world()
    for part, steps in ((whole, range(60)), (first, range(stop)), (second, range(stop, 60))):
        if part is second:
            part.controller.load_state_dict(json.loads(json.dumps(first.controller.state_dict())))
        for step in steps:
            part.worth = frozenset({0, 2} if step < FULL else {1, 2})
            part.call(step)
    assert first.probed + second.probed == whole.probed
    assert second.plan == whole.plan


def test_a_round_of_an_earlier_version_is_begun_anew() -> None:
    first, second = World(budget=0.3), World(budget=0.3)
    first.run(range(3))
    state = first.controller.state_dict()
    del state["groups"]
    second.controller.load_state_dict(state)
    second.run(range(3, 3 + FULL))
    assert second.ran[0] == "probe" and second.controller.measured is None
    second.call(3 + FULL)
    assert second.controller.measured is not None


@pytest.mark.parametrize("spoil", [lambda s: s.pop("due"), lambda s: s["plan"].pop()])
def test_states_of_other_models_are_refused(spoil: Callable[[Any], object]) -> None:
    state = World().controller.state_dict()
    spoil(state)
    with pytest.raises(ConfigError, match="does not fit this model"):
        World().controller.load_state_dict(state)


def test_nothing_is_measured_where_nothing_is_approximated_any_more() -> None:
    world = World(first=10, stop=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.run(range(60))
    probes = [step for step, what in enumerate(world.ran) if what == "probe"]
    assert probes[0] == 10 and probes[-1] < 30


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("a bug of ours")


# Where it may fail, and on which step it then does.
FAILURES: list[tuple[str, Callable[[pytest.MonkeyPatch, World], None], int]] = [
    ("sketch", lambda patch, _: patch.setattr(controller, "Sketch", broken), 0),
    ("round", lambda patch, _: patch.setattr(measuring.Round, "next", broken), 0),
    ("hook", lambda patch, _: patch.setattr(Sketch, "gather", broken), 1),
    ("reading", lambda patch, _: patch.setattr(measuring.Round, "read", broken), FULL),
    ("table", lambda patch, _: patch.setattr(controller, "table_of", broken), FULL),
    ("planner", lambda patch, world: patch.setattr(world, "_plan", broken), FULL),
    ("adoption", lambda patch, world: patch.setattr(world, "_take", broken), FULL),
]


failing = pytest.mark.parametrize(
    ("spoil", "step"), [pytest.param(*rest, id=name) for name, *rest in FAILURES]
)


@failing
def test_a_failure_of_ours_leaves_the_plan_as_it_is(
    spoil: Callable[[pytest.MonkeyPatch, World], None], step: int
) -> None:
    world = World(budget=0.3)
    before = world.plan = plan_of("fine", None)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning) as caught:
        spoil(patch, world)
        world.run(range(60))
    assert ["a bug of ours" in str(warning.message) for warning in caught] == [True]
    assert world.plan is before and world.ran[step:] == ["plan"] * (60 - step)
    assert world.controller.is_halted and world.said == [world.controller.note]
    assert "the plan is left as it is: an internal failure" in world.controller.note
    assert not any(weight._backward_hooks for weight in world.weights.values())
    # What is saved of it is of use: where it goes on, it measures again.
    state = json.loads(json.dumps(world.controller.state_dict()))
    after = World(budget=0.3)
    after.controller.load_state_dict(state)
    after.run(range(60, 80))
    assert after.ran[0] == "probe" and after.controller.measured is not None


@failing
def test_a_failure_of_ours_raises_where_that_is_asked_for(
    spoil: Callable[[pytest.MonkeyPatch, World], None], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(budget=0.3, strict=True)
    world.plan = plan_of("fine", None)
    spoil(monkeypatch, world)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        world.run(range(60))
    assert len(world.ran) == step


def test_mistakes_of_the_user_are_no_failures_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(budget=0.3)

    def impossible(table: NoiseTable) -> Plan:
        raise ConfigError(f"impossible under {table}")

    monkeypatch.setattr(world, "_plan", impossible)
    with pytest.raises(ConfigError, match="impossible"):
        world.run(range(60))
    world = World(budget=0.3)
    # A schedule of theirs.
    monkeypatch.setattr(world, "numbers", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        world.run(range(60))
