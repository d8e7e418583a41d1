"""Schedules: what each of them selects, what cannot be one, and whether the variants suffice."""

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graphpass import ConfigError, Schedule
from graphpass.schedule import SCHEDULES

CONVOLUTIONS = {"ResNet-20": 19, "VGG-19": 16}
LAYERS = range(1, 13)
STEPS = 300

# Selected layers on steps 0 to 3, as Wang, Nelaturu and Amarasinghe (2019) describe each schedule.
NONE: tuple[int, ...] = ()
EVERY_FOURTH_OF_19 = (2, 6, 10, 14, 18)
EVERY_FOURTH_OF_16 = (2, 6, 10, 14)
EVERY_OTHER_OF_19 = (2, 4, 6, 8, 10, 12, 14, 16, 18)
EVERY_OTHER_OF_16 = (2, 4, 6, 8, 10, 12, 14, 16)
ALL_BUT_FIRST_OF_19 = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)
ALL_BUT_FIRST_OF_16 = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
TABLES = {
    # "every fourth convolutional layer every training batch, starting from the second"
    ("ga-1", "ResNet-20"): (EVERY_FOURTH_OF_19,) * 4,
    ("ga-1", "VGG-19"): (EVERY_FOURTH_OF_16,) * 4,
    # "every other layer for every other batch"
    ("ga-2", "ResNet-20"): (NONE, EVERY_OTHER_OF_19, NONE, EVERY_OTHER_OF_19),
    ("ga-2", "VGG-19"): (NONE, EVERY_OTHER_OF_16, NONE, EVERY_OTHER_OF_16),
    # "every layer for every fourth batch", and the first convolution never
    ("ga-3", "ResNet-20"): (NONE, NONE, NONE, ALL_BUT_FIRST_OF_19),
    ("ga-3", "VGG-19"): (NONE, NONE, NONE, ALL_BUT_FIRST_OF_16),
}


def selected(schedule: Schedule, layers: Iterable[int], step: int) -> tuple[int, ...]:
    return tuple(layer for layer in layers if schedule.selects(layer, step))


def combination(schedule: Schedule, warmup_steps: int, step: int) -> tuple[int, ...]:
    """Return the layers that are approximated on a step of a run with a warm-up."""
    return () if step < warmup_steps else selected(schedule, LAYERS, step)


@pytest.mark.parametrize(("name", "model"), TABLES)
def test_named_schedule_selects_what_the_paper_says(name: str, model: str) -> None:
    layers = range(1, CONVOLUTIONS[model] + 1)
    table = TABLES[name, model]
    for step in range(12):
        assert selected(Schedule.named(name), layers, step) == table[step % 4]


@pytest.mark.parametrize(("name", "model"), TABLES)
def test_a_quarter_of_the_pairs_is_approximated(name: str, model: str) -> None:
    layers = range(1, CONVOLUTIONS[model] + 1)
    pairs = sum(len(selected(Schedule.named(name), layers, step)) for step in range(4))
    # The first layer is left out, and its part of the quarter with it.
    assert abs(pairs / (4 * len(layers)) - 0.25) <= 1 / len(layers)


def test_two_layer_network() -> None:
    """Its second convolution, every other batch, and none of the three linear layers behind."""
    schedule = Schedule.named("ga-cnn2")
    assert [selected(schedule, range(1, 6), step) for step in range(4)] == [(), (2,), (), (2,)]


def test_always_selects_every_layer_on_every_step() -> None:
    assert all(selected(Schedule.named("always"), LAYERS, step) == (*LAYERS,) for step in range(9))
    assert Schedule.named("always") == Schedule()


@pytest.mark.parametrize("name", SCHEDULES)
def test_names_agree(name: str) -> None:
    assert Schedule.named(name) is SCHEDULES[name] and SCHEDULES[name].name == name


@pytest.mark.parametrize("name", ["ga-1", "ga-2", "ga-3", "ga-cnn2"])
def test_no_schedule_of_the_paper_touches_the_first_layer(name: str) -> None:
    schedule = Schedule.named(name)
    assert not schedule.may_select(1)
    assert not any(schedule.selects(1, step) for step in range(STEPS))


def test_until_is_exact_from_its_step_on() -> None:
    schedule = Schedule.until(3)
    assert [selected(schedule, (1, 2), step) for step in range(5)] == [(1, 2)] * 3 + [()] * 2
    assert schedule.name == "until 3"


