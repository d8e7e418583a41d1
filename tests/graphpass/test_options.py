"""Options: what is legal, and that a user sees the `ConfigError` itself where it is not."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphpass
from graphpass import AccuracyDrop, ConfigError, Options, Plan, Schedule, Speedup
from graphpass.backend import inductor_patches
from graphpass.curve import Curve

pytestmark = pytest.mark.usefixtures("interpreted")

FIELDS = [field.name for field in fields(Options)]


class Net(nn.Module):
    """Two layers that training has weight gradients for, and one input gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.encoder(x))
        return result


def run(options: Any, mode: str | None = None) -> None:
    """Take the way of a user: wrap a model with options, and call it."""
    torch.compile(Net(), backend="approx", options=options, mode=mode)(torch.randn(5, 4))


# Every way to get a field wrong: the message says what was given and what is legal.
ILLEGAL = [
    ({"budget": -0.1}, r'budget=-0\.1: give "auto" or a finite number that is at least 0'),
    ({"budget": float("nan")}, r'budget=nan: give "auto" or a finite number'),
    ({"budget": float("inf")}, r'budget=inf: give "auto" or a finite number'),
    ({"budget": True}, r'budget=True: give "auto" or a finite number'),
    ({"budget": "0.1"}, r"""budget='0\.1': give "auto" or a finite number"""),
    ({"budget": "Auto"}, r"""budget='Auto': give "auto" or a finite number"""),
    ({"budget": None}, r'budget=None: give "auto" or a finite number'),
    ({"budget": [0.1]}, r'budget=\[0\.1\]: give "auto" or a finite number'),
    ({"budget": 10**400}, r'budget=10+: give "auto" or a finite number'),
    ({"budget": 1j}, r'budget=1j: give "auto" or a finite number'),
    ({"max_bias": -0.1}, r"max_bias=-0\.1: give a finite number that is at least 0"),
    ({"max_bias": float("nan")}, r"max_bias=nan: give a finite number"),
    ({"max_bias": True}, r"max_bias=True: give a finite number"),
    ({"probe_every": 0}, r"probe_every=0: give an integer of at least 1"),
    ({"gradients": ()}, r"gradients=\(\): give one or more of weight, input, forward"),
    ({"gradients": "weight"}, r"gradients='weight': give one or more of weight, input, forward"),
    ({"gradients": ("weights",)}, r"gradients=\('weights',\): give one or more"),
    ({"gradients": ["weight", "product"]}, r"gradients=\['weight', 'product'\]: give one or more"),
    ({"gradients": ["input", "input"]}, r"gradients=\['input', 'input'\]: give one or more"),
    ({"gradients": None}, r"gradients=None: give one or more of weight, input, forward"),
    ({"gradients": 5}, r"gradients=5: give one or more of weight, input, forward"),
    ({"methods": "zero"}, r"methods='zero': give None, a list of method names, or a mapping"),
    ({"methods": [1]}, r"methods=\[1\]: give None, a list of method names, or a mapping"),
    ({"methods": 3}, r"methods=3: give None, a list of method names, or a mapping"),
    ({"methods": {"zero"}}, r"methods=\{'zero'\}: give None, a list of method names"),
    ({"methods": {1: "zero"}}, r"methods: 1 is no module pattern; give a string"),
    ({"methods": {"": "zero"}}, r"methods: '' is no module pattern; give a string"),
    ({"seed": -1}, r"seed=-1: give an integer from 0 to 2147483647"),
    ({"seed": 2**31}, r"seed=2147483648: give an integer from 0 to 2147483647"),
    ({"seed": 1.0}, r"seed=1\.0: give an integer from 0"),
    ({"seed": True}, r"seed=True: give an integer from 0"),
    ({"seed": None}, r"seed=None: give an integer from 0"),
    ({"seed": "1"}, r"seed='1': give an integer from 0"),
    ({"warmup_steps": -1}, r"warmup_steps=-1: give an integer of at least 0"),
    ({"warmup_steps": 0.5}, r"warmup_steps=0\.5: give an integer of at least 0"),
    ({"warmup_steps": None}, r"warmup_steps=None: give an integer of at least 0"),
    ({"total_steps": 0}, r"total_steps=0: give an integer of at least 1"),
    ({"total_steps": 1e3}, r"total_steps=1000\.0: give an integer of at least 1"),
    ({"max_variants": 0}, r"max_variants=0: give an integer of at least 1"),
    ({"max_variants": "8"}, r"max_variants='8': give an integer of at least 1"),
    ({"strict": 1}, r"strict=1: give True or False"),
    ({"strict": "yes"}, r"strict='yes': give True or False"),
    ({"strict": None}, r"strict=None: give True or False"),
    ({"schedule": "ga-9"}, r"schedule='ga-9': legal are always, ga-1, .*'exact-tail:F'"),
    ({"schedule": ""}, r"schedule='': legal are always, ga-1, .*'exact-tail:F'"),
    ({"schedule": 4}, r"schedule=4: give a Schedule or the name of one"),
    ({"schedule": Schedule}, r"schedule=<class .*Schedule'>: give a Schedule or the name of one"),
    ({"schedule": "exact-tail:0.1"}, r"needs the length of the run: add the option total_steps"),
    ({"schedule": "exact-tail:2", "total_steps": 9}, r"must lie between 0 and 1"),
    ({"plan": 5}, r"plan=5: give a Plan or the path of a plan file"),
    ({"plan": b"plan.json"}, r"plan=b'plan\.json': give a Plan or the path of a plan file"),
    ({"plan": {}}, r"plan=\{\}: give a Plan or the path of a plan file"),
    ({"plan": Plan(), "methods": {}}, r"both plan and methods were given"),
    ({"plan": "plan.json", "methods": ["zero"]}, r"both plan and methods were given"),
    ({"inductor": ["max_autotune"]}, r"inductor=\['max_autotune'\]: give a mapping"),
    ({"inductor": "max_autotune"}, r"inductor='max_autotune': give a mapping"),
    ({"inductor": {1: 2}}, r"inductor: 1 is no setting; give its name, a string"),
    ({"mode": 5}, r'mode=5: give the name of a mode, such as "max-autotune"'),
    ({"mode": []}, r"mode=\[\]: give the name of a mode"),
]

