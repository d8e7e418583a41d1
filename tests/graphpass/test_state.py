"""State of methods: it enters compiled graphs, stays in the session, and error feedback works."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import graphpass
from codegen import draws
from graphpass import ConfigError, Schedule, callers, dispatcher
from graphpass.method import get_method, salt_of
from graphpass.site import Gradient, Site
from graphpass.state import State, with_state
from tests.compiling import aten_only

SEED = 5
MEPROP: dict[str, Any] = {"name": "meprop", "gradient": "weight", "share": 0.3}
METHODS: dict[str, dict[str, Any]] = {
    "meprop": MEPROP,
    "meprop of examples": MEPROP | {"unified": False},
    "topk": {"name": "topk", "min_positions": 1},
    "crs_unscaled": {"name": "crs_unscaled", "gradient": "weight", "keep": 0.2},
    "crs_unscaled drawn": {
        "name": "crs_unscaled", "gradient": "weight", "keep": 0.2, "sampling": "uniform",
    },
    "crs_unscaled channels": {
        "name": "crs_unscaled", "gradient": "weight", "keep": 0.9, "axis": "channels",
    },
    "swat": {"name": "swat", "gradient": "weight", "sparsity": 0.8},
    "swat channels": {
        "name": "swat", "gradient": "weight", "sparsity": 0.8, "structure": "channel",
    },
}  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 17, 3, 2, 1, bias=False), nn.Tanh()
    )


def batch(number: int, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, 3, 9, 7, generator=generator)


def compiled(model: nn.Module, spec: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    given = {"methods": {"2": spec}, "seed": SEED, "strict": True} | options
    call: Callable[[Tensor], Tensor] = torch.compile(model, backend="approx", options=given)
    return call


def gradient(model: nn.Sequential, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    model.zero_grad()
    call(x).square().sum().backward()
    grad = model[2].weight.grad
    assert grad is not None
    return grad.clone()


def kept(model: nn.Module) -> dict[str, Tensor]:
    """Return what the session keeps, by the name of the slot alone."""
    (tensors,) = graphpass.session(model).state_dict()["kept"]
    return {key.rsplit(" ", 1)[1]: value for key, value in tensors.items()}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_with_feedback_gradients_add_up_to_the_exact_ones(name: str) -> None:
    model = net()
    runs = {
        how: compiled(model, METHODS[name] | {"feedback": how == "fed back"})
        for how in ("plain", "fed back")
    }
    missed: dict[str, Tensor] = {}
    for how, call in runs.items():
        torch._dynamo.reset()
        missed[how] = torch.zeros_like(model[2].weight)
        for step in range(12):
            exact = gradient(model, model, batch(step))
            missed[how] += exact - gradient(model, call, batch(step))
            if how == "plain":
                continue
            # No more than one step dropped, however many there were; and it is what is kept.
            assert missed[how].norm() < exact.norm()
            torch.testing.assert_close(missed[how], kept(model)["dropped"], atol=1e-3, rtol=0)
    assert missed["fed back"].norm() < 0.3 * missed["plain"].norm()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", sorted(METHODS))
def test_compiled_steps_are_the_lowering_run_by_itself(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits over several steps, the state of both growing apart from each other."""
    model, sites = net()[:3], list[Site]()
    make_plan = callers.make_plan

    def listening(analysis: Any, *args: Any) -> Any:
        sites.extend(analysis.sites)
        return make_plan(analysis, *args)

    monkeypatch.setattr(callers, "make_plan", listening)
    spec = METHODS[name] | {"feedback": True}
    call = compiled(model, spec)
    state: State | None = None
    method = get_method(spec["name"])
    params = method.make_params({k: v for k, v in spec.items() if k not in {"name", "gradient"}})
    for step in range(3):
        x = batch(step)
        model.zero_grad()
        out = call(x)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(step))
        out.backward(cotangent)
        found = model[2].weight.grad
        (site,) = (s for s in sites if s.gradient is Gradient.WEIGHT and s.path == "2")
        given = {
            "grad": cotangent,
            "input": model[:2](x).detach(),
            "weight": model[2].weight.detach(),
        }
        state = state or State.fresh(method.state(site, params), torch.tensor(step))
        alone = with_state(method.lower, state)(
            site,
            params,
            torch.empty(()).expand(model[2].weight.shape),
            torch.tensor(draws.mix(SEED, step, 0, 0)),
            salt_of(site),
            *(given[operand] for operand in method.operands(site, params)),
        )
        state = state.at(torch.tensor(step + 1))
        assert found is not None and torch.equal(found, alone)


