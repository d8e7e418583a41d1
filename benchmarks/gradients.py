"""Gradients as vectors, and how much they differ: what noise is measured from."""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def gradient(model: nn.Module, compiled: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Return the gradient of a batch, of all parameters, flat, in float64.

    Args:
        model: whose parameters they are.
        compiled: the same model, as it is to be run.
        batch: images and labels.
    """
    model.zero_grad()
    images, labels = batch
    F.cross_entropy(compiled(images), labels).backward()
    flat = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        flat.append(parameter.grad.flatten().double())
    return torch.cat(flat)


def variance(values: Sequence[Tensor]) -> float:
    """Return E|v - E v|^2, without bias."""
    mean = torch.stack(list(values)).mean(0)
    squares = [float((value - mean).square().sum()) for value in values]
    return statistics.mean(squares) * len(values) / (len(values) - 1)


def square_of_mean(values: Sequence[Tensor]) -> float:
    """Return |E v|^2, without bias: of the mean, a part of the variance is left."""
    mean = torch.stack(list(values)).mean(0)
    return float(mean.square().sum()) - variance(values) / len(values)
