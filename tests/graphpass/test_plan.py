"""Plans as records and as files, and what happens when one is used."""

import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphpass
from graphpass import ConfigError, Decision, Plan, Schedule
from graphpass.plan import PLAN_VERSION
from graphpass.schedule import SCHEDULES

# What is tested here are graphs, not the loops that Inductor writes for them.
pytestmark = pytest.mark.usefixtures("aten_only")

STEPS = 3
PLAN = Plan(
    (
        Decision("conv1:forward", 1, "convolution", ("s77", 4, 6, 6), None, {}, "forward"),
        Decision(
            "conv1:weight", 1, "convolution", (4, 3, 3, 3), "topk", {"k": 2, "scale": 0.5}, ""
        ),
        Decision("conv1:input", 1, "convolution", ("s77", 3, 8, 8), "zero", {}, ""),
        Decision("fc#2:weight", 2, "mm", (10, 4), "random", {"std": None}, ""),
    ),
    Schedule.named("ga-2"),
    warmup_steps=5,
)

Record = dict[str, Any]


def small_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2))


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    result = torch.compile(model, backend="approx", options={"strict": True, **options})
    assert isinstance(result, nn.Module)
    return result


def gradients(model: nn.Module, **options: Any) -> list[list[Tensor]]:
    """Return the gradients of every parameter on a few steps of training."""
    run = compiled(model, **options)
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    steps = []
    for _ in range(STEPS):
        model.zero_grad()
        run(x).square().sum().backward()
        steps.append([parameter.grad.clone() for parameter in model.parameters()])
    return steps


def edited(edit: Callable[[Record], object]) -> str:
    """Return the JSON of a plan after an edit of its record."""
    record = json.loads(PLAN.to_json())
    edit(record)
    return json.dumps(record)


NAMES = st.text(max_size=20)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
DECISIONS = st.builds(
    Decision,
    site=st.text(min_size=1, max_size=20),
    layer=st.integers(1, 1000),
    op=NAMES,
    output=st.lists(st.integers(0, 2**40) | NAMES, max_size=5).map(tuple),
    method=st.none() | NAMES,
    params=st.dictionaries(NAMES, st.none() | st.booleans() | NUMBERS | NAMES, max_size=3),
    reason=NAMES,
)
PLANS = st.builds(
    Plan,
    decisions=st.lists(DECISIONS, max_size=4, unique_by=lambda d: d.site).map(tuple),
    schedule=st.sampled_from(
        [*SCHEDULES.values(), Schedule.until(9), Schedule("x", 3, 2, 8, 7, 6, 5, 11)]
    ),
    warmup_steps=st.integers(0, 10**6),
)


@given(PLANS)
def test_json_round_trip(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again.decisions) == hash(plan.decisions)
    assert again.digest == plan.digest and again.to_json() == plan.to_json()


def test_file_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "made" / "here" / "plan.json")
    assert Plan.load(tmp_path / "made" / "here" / "plan.json") == PLAN
    PLAN.save(str(tmp_path / "plan.json"))
    assert Plan.load(str(tmp_path / "plan.json")) == PLAN


def test_approximated_are_the_decisions_that_name_a_method() -> None:
    assert [decision.site for decision in PLAN.approximated] == [
        "conv1:weight",
        "conv1:input",
        "fc#2:weight",
    ]
    assert Plan().approximated == ()


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAN, warmup_steps=6),
        replace(PLAN, schedule=Schedule.named("ga-3")),
        replace(PLAN, decisions=PLAN.decisions[:-1]),
        replace(PLAN, decisions=PLAN.decisions[::-1]),
        replace(PLAN, decisions=(replace(PLAN.decisions[0], params={"k": 3}),)),
    ],
)
def test_digest_tells_plans_apart(other: Plan) -> None:
    assert re.fullmatch("[0-9a-f]{16}", PLAN.digest)
    assert other.digest != PLAN.digest and other != PLAN


def test_table_shows_every_decision() -> None:
    lines = [line.rstrip() for line in str(PLAN).splitlines()]
    assert lines[0] == "3 of 4 products approximated, schedule 'ga-2'"
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[2:] if line.strip()]
    assert rows[0] == ["layer", "product", "op", "output", "method", "why exact"]
    assert rows[2:] == [
        ["1", "conv1:forward", "convolution", "s77x4x6x6", "exact", "forward"],
        ["1", "conv1:weight", "convolution", "4x3x3x3", "topk(k=2, scale=0.5)"],
        ["1", "conv1:input", "convolution", "s77x3x8x8", "zero"],
        ["2", "fc#2:weight", "mm", "10x4", "random"],
    ]


