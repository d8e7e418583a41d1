"""Failures of ours while a user trains: what stands in, and what raises."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphpass import ConfigError, rescue


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("a bug of ours")


def mistaken() -> str:
    raise ConfigError("a mistake of the user")


def test_a_failure_is_answered_or_raised() -> None:
    assert rescue.rescued(lambda: "done", str, strict=False) == "done"
    failure = rescue.rescued(broken, str, strict=False)
    assert failure == "an internal failure (RuntimeError: a bug of ours)"
    with pytest.raises(RuntimeError, match="a bug of ours"):
        rescue.rescued(broken, str, strict=True)
    with pytest.raises(ConfigError, match="a mistake of the user"):
        rescue.rescued(mistaken, str, strict=False)


def double(x: Tensor) -> tuple[Tensor]:
    return (x * 2,)


def noisy(seed: Tensor) -> tuple[Tensor]:
    return (torch.ops.prims.inductor_random.default([3], seed, "rand"),)


def test_a_backward_part_that_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rescue, "compile_fx_inner", broken)
    failures: list[Exception] = []
    compile_part, x = rescue.or_interpreted(failures.append), torch.arange(3.0)
    graph = make_fx(double)(x)
    part = compile_part(graph, [x], is_backward=True)
    assert torch.equal(part([x])[0], 2 * x) and part._boxed_call
    assert [str(failure) for failure in failures] == ["a bug of ours"]
    with pytest.raises(RuntimeError, match="a bug of ours"):
        compile_part(graph, [x], is_backward=False)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        rescue.or_interpreted(broken)(graph, [x], is_backward=True)


def test_a_backward_part_that_draws_again_is_not_run_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Operation by operation it would draw other numbers, and the gradient would be wrong."""
    monkeypatch.setattr(rescue, "compile_fx_inner", broken)
    failures: list[Exception] = []
    seed = torch.zeros((), dtype=torch.int64)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        rescue.or_interpreted(failures.append)(make_fx(noisy)(seed), [seed], is_backward=True)
    assert not failures