# What is legal by itself, and is not once there is a model.
UNFIT = [
    ({"mode": "fastest"}, r"mode='fastest': legal are .*max-autotune"),
    ({"inductor": {"max_autotun": True}}, r"inductor: there is no setting 'max_autotun'; "),
    ({"inductor": {"a": 1, "b.c": 1, "debug": False}}, r"there is no setting 'a', 'b\.c'; "),
    ({"plan": "missing.json"}, r"cannot read the plan 'missing\.json': FileNotFoundError"),
    ({"plan": ""}, r"cannot read the plan '': "),
    ({"plan": Plan()}, r"made for another model: it does not have the product encoder\.0:forward"),
    ({"methods": ["zero", "zeros"]}, r"unknown method 'zeros': legal are .*random, .*zero"),
    ({"methods": {"head": "zeros"}}, r"unknown method 'zeros': legal are .*random, .*zero"),
    ({"methods": {"head": {"name": 5}}}, r"unknown method 5: legal are .*random, .*zero"),
    ({"methods": {"head": None}}, r"methods\['head'\]=None: give a method name, a mapping"),
    ({"methods": {"head": {"k": 2}}}, r"methods\['head'\]=\{'k': 2\}: give .* with 'name'"),
    ({"methods": {"head": [["zero"]]}}, r"methods\['head'\]=\['zero'\]: give a method name, a"),
    ({"methods": {"head": []}}, r"methods\['head'\]=\[\]: give a method name, a mapping"),
    (
        {"methods": {"head": {"name": "topk", "top": 2}}},
        r"method 'topk' has no parameter 'top': legal are k, scale, min_positions, feedback, "
        r"and 'gradient'",
    ),
    (
        {"methods": {"head": {"name": "zero", "b": 1, "a": 2}}},
        r"method 'zero' has no parameter 'a', 'b': legal are none, and 'gradient'",
    ),
    ({"methods": {"head": {"name": "topk", "k": 0}}}, r"'topk': k=0; give an integer >= 1"),
    ({"methods": {"head": {"name": "topk", "k": True}}}, r"'topk': k=True; give an integer >= 1"),
    ({"methods": {"head": {"name": "topk", "min_positions": 0}}}, r"'topk': min_positions=0; give"),
    ({"methods": {"head": {"name": "topk", "scale": float("inf")}}}, r"'topk': scale=inf; give a"),
    ({"methods": {"head": {"name": "topk", "scale": "1"}}}, r"'topk': scale='1'; give a finite"),
    ({"methods": {"head": {"name": "random", "std": 0}}}, r"'random': std=0; give a positive"),
    ({"methods": {"head": {"name": "random", "std": -1.0}}}, r"'random': std=-1\.0; give a"),
    (
        {"methods": {"head": {"name": "random", "gradient": "input"}}},
        r"methods\['head'\]: gradient='input'; method 'random' approximates weight$",
    ),
    (
        {"methods": {"head": {"name": "zero", "gradient": "forward"}}},
        r"methods\['head'\]: gradient='forward'; method 'zero' approximates weight and input$",
    ),
    ({"methods": {"head": {"name": "zero", "gradient": ["input"]}}}, r"gradient=\['input'\]; "),
    (
        {"methods": {"heads": "zero"}},
        r"the pattern 'heads' matches no convolution or matrix product.*such as 'head'",
    ),
    (
        {"methods": {"encoder.1": "zero"}},
        r"the pattern 'encoder\.1' matches no .*such as 'encoder\.0'",
    ),
    (
        {"methods": {"head": "zero", "layer9.*": "zero"}},
        r"the pattern 'layer9\.\*' matches no .*there are 2, such as ",
    ),
    ({"methods": {"HEAD": "zero"}}, r"the pattern 'HEAD' matches no "),
]