@pytest.mark.parametrize("name", ["blocks[left]", "a:smile:b", "blocks[/left]"])
def test_table_shows_names_as_they_are(name: str) -> None:
    decision = Decision(f"{name}.conv:weight", 1, "convolution", (4, 3), None, {}, "")
    assert f"{name}.conv:weight" in str(Plan((decision,)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "not JSON",
        "null",
        "5",
        "[]",
        '"plan"',
        "{}",
        '{"decisions": []}',
        PLAN.to_json()[:-20],
        PLAN.to_json()[: len(PLAN.to_json()) // 2],
        PLAN.to_json() + "}",
        "\0" * 10,
    ],
)
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^this is not a plan: .*Make it again"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.pop("decisions"),
        lambda record: record.pop("schedule"),
        lambda record: record.pop("warmup_steps"),
        lambda record: record.update(decisions=None),
        lambda record: record.update(decisions="all"),
        lambda record: record.update(decisions=[1]),
        lambda record: record.update(schedule="ga-1"),
        lambda record: record.update(schedule=None),
        lambda record: record.update(warmup_steps=None),
        lambda record: record.update(warmup_steps="soon"),
        lambda record: record.update(warmup_steps=float("nan")),
        lambda record: record["schedule"].update(colour="red"),
        lambda record: record["schedule"].update(every_step=0),
        lambda record: record["schedule"].update(stop="end"),
        lambda record: record["schedule"].update(rule="first_layer_only"),
        lambda record: record["decisions"][1].pop("site"),
        lambda record: record["decisions"][1].pop("layer"),
        lambda record: record["decisions"][1].pop("op"),
        lambda record: record["decisions"][1].pop("output"),
        lambda record: record["decisions"][1].pop("method"),
        lambda record: record["decisions"][1].pop("params"),
        lambda record: record["decisions"][1].pop("reason"),
        lambda record: record["decisions"][1].update(method=5),
        lambda record: record["decisions"][1].update(method=["topk"]),
        lambda record: record["decisions"][1].update(params="k"),
        lambda record: record["decisions"][1].update(params=None),
        lambda record: record["decisions"][1].update(output=16),
        lambda record: record["decisions"][1].update(layer="first"),
        lambda record: record["decisions"][1].update(layer=None),
        lambda record: record.update(prediction=5),
        lambda record: record.update(prediction={}),
        lambda record: record.update(prediction={"sites": [], "frontier": []}),
        lambda record: record.update(prediction={"sites": {"a": {"exact_s": 1}}, "frontier": []}),
    ],
)
def test_corrupt_plans(edit: Callable[[Record], object]) -> None:
    with pytest.raises(ConfigError, match=r"^the plan is corrupt: .*Make it again"):
        Plan.from_json(edited(edit))


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.update(warmup_steps=float("inf")),
        lambda record: record.update(warmup_steps=-5),
        lambda record: record.update(warmup_steps=2.5),
        lambda record: record.update(version=True),
        lambda record: record.update(version=0),
        lambda record: record.update(decisions={}),
        lambda record: record.update(decisions=record["decisions"] * 2),
        lambda record: record["decisions"][1].update(layer=float("inf")),
        lambda record: record["decisions"][1].update(layer=1.5),
        lambda record: record["decisions"][1].update(site=None),
        lambda record: record["decisions"][1].update(output="4x3"),
        lambda record: record["decisions"][1].update(output=[None, [3]]),
        lambda record: record["decisions"][1].update(params=[]),
        lambda record: record["decisions"][1].update(reason=None),
        lambda record: record["decisions"][1].update(op=None),
        lambda record: record["decisions"][1].update(site=""),
        lambda record: record["decisions"][1].update(layer=True),
        lambda record: record["decisions"][1].update(layer=0),
        lambda record: record["decisions"][1].update(output=[True]),
        lambda record: record["decisions"][1].update(method=True),
    ],
)
def test_corrupt_plans_with_values_that_convert(edit: Callable[[Record], object]) -> None:
    with pytest.raises(ConfigError, match="plan"):
        Plan.from_json(edited(edit))


def test_files_from_before_there_were_predictions_are_read() -> None:
    text = edited(lambda record: (record.update(version=1), record.pop("prediction")))
    assert Plan.from_json(text) == PLAN


def test_a_deeply_nested_text_is_no_plan() -> None:
    with pytest.raises(ConfigError, match="not a plan"):
        Plan.from_json("[" * 200_000)


@pytest.mark.parametrize("version", [PLAN_VERSION + 1, 99, "1", None, 1.5, [1]])
def test_newer_and_unknown_versions(version: object) -> None:
    text = edited(lambda record: record.update(version=version, decisions="laid out otherwise"))
    pattern = rf"the plan has format {re.escape(repr(version))}; .* up to {PLAN_VERSION}: update"
    with pytest.raises(ConfigError, match=pattern):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x05\x95\xff\xfe" * 9, "cannot read the plan .*UnicodeDecodeError"),
        (b"", "this is not a plan"),
        (PLAN.to_json().encode()[:-1], "this is not a plan"),
        (PLAN.to_json().encode("utf-16"), "cannot read the plan"),
        (b'{"version": 3}', "the plan has format 3"),
        (b'{"version": 1}', "the plan is corrupt: KeyError"),
    ],
)
def test_load_names_the_unreadable_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_load_of_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the plan '.*missing\.json': FileNotFound"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match=r"cannot read the plan .*IsADirectory"):
        Plan.load(tmp_path)


