"""Exact means what Inductor alone gives, bit for bit: outputs, gradients, buffers, random numbers.

Every test trains the same model twice from the same seed, with `backend="inductor"` and with
`backend="approx"` in one of the settings that promise exactness, and compares all bits.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphpass
from tests.graphpass.nets import NETS, Batch, ConvOnly, Net, train

Results = dict[str, Tensor]
# Trains a compiled model and returns all that can be seen of it.
Training = Callable[[nn.Module, Net], Results]

# What the user asks for in each setting that promises exactness. The last two compile a graph in
# which every weight gradient is zero beside the exact one, and must never run it.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "budget_0": {"budget": 0},
    "nothing_named": {},
    "never_selected": {"methods": {"*": "zero"}, "warmup_steps": 1000},
    "exact_section": {"methods": {"*": "zero"}},
}
PLANNED = ("never_selected", "exact_section")

STEPS = 3
BATCH = 4


# Inductor calls ATen for every operation instead of writing C++: the graphs, which are all that a
# backend in front of it can change, are the same, and compiling takes a fifth of the time.
@pytest.fixture(autouse=True)
def _without_codegen(request: pytest.FixtureRequest) -> Iterator[None]:
    generated = request.node.get_closest_marker("codegen") is not None
    with torch._inductor.config.patch(fallback_by_default=not generated):
        yield


def pairs(settings: Mapping[str, tuple[str, ...]]) -> list[Any]:
    return [(net, setting) for net, chosen in settings.items() for setting in chosen]