def names(cases: list[tuple[dict[str, Any], str]]) -> list[str]:
    return [f"{i}-{'-'.join(given)}" for i, (given, _) in enumerate(cases)]


@pytest.mark.parametrize(("given", "message"), ILLEGAL, ids=names(ILLEGAL))
def test_illegal_values_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**given)


# Compiling takes a fraction of a second each time, so one value of each field has to do here.
ONE_A_FIELD = list({"-".join(given): (given, message) for given, message in ILLEGAL}.values())


@pytest.mark.parametrize(("given", "message"), ONE_A_FIELD, ids=names(ONE_A_FIELD))
def test_illegal_values_reach_the_user_as_they_are(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(given)


@pytest.mark.parametrize(("given", "message"), UNFIT, ids=names(UNFIT))
def test_what_does_not_fit_the_model_reaches_the_user(given: dict[str, Any], message: str) -> None:
    Options(**given)
    with pytest.raises(ConfigError, match=message) as caught:
        run(given)
    # A user who expects a ValueError, and one who reads the last line of a traceback.
    assert isinstance(caught.value, ValueError)
    assert "TORCHDYNAMO_VERBOSE" not in str(caught.value)


@pytest.mark.parametrize(("given", "message"), UNFIT, ids=names(UNFIT))
def test_what_does_not_fit_is_refused_when_planning(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graphpass.plan(Net(), torch.randn(5, 4), **given)


@pytest.mark.parametrize("strict", [False, True])
def test_mistakes_are_no_internal_failures(strict: bool) -> None:
    """They raise whether or not internal failures do."""
    with pytest.raises(ConfigError, match="matches no"):
        run({"methods": {"nothing": "zero"}, "strict": strict})


@pytest.mark.parametrize("key", ["budgets", "method", "max_autotune", "epilogue_fusion", ""])
def test_unknown_options_are_refused(key: str) -> None:
    pattern = f"unknown option {key!r}: legal are {', '.join(FIELDS)} .*go into .*'inductor'"
    with pytest.raises(ConfigError, match=pattern):
        run({key: 1})


def test_every_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'a', 'b': legal are budget"):
        run({"b": 1, "seed": 1, "a": 2})


def test_an_illegal_mode_of_torch_compile_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mode='fastest': legal are .*max-autotune"):
        run(None, mode="fastest")


def test_options_are_checked_where_nothing_is_trained() -> None:
    model = torch.compile(Net().eval(), backend="approx", options={"budget": -1})
    with torch.no_grad(), pytest.raises(ConfigError, match="budget=-1"):
        model(torch.randn(5, 4))


def test_a_mistake_can_be_corrected() -> None:
    """A refused compilation leaves nothing behind that would spoil the next one."""
    with pytest.raises(ConfigError, match="matches no"):
        run({"methods": {"nothing": "zero"}})
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model, backend="approx", options={"methods": {"head": "zero"}})
    compiled(torch.randn(5, 4)).sum().backward()
    assert model.head.weight.grad is not None and not model.head.weight.grad.any()
    assert model.encoder[0].weight.grad is not None and model.encoder[0].weight.grad.any()
    assert [row.where for row in graphpass.reports()[-1].approximated] == ["head"]


@pytest.mark.parametrize(
    "options",
    [
        {1: 2, "x": 3},
        {"inductor": {1: 2}},
        {"mode": []},
        {"budget": np.array([1, 2])},
        {"budget": 10**400},
        {"methods": {"head": {"name": "zero", 1: 2, "a": 3}}},
        {"methods": {"head": {"name": "topk", "scale": 10**400}}},
        {"methods": {"head": {"name": "topk", "scale": True}}},
        {"methods": {"head": {"name": "random", "std": True}}},
        {"methods": {"head": {"name": "random", "std": 10**400}}},
        {"schedule": ""},
        {"schedule": Schedule(rule=None, stop=3, start=0), "gradients": ("weight", "weight")},
    ],
)
def test_odd_values_are_refused(options: dict[Any, Any]) -> None:
    with pytest.raises(ConfigError):
        run(options)


@pytest.mark.parametrize("options", ["abc", 5, [1]], ids=str)
def test_what_is_no_mapping_is_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match="mapping"):
        Options.from_dict(options)