def test_load_of_an_impossible_path() -> None:
    with pytest.raises(ConfigError, match="cannot read the plan"):
        Plan.load("plan\0.json")


def test_a_function_cannot_be_saved(tmp_path: Path) -> None:
    plan = replace(PLAN, schedule=Schedule(rule=lambda layer, step: True))
    path = tmp_path / "plan.json"
    for save in (plan.to_json, lambda: plan.save(path)):
        with pytest.raises(
            ConfigError, match=r"a function cannot be saved: .*dataclasses\.replace"
        ):
            save()
    assert not any(tmp_path.iterdir())
    replace(plan, schedule=Schedule()).save(path)
    assert Plan.load(path).decisions == PLAN.decisions


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


class FailingFile(io.StringIO):
    """A file that has been created, and cannot be written to."""

    def __init__(self, path: Path, failure: Callable[..., None]) -> None:
        super().__init__()
        path.touch(exist_ok=False)
        self.failure = failure

    def write(self, text: str) -> int:
        self.failure()
        return len(text)


@pytest.mark.parametrize("failure", [no_space, interrupted])
@pytest.mark.parametrize("call", ["replace", "write"])
def test_a_failing_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[..., None], call: str
) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    if call == "replace":
        monkeypatch.setattr(os, call, failure)
    else:
        monkeypatch.setattr(Path, "open", lambda path, *_, **__: FailingFile(path, failure))
    with pytest.raises((OSError, KeyboardInterrupt)):
        Plan().save(path)
    monkeypatch.undo()
    assert Plan.load(path) == PLAN
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(OSError, match=re.escape("plan.json")):
        PLAN.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_saved_plan_can_be_read_by_whoever_may_read_files_here(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    (tmp_path / "other").touch()
    mode = (tmp_path / "other").stat().st_mode
    assert (tmp_path / "plan.json").stat().st_mode == mode


def test_digest_with_a_partial_as_rule() -> None:
    rule = partial(lambda layer, step: layer < step)
    assert Plan(schedule=Schedule(rule=rule)).digest != PLAN.digest
    assert Schedule(rule=rule).to_dict()["rule"] == "functools:partial"


def test_digest_with_a_callable_object_as_rule() -> None:
    class Rule:
        def __call__(self, layer: int, step: int) -> bool:
            return True

    assert Plan(schedule=Schedule(rule=Rule())).digest


METHODS = {"0": {"name": "topk", "k": 2, "min_positions": 1}, "3": "random"}


def test_a_saved_plan_gives_the_same_bits_as_the_methods_it_was_made_of(tmp_path: Path) -> None:
    options = {"schedule": Schedule(every_step=2, phase=1), "warmup_steps": 1, "seed": 11}
    model = small_net()
    named = gradients(model, methods=METHODS, **options)
    plan = graphpass.session(model).plan
    assert plan == graphpass.plan(small_net(), torch.randn(5, 3, 6, 6), methods=METHODS, **options)
    assert [(d.site, d.method) for d in plan.approximated] == [
        ("3:weight", "random"),
        ("0:weight", "topk"),
    ]
    assert (plan.schedule, plan.warmup_steps) == (options["schedule"], 1)
    plan.save(tmp_path / "plan.json")

    for given_plan in (tmp_path / "plan.json", str(tmp_path / "plan.json"), plan):
        torch._dynamo.reset()
        again = small_net()
        followed = gradients(again, plan=given_plan, seed=11)
        assert graphpass.session(again).plan == plan
        for step in range(STEPS):
            assert all(map(torch.equal, named[step], followed[step]))
    # Steps 0 and 2 are exact, and step 1 is not: there is something to be the same.
    assert torch.equal(named[0][0], named[2][0]) and not torch.equal(named[0][0], named[1][0])


def test_a_given_schedule_replaces_that_of_the_plan(tmp_path: Path) -> None:
    model = small_net()
    gradients(model, methods=METHODS)
    plan = graphpass.session(model).plan
    other = small_net()
    steps = gradients(other, plan=plan, schedule=Schedule(every_step=2, phase=1))
    assert graphpass.session(other).plan.schedule == Schedule(every_step=2, phase=1)
    assert torch.equal(steps[0][0], steps[2][0]) and not torch.equal(steps[0][0], steps[1][0])


def test_a_schedule_that_never_selects_a_layer_makes_it_exact() -> None:
    plan = plan_of_small_net(plan=plan_of_small_net(), schedule=Schedule("second", first_layer=2))
    decisions = {d.site: d for d in plan.decisions}
    assert decisions["3:weight"].method == "random"
    assert decisions["0:weight"].method is None
    assert "the schedule never selects this layer" in decisions["0:weight"].reason


def plan_of_small_net(batch: int = 5, **options: Any) -> Plan:
    """Return the plan of `small_net`, with `METHODS` unless another plan is given."""
    options = options or {"methods": METHODS}
    return graphpass.plan(small_net(), torch.randn(batch, 3, 6, 6), **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        # Another shape of the weight, another kind of layer, another name, another place.
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)),
            r"it has [03]:\w+ as .*; this model has",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Linear(4, 2)),
            r"does not have the product 1:forward",
        ),
        (
            lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)),
            r"does not have the product 1:forward",
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 2)
            ),
            r"does not have the product 1:forward",
        ),
    ],
)
def test_a_plan_for_another_model_is_refused(
    tmp_path: Path, model: Callable[[], nn.Module], message: str
) -> None:
    plan_of_small_net().save(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match=f"the plan was made for another model: .*{message}"):
        compiled(model(), plan=tmp_path / "plan.json")(torch.randn(5, 3, 6, 6))