def test_after_is_exact_before_its_step() -> None:
    schedule = Schedule.after(3)
    assert [selected(schedule, (1, 2), step) for step in range(5)] == [()] * 3 + [(1, 2)] * 2
    assert schedule.name == "after 3"


@pytest.mark.parametrize(
    ("name", "total_steps", "first_exact"),
    [
        ("exact-tail:0.1", 100, 90),
        ("exact-tail:0.25", 8, 6),
        ("exact-tail:.5", 7, 3),
        # 100 * 0.07 is a little more than 7 in floating-point numbers.
        ("exact-tail:0.07", 100, 93),
        ("exact-tail:0.0001", 2, 1),
        ("exact-tail:0.999", 1000, 1),
    ],
)
def test_exact_tail(name: str, total_steps: int, first_exact: int) -> None:
    schedule = Schedule.named(name, total_steps)
    chosen = [schedule.selects(1, step) for step in range(total_steps)]
    assert chosen == [True] * first_exact + [False] * (total_steps - first_exact)
    assert schedule.name == name


def test_an_exact_tail_is_never_empty() -> None:
    assert not Schedule.named("exact-tail:0.01", 10).selects(1, 9)


def test_rule_decides_by_layer_and_step() -> None:
    schedule = Schedule("diagonal", rule=lambda layer, step: layer == step)
    assert [selected(schedule, LAYERS, step) for step in (0, 1, 5, 99)] == [(), (1,), (5,), ()]


def test_rule_and_numbers_must_agree() -> None:
    asked = []

    def rule(layer: int, step: int) -> bool:
        asked.append((layer, step))
        return layer != 4

    schedule = Schedule("both", 2, 2, 6, 3, phase=1, start=2, stop=8, rule=rule)
    chosen = {step: selected(schedule, LAYERS, step) for step in range(12)}
    assert {step: layers for step, layers in chosen.items() if layers} == {4: (2, 6), 7: (2, 6)}
    # Asked only where the numbers leave it open.
    assert asked == [(layer, step) for step in (4, 7) for layer in (2, 4, 6)]


@pytest.mark.parametrize("answer", [None, 1, 0.5, "yes"])
def test_rule_must_return_a_bool(answer: object) -> None:
    schedule = Schedule("mine", rule=lambda layer, step: answer)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match=rf"'mine'.*returned {answer!r} for layer 3, step 5"):
        schedule.selects(3, 5)


