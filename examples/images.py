"""Classifying images: what the examples for image data sets have in common."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from examples import models
from examples.data import Batches, ImageData, evaluation_batches
from examples.settings import Settings
from examples.training import Batch, Forward, Task


def tasks(images: ImageData, model: str) -> Callable[[Settings], Task]:
    """Return what makes a task, with new initial values, of training a model on images.

    Raises:
        ConfigError: When it is called, if the model does not exist or cannot take the images.
    """

    def fresh_task(settings: Settings) -> Task:
        _, channels, size, _ = images.train.images.shape
        network = models.build(model, in_channels=channels, image_size=size)
        if settings.channels_last:
            convert_conv2d_weight_memory_format(network, torch.channels_last)
        here = images.to(settings.device)
        return Task(
            name=f"{model} on {len(images.train)} images of {images.name}",
            model=network.to(settings.device),
            batches=Batches(here, settings.batch_size, settings.seed, settings.channels_last),
            loss=cross_entropy,
            score=lambda module: accuracy_percent(module, here, settings.channels_last),
            score_name="test_accuracy_percent",
        )

    return fresh_task


def cross_entropy(forward: Forward, batch: Batch) -> Tensor:
    """Return the mean cross entropy of a batch: images `[B, C, H, W]` and labels `[B]`."""
    images, labels = batch
    return F.cross_entropy(forward(images), labels)


def accuracy_percent(model: nn.Module, images: ImageData, channels_last: bool) -> float:
    """Return how many of a hundred test images `model` classifies correctly."""
    correct = torch.zeros((), dtype=torch.int64, device=images.test.labels.device)
    for batch, labels in evaluation_batches(images, channels_last=channels_last):
        correct += (model(batch).argmax(dim=1) == labels).sum()
    return 100 * int(correct) / len(images.test)