def test_planning_with_another_batch_does_not_make_training_dynamic() -> None:
    graphpass.plan(small_net(), torch.randn(5, 3, 6, 6), methods=METHODS)
    compiled(small_net(), methods=METHODS)(torch.randn(7, 3, 6, 6))
    assert graphpass.reports()[-1].sizes == {}


def test_a_refused_plan_does_not_make_training_dynamic() -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        graphpass.plan(small_net(), torch.randn(5, 3, 6, 6), methods=["zeros"])
    compiled(small_net(), methods=METHODS)(torch.randn(7, 3, 6, 6))
    assert graphpass.reports()[-1].sizes == {}


def test_a_plan_fits_another_batch() -> None:
    plan = plan_of_small_net(batch=7, plan=plan_of_small_net())
    assert [d.site for d in plan.approximated] == ["3:weight", "0:weight"]


def renamed(plan: Plan, site: str, **fields: Any) -> Plan:
    """Return a plan with one decision changed."""
    decisions = (replace(d, **fields) if d.site == site else d for d in plan.decisions)
    return replace(plan, decisions=tuple(decisions))


def use(plan: Plan) -> None:
    compiled(small_net(), plan=plan)(torch.randn(5, 3, 6, 6))


def test_a_plan_with_an_unknown_method_is_refused() -> None:
    plan = renamed(plan_of_small_net(), "0:weight", method="topkk")
    with pytest.raises(ConfigError, match=r"unknown method 'topkk': legal are .*topk"):
        use(plan)


def test_a_plan_with_an_unknown_parameter_is_refused() -> None:
    plan = renamed(plan_of_small_net(), "0:weight", params={"kk": 2})
    with pytest.raises(ConfigError, match="method 'topk' has no parameter 'kk': legal are k,"):
        use(plan)


def test_a_plan_with_an_illegal_parameter_is_refused() -> None:
    plan = renamed(plan_of_small_net(), "0:weight", params={"k": 0})
    with pytest.raises(ConfigError, match="k=0; give an integer >= 1"):
        use(plan)


@pytest.mark.parametrize(
    ("site", "fields"),
    [
        # Random has no input gradient, top-k no matrix product, no method a forward product.
        ("3:input", {"method": "random", "params": {}, "reason": ""}),
        ("3:weight", {"method": "topk", "params": {"k": 1}}),
        ("0:forward", {"method": "zero", "params": {}, "reason": ""}),
    ],
)
def test_a_plan_with_a_method_that_does_not_fit_its_site_is_refused(
    site: str, fields: dict[str, Any]
) -> None:
    plan = renamed(plan_of_small_net(), site, **fields)
    with pytest.raises(ConfigError, match=f"{site}.*{fields['method']}"):
        use(plan)


def test_reports_survive_a_refused_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphpass.report._GRAPHS", [])
    plan = renamed(plan_of_small_net(), "0:weight", method="topkk")
    try:
        use(plan)
    except ConfigError:
        graphpass.reports()


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the plan .*FileNotFoundError"):
        compiled(small_net(), plan=tmp_path / "plan.json")(torch.randn(5, 3, 6, 6))


def test_a_corrupt_file_is_the_users_mistake(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"version": 1}')
    with pytest.raises(ConfigError, match=r"plan\.json: the plan is corrupt"):
        compiled(small_net(), plan=os.fspath(path))(torch.randn(5, 3, 6, 6))


def test_budget_0_is_exact_whatever_the_plan() -> None:
    assert not plan_of_small_net(plan=plan_of_small_net(), budget=0).approximated