def test_wrong_types_of_inductor_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_autotune"):
        run({"inductor": {"max_autotune": "yes please"}})


LEGAL: list[Mapping[str, Any]] = [
    {},
    {"budget": 0},
    {"budget": 0.1, "seed": 3},
    {"budget": "auto", "max_bias": 0.01, "probe_every": 50},
    {"budget": Speedup(1.5)},
    {"budget": AccuracyDrop(0.2, Curve(90.0, 2.0, 0.1, 0.8, 1.0))},
    {"methods": {"head": "zero", "encoder.*": {"name": "topk", "k": 2}}},
    {"methods": ["zero", "random"], "gradients": ["weight"]},
    {"methods": ("zero",), "gradients": ("input",)},
    {"schedule": "ga-2", "warmup_steps": 10},
    {"schedule": Schedule.until(5)},
    {"schedule": "exact-tail:0.1", "total_steps": 100},
    {"plan": Plan()},
    {"plan": Path("plan.json")},
    {"plan": "plan.json", "schedule": "ga-1"},
    {"inductor": {"max_autotune": True}, "mode": "default"},
    {"strict": True, "max_variants": 1, "seed": 2**31 - 1},
]


@pytest.mark.parametrize("given", LEGAL, ids=str)
def test_to_dict_and_from_dict_round_trip(given: Mapping[str, Any]) -> None:
    options = Options.from_dict(given)
    assert options == Options(**given)
    assert Options.from_dict(options.to_dict()) == options
    assert Options.from_dict(options.to_dict()).to_dict() == options.to_dict()
    # What was left at its default is left out.
    assert set(options.to_dict()) <= set(given)


def test_to_dict_leaves_defaults_out() -> None:
    given = {"budget": "auto", "seed": 0, "gradients": ("weight", "input"), "strict": True}
    assert Options(**given).to_dict() == {"strict": True}
    assert Options().to_dict() == {}


def test_to_dict_is_what_torch_compile_takes() -> None:
    options = Options(methods={"head": "zero"}, seed=5, strict=True)
    model = Net()
    torch.compile(model, backend="approx", options=options.to_dict())(torch.randn(5, 4))
    assert [d.site for d in graphpass.session(model).plan.approximated] == ["head:weight"]


def test_from_dict_takes_the_mode_of_torch_compile() -> None:
    assert Options.from_dict(None).mode is None
    assert Options.from_dict(None, "max-autotune").mode == "max-autotune"
    assert Options.from_dict({"seed": 1}, "default") == Options(seed=1, mode="default")


def test_from_dict_copies_nothing_into_the_mapping() -> None:
    given = {"seed": 1}
    Options.from_dict(given, "default")
    assert given == {"seed": 1}


def test_options_cannot_be_changed() -> None:
    options = Options()
    with pytest.raises(AttributeError):
        options.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("schedule", "total_steps", "expected"),
    [
        (None, None, Schedule()),
        ("always", None, Schedule()),
        ("ga-1", None, Schedule.named("ga-1")),
        ("exact-tail:0.5", 10, Schedule("exact-tail:0.5", stop=5)),
        (Schedule.after(7), None, Schedule.after(7)),
    ],
)
def test_resolved_schedule(
    schedule: Schedule | str | None, total_steps: int | None, expected: Schedule
) -> None:
    options = Options(schedule=schedule, total_steps=total_steps)
    assert options.resolved_schedule() == expected


def test_resolved_plan(tmp_path: Path) -> None:
    plan = Plan(schedule=Schedule.named("ga-3"), warmup_steps=2)
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert Options(plan=given).resolved_plan() == plan
    assert Options().resolved_plan() is None


@pytest.mark.parametrize(
    ("given", "mode", "replays"),
    [
        ({}, None, False),
        ({"inductor": {"triton.cudagraphs": True}}, None, True),
        ({}, "reduce-overhead", True),
        ({"inductor": {"triton.cudagraphs": False}}, "max-autotune", False),
        ({}, "max-autotune-no-cudagraphs", False),
    ],
)
def test_cuda_graphs_are_asked_for_as_inductor_has_it(
    given: dict[str, Any], mode: str | None, replays: bool
) -> None:
    options = Options.from_dict(given, mode)
    assert options.replays is replays
    assert bool(inductor_patches(options).get("triton.cudagraphs")) is replays