def test_may_select_is_whether_any_step_selects() -> None:
    schedule = Schedule(every_layer=3, first_layer=2, last_layer=9, every_step=5, phase=4, start=7)
    ever = {layer for layer in LAYERS for step in range(50) if schedule.selects(layer, step)}
    assert ever == {layer for layer in LAYERS if schedule.may_select(layer)} == {2, 5, 8}


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Return any schedule without a rule."""
    first_layer = draw(st.integers(1, 5))
    every_step = draw(st.integers(1, 9))
    start = draw(st.integers(0, 100))
    return Schedule(
        every_layer=draw(st.integers(1, 6)),
        first_layer=first_layer,
        last_layer=draw(st.none() | st.integers(first_layer, 12)),
        every_step=every_step,
        phase=draw(st.integers(0, every_step - 1)),
        start=start,
        stop=draw(st.none() | st.integers(start + 1, 200)),
    )


@given(schedules(), st.integers(0, 120))
# Approximate from the first step on, and exact at the end alone.
@example(Schedule(stop=7), 0)
# The approximate window is shorter than a period, and lies between two of its steps.
@example(Schedule(every_step=9, phase=8, start=9, stop=17), 0)
@example(Schedule(every_step=5, phase=0, start=3, stop=7), 6)
def test_landmarks_show_every_combination(schedule: Schedule, warmup_steps: int) -> None:
    landmarks = schedule.landmarks(warmup_steps)
    shown = {combination(schedule, warmup_steps, step) for step in landmarks}
    needed = {combination(schedule, warmup_steps, step) for step in range(STEPS)}
    assert needed <= shown
    assert list(landmarks) == sorted(set(landmarks)) and landmarks[0] >= 0


def test_landmarks_of_a_rule_are_its_first_steps() -> None:
    schedule = Schedule("mine", rule=lambda layer, step: step % 40 == layer)
    assert set(range(64)) <= set(schedule.landmarks(0))
    assert set(range(100, 164)) <= set(schedule.landmarks(100))


def test_picture() -> None:
    picture = Schedule.named("ga-2").picture([(2, "layer1.conv"), (3, "x"), (4, "fc")], 4, steps=10)
    assert picture.splitlines() == [
        "             steps 0 to 9, # = approximated",
        "layer1.conv  .....#.#.#",
        "x            ..........",
        "fc           .....#.#.#",
    ]


def test_picture_of_nothing() -> None:
    assert Schedule().picture([], 0, steps=2) == "  steps 0 to 1, # = approximated"


def test_to_dict_is_what_makes_the_schedule_again() -> None:
    for schedule in (*SCHEDULES.values(), Schedule.until(5), Schedule.after(5)):
        assert Schedule(**schedule.to_dict()) == schedule


def first_layer_only(layer: int, step: int) -> bool:
    return layer == 1


def test_to_dict_names_a_function() -> None:
    assert Schedule(rule=first_layer_only).to_dict()["rule"] == f"{__name__}:first_layer_only"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every_layer": 0}, "every_layer=0; give an integer of at least 1"),
        ({"every_layer": 1.5}, r"every_layer=1\.5; give an integer of at least 1"),
        ({"every_layer": True}, "every_layer=True; give an integer of at least 1"),
        ({"first_layer": 0}, "first_layer=0; give an integer of at least 1"),
        ({"first_layer": "2"}, "first_layer='2'; give an integer of at least 1"),
        ({"every_step": -1}, "every_step=-1; give an integer of at least 1"),
        ({"every_step": None}, "every_step=None; give an integer of at least 1"),
        ({"start": -1}, "start=-1; give an integer of at least 0"),
        ({"start": False}, "start=False; give an integer of at least 0"),
        ({"phase": 1}, "phase=1; give an integer from 0 to every_step - 1 = 0"),
        ({"phase": 3, "every_step": 3}, "phase=3; give an integer from 0 to every_step - 1 = 2"),
        ({"phase": -1, "every_step": 3}, "phase=-1; give an integer from 0"),
        ({"phase": 0.5, "every_step": 3}, r"phase=0\.5; give an integer from 0"),
        ({"first_layer": 3, "last_layer": 2}, "last_layer=2 comes before first_layer=3"),
        ({"last_layer": 0}, "last_layer=0 comes before first_layer=1"),
        ({"stop": 0}, "stop=0 is not after start=0, so no step could be selected"),
        ({"start": 7, "stop": 7}, "stop=7 is not after start=7, so no step could be selected"),
        ({"start": 7, "stop": -2}, "stop=-2 is not after start=7, so no step could be selected"),
        ({"rule": "ga-1"}, r"rule='ga-1'; give a function of \(layer, step\)"),
        ({"rule": True}, r"rule=True; give a function of \(layer, step\)"),
    ],
)
def test_impossible_schedules(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^schedule: {message}"):
        Schedule(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": "5"}, "stop='5'"),
        ({"stop": 2.5}, "stop=2.5"),
        ({"stop": float("nan")}, "stop=nan"),
        ({"stop": True}, "stop=True"),
        ({"last_layer": "3"}, "last_layer='3'"),
        ({"last_layer": 2.5}, "last_layer=2.5"),
        ({"phase": True, "every_step": 2}, "phase=True"),
        ({"name": 5}, "name=5"),
    ],
)
def test_wrong_types(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "total_steps", "message"),
    [
        ("ga-4", None, r"'ga-4': legal are always, ga-1, ga-2, ga-3, ga-cnn2, 'exact-tail:F'"),
        ("GA-1", None, "'GA-1': legal are"),
        ("", None, "'': legal are"),
        ("exact-tail", 10, "'exact-tail': legal are"),
        ("exact-tail:ten", 10, "'exact-tail:ten': legal are"),
        ("exact-tail:-0.1", 10, "legal are"),
        ("exact-tail:0", 10, "must lie between 0 and 1"),
        ("exact-tail:1", 10, "must lie between 0 and 1"),
        ("exact-tail:1.2.3", 10, "must lie between 0 and 1"),
        ("exact-tail:.", 10, "must lie between 0 and 1"),
        ("exact-tail:0.1", None, "needs the length of the run: add the option total_steps"),
        ("exact-tail:0.0001", 1, "nothing is left of 1 steps"),
        ("exact-tail:0.9", 4, "nothing is left of 4 steps"),
    ],
)
def test_impossible_names(name: str, total_steps: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule.named(name, total_steps)
