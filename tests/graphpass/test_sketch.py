"""The estimate of the batch's noise, from gradients whose noise is known."""

import math

import pytest
import torch
from torch import nn

from graphpass.sketch import Sketch, values_of

PAIRS = 200


def parameters() -> dict[int, nn.Parameter]:
    return {
        0: nn.Parameter(torch.zeros(30, 40)),
        3: nn.Parameter(torch.zeros(7)),
        4: nn.Parameter(torch.zeros(())),
        5: nn.Parameter(torch.zeros(5), requires_grad=False),
    }


def backward(given: dict[int, nn.Parameter], step: int, mean: float, deviation: float) -> None:
    """Add normal gradients of a known mean and deviation."""
    generator = torch.Generator().manual_seed(step)
    trained = [p for p in given.values() if p.requires_grad]
    wanted = [mean + deviation * torch.randn(p.shape, generator=generator) for p in trained]
    torch.stack([(p * w).sum() for p, w in zip(trained, wanted, strict=True)]).sum().backward()


@pytest.mark.parametrize("set_to_none", [True, False, None], ids=["none", "zeros", "accumulate"])
def test_noise_and_square_of_every_parameter(set_to_none: bool | None) -> None:
    """Also where gradients of several backward passes are summed up before they are used."""
    given = parameters()
    sketch = Sketch(given)
    sketch.open(given)
    for step in range(PAIRS + 1):
        backward(given, step, mean=2.0, deviation=0.5)
        sketch.fold()
        if set_to_none is not None or step % 3 == 0:
            for parameter in given.values():
                if set_to_none is False and parameter.grad is not None:
                    parameter.grad.zero_()
                else:
                    parameter.grad = None
    values = values_of(sketch.result().tolist())
    for position, (half, square) in zip(sketch.positions, values, strict=True):
        parameter = given[position]
        if not parameter.requires_grad:
            assert (half, square) == (0, 0)
            continue
        entries = min(parameter.numel(), 32 if parameter.dim() < 2 else 192)
        # Half differences of neighbours share a gradient: the deviation of their mean is
        # sqrt(3 / pairs) of V for one entry. Five of those are left once in a million runs.
        tolerance = 5 * math.sqrt(3 / (PAIRS * entries))
        assert half == pytest.approx(0.25 * parameter.numel(), rel=tolerance)
        assert square - half == pytest.approx(4 * parameter.numel(), rel=tolerance)


def test_what_is_not_finite_or_missing_makes_no_pair() -> None:
    given = parameters()
    sketch = Sketch(given)
    sketch.open(given)
    for step in range(8):
        if step == 4:
            sketch.fold()
            continue
        backward(given, step, mean=math.nan if step == 2 else 0.0, deviation=1.0)
        sketch.fold()
    half, square = values_of(sketch.result().tolist())[0]
    assert half == pytest.approx(1200, rel=0.3) and square == pytest.approx(1200, rel=0.3)


def test_nothing_is_left_in_the_model() -> None:
    given = parameters()
    sketch = Sketch(given)
    sketch.open(given)
    assert sketch.is_open and any(parameter._backward_hooks for parameter in given.values())
    sketch.close()
    assert not any(parameter._backward_hooks for parameter in given.values())
    backward(given, 0, 1.0, 1.0)
    sketch.fold()
    assert values_of(sketch.result().tolist()) == [(0.0, 0.0)] * 4


def test_a_sketch_goes_on_from_its_state() -> None:
    results = []
    for resumed in (False, True):
        given = parameters()
        sketch = Sketch(given)
        sketch.open(given)
        for step in range(6):
            if resumed and step == 3:
                state = sketch.state_dict()
                sketch.close()
                sketch = Sketch(given)
                sketch.load_state_dict(state)
                sketch.open(given)
            backward(given, step, 1.0, 1.0)
            sketch.fold()
        results.append(values_of(sketch.result().tolist()))
    assert results[0] == results[1]
