"""The training step that benchmarks time: forward, loss, backward and optimizer of one model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from examples.models import build

BATCH = 128
# Steps that are run before any is timed: enough for a schedule to have shown every variant.
WARM_UP = 8

Step = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and how its tensors are held.

    Attributes:
        name: one of the example models.
        dtype: `fp32`, or `bf16` for autocast to it.
        nchw: contiguous images and weights instead of channels_last.
        batch: number of images.
    """

    name: str
    dtype: str = "fp32"
    nchw: bool = False
    batch: int = BATCH

    def model(self) -> nn.Module:
        """Return the model; always with the same weights."""
        torch.manual_seed(0)
        model = build(self.name)
        return model if self.nchw else model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def images(self) -> torch.Tensor:
        """Return random images; their content changes no time."""
        images = torch.randn(self.batch, 3, 32, 32)
        return images if self.nchw else images.contiguous(memory_format=torch.channels_last)

    def convolutions(self) -> list[str]:
        """Return the paths of all convolutions, in the order they run."""
        return layers_of(self.model(), nn.Conv2d)

    def layers(self) -> list[str]:
        """Return the paths of all convolutions and linear layers, in the order of the model."""
        return layers_of(self.model())


def layers_of(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Return the paths of convolutions and linear layers, or of the kinds given, in their order."""
    wanted = kinds or (nn.Conv2d, nn.Linear)
    return [path for path, module in model.named_modules() if isinstance(module, wanted)]


def make_step(case: Case, options: dict[str, Any] | None) -> Step:
    """Return a compiled training step that has run every variant of its schedule.

    Args:
        case: what is trained.
        options: of the `approx` backend; None for Inductor alone.
    """
    # Models of one class share their code: without this, one of them would be recompiled over
    # and over, or run eagerly, once Dynamo's limit for that code is reached.
    torch._dynamo.config.recompile_limit = 64
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    backend = "inductor" if options is None else "approx"
    compiled = torch.compile(model, backend=backend, options=options)
    images = case.images()
    labels = torch.randint(0, 10, (case.batch,))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()

    for _ in range(WARM_UP):
        step()
    return step