def test_what_inductor_writes_keeps_the_same() -> None:
    """Reading and writing stay in order where operations are fused."""
    kept_forward = {
        "name": "swat", "gradient": "forward", "sparsity": 0.5, "refresh": 2, "freeze_after": 3,
    }  # fmt: skip
    runs = []
    for scope in (contextlib.nullcontext(), aten_only()):
        torch._dynamo.reset()
        model = net().double()
        with scope:
            call = compiled(model, [MEPROP | {"feedback": True}, kept_forward])
            grads = []
            for step in range(4):
                grads.append(gradient(model, call, batch(step).double()))
                with torch.no_grad():
                    model[2].weight -= 1e-3 * grads[-1]
        names = ("dropped", "threshold", "refreshed", "active")
        runs.append([*grads, *map(kept(model).__getitem__, names)])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


class Run:
    """A training run that can be saved and resumed, as in a new process."""

    def __init__(self, spec: dict[str, Any], **options: Any) -> None:
        torch._dynamo.reset()
        self.model = net()
        self.call = compiled(self.model, spec, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.session = graphpass.session(self.model)

    def train(self, begin: int, end: int, each: int = 1, size: int = 4) -> None:
        """Run micro-batches, `each` of which make a step."""
        for number in range(begin, end):
            self.call(batch(number, size)).square().sum().backward()
            if (number + 1) % each == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def bits(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


FED_BACK = MEPROP | {"feedback": True}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("loaded_late", [False, True])
def test_a_resumed_run_gives_the_same_bits(loaded_late: bool) -> None:
    straight = Run(FED_BACK)
    straight.train(0, 6)
    begun = Run(FED_BACK)
    begun.train(0, 3)
    saved = _through_a_file(begun.session.state_dict())
    begun.train(3, 6)
    weights = Run(FED_BACK)
    weights.train(0, 3)
    resumed = Run(FED_BACK)
    if loaded_late:
        # The session has a state of its own by then.
        resumed.train(9, 11)
    resumed.model.load_state_dict(weights.model.state_dict())
    resumed.optimizer.zero_grad()
    resumed.session.load_state_dict(saved)
    resumed.train(3, 6)
    assert all(map(torch.equal, begun.bits(), straight.bits()))
    assert all(map(torch.equal, resumed.bits(), straight.bits()))
    # Without the state they would not be: the comparison proves something.
    forgetful = Run(FED_BACK)
    forgetful.model.load_state_dict(weights.model.state_dict())
    forgetful.session.load_state_dict({**saved, "kept": []})
    forgetful.train(3, 6)
    assert not torch.equal(forgetful.bits()[2], straight.bits()[2])


@pytest.mark.usefixtures("interpreted")
def test_nothing_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = []
    compile_variant = dispatcher.Variants.compile

    def counted(self: Any, key: Any, *args: Any) -> Any:
        compilations.append(key)
        return compile_variant(self, key, *args)

    monkeypatch.setattr(dispatcher.Variants, "compile", counted)
    counters.clear()
    run = Run(FED_BACK)
    run.train(0, 6)
    assert len(compilations) == 1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("interpreted")
def test_the_state_survives_another_batch_size() -> None:
    """Dynamo compiles the graph anew, with a symbolic size; the session goes on."""
    counters.clear()
    run = Run(FED_BACK)
    gradient(run.model, run.call, batch(0))
    before = kept(run.model)["dropped"]
    found = gradient(run.model, run.call, batch(1, size=6))
    exact = gradient(run.model, run.model, batch(1, size=6))
    torch.testing.assert_close(found + kept(run.model)["dropped"], exact + before)
    gradient(run.model, run.call, batch(2, size=5))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.usefixtures("interpreted")
def test_two_forwards_before_their_backwards() -> None:
    """Each backward pass adds what the one before it dropped, whatever ran forward in between."""
    model, wanted = net(), net()
    call, one_by_one = compiled(model, FED_BACK), compiled(wanted, FED_BACK)
    for model_, numbers in ((model, (0, 1)), (wanted, (1, 0))):
        graphpass.session(model_).follow(torch.optim.SGD(model_.parameters()))
        if model_ is model:
            losses = [call(batch(number)).square().sum() for number in numbers]
            for loss in reversed(losses):
                loss.backward()
        else:
            for number in numbers:
                one_by_one(batch(number)).square().sum().backward()
    grads = [m[2].weight.grad for m in (model, wanted)]
    assert grads[0] is not None and grads[1] is not None
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(kept(model)["dropped"], kept(wanted)["dropped"])


@pytest.mark.usefixtures("interpreted")
def test_accumulated_gradients_add_up_too() -> None:
    model = net()
    call = compiled(model, FED_BACK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    graphpass.session(model).follow(optimizer)
    exact = torch.zeros_like(model[2].weight)
    for number in range(4):
        exact += gradient(model, model, batch(number))
    model.zero_grad()
    for number in range(4):
        call(batch(number)).square().sum().backward()
    grad = model[2].weight.grad
    assert grad is not None
    torch.testing.assert_close(grad + kept(model)["dropped"], exact)


@pytest.mark.usefixtures("interpreted")
def test_mixed_precision_and_channels_last() -> None:
    model = net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    call = compiled(model, FED_BACK)
    given, exact = torch.zeros_like(model[2].weight), torch.zeros_like(model[2].weight)
    for step in range(5):
        x = batch(step).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            exact += gradient(model, model, x)
            given += gradient(model, call, x)
    dropped = kept(model)["dropped"]
    assert dropped.dtype is torch.float32
    # Both sums were rounded to 8 bits in every step.
    torch.testing.assert_close(given + dropped, exact, atol=0.02 * float(exact.abs().max()), rtol=0)


@pytest.mark.usefixtures("interpreted")
def test_steps_that_are_exact_leave_the_state_alone() -> None:
    model = net()
    call = compiled(model, FED_BACK, schedule=Schedule("odd", every_step=2, phase=1))
    exact = [gradient(model, model, batch(step)) for step in range(4)]
    gradients = []
    states = []
    for step in range(4):
        gradients.append(gradient(model, call, batch(step)))
        states.append(kept(model)["dropped"])
    assert not states[0].any() and states[1].any()
    assert torch.equal(states[1], states[2]) and not torch.equal(states[2], states[3])
    torch.testing.assert_close(gradients[2], exact[2])
    with graphpass.session(model).exact():
        gradient(model, call, batch(4))
    model.eval()
    call(batch(5))
    assert torch.equal(kept(model)["dropped"], states[3])


@pytest.mark.usefixtures("interpreted")
def test_what_is_not_a_number_is_forgotten() -> None:
    model = net()
    call = compiled(model, FED_BACK)
    gradient(model, call, batch(0) * float("inf"))
    assert kept(model)["dropped"].isfinite().all()
    assert gradient(model, call, batch(1)).isfinite().all()


@pytest.mark.usefixtures("interpreted")
def test_a_state_of_another_model_is_refused() -> None:
    run = Run(FED_BACK)
    run.train(0, 1)
    saved = run.session.state_dict()
    (tensors,) = saved["kept"]
    wrong = {key: value[:1] for key, value in tensors.items()}
    with pytest.raises(ConfigError, match=r"of shape \[1, 12, 3, 3\], this model keeps \[17, 12"):
        run.session.load_state_dict({**saved, "kept": [wrong]})
    with pytest.raises(ConfigError, match="no state of a graphpass session"):
        run.session.load_state_dict({**saved, "kept": 3})


@pytest.mark.parametrize("name", ["topk", "meprop", "swat", "crs_unscaled"])
def test_feedback_is_true_or_false(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"method '{name}': feedback=1; give True or False"):
        get_method(name).make_params({"feedback": 1})


@pytest.mark.usefixtures("interpreted")
def test_state_of_what_becomes_exact_is_dropped() -> None:
    run = Run(FED_BACK)
    run.train(0, 2)
    assert set(kept(run.model)) == {"dropped"}
    # The same model, compiled with another plan: other parameters, so a state of its own.
    torch._dynamo.reset()
    call = compiled(run.model, FED_BACK | {"share": 0.5})
    gradient(run.model, call, batch(2))
    *_, last = run.session.state_dict()["kept"]
    (key,) = last
    assert '"share": 0.5' in key
