"""Images held in memory as `uint8 [N, C, H, W]`, and the stream of training batches made from them.

Three sources: folders with CIFAR-10 ("python" or "binary" version, 3x32x32) and MNIST (1x28x28) as
published, and scikit-learn's digits (1x32x32), which need no download. A batch is built by a few
operations on whole tensors: about a millisecond for 128 CIFAR images on one core, small beside a
training step.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from examples import cifar10_files, mnist_files
from graphpass.errors import ConfigError

# The digits' training split: eleven batches of 128, so nothing is dropped at the usual batch size.
DIGITS_TRAIN = 11 * 128


@dataclass(frozen=True, slots=True)
class Split:
    """Images and their classes.

    Attributes:
        images: `uint8 [N, C, H, W]`.
        labels: `int64 [N]`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class ImageData:
    """A data set and the augmentation that suits it.

    Attributes:
        name: For reports and checkpoints.
        train: Training split.
        test: Test split.
        mean: Mean of each channel over the training split, in 0..255: `[1, C, 1, 1]`.
        std: Standard deviation likewise.
        pad: Pixels added on every side before the random crop.
        flip: Whether half of the images are mirrored; a mirrored digit is another digit.
    """

    name: str
    train: Split
    test: Split
    mean: Tensor
    std: Tensor
    pad: int
    flip: bool

    def to(self, device: str) -> "ImageData":
        """Return the data set with all its tensors on a device."""
        splits = [
            Split(split.images.to(device), split.labels.to(device))
            for split in (self.train, self.test)
        ]
        mean, std = self.mean.to(device), self.std.to(device)
        return replace(self, train=splits[0], test=splits[1], mean=mean, std=std)

    def normalise(self, images: Tensor, channels_last: bool = False) -> Tensor:
        """Return `uint8 [B, C, H, W]` as floats, mean 0 and variance 1 over the training split."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = images.to(torch.float32, memory_format=layout)
        return x.sub_(self.mean).div_(self.std)


def load(directory: Path | None, limit_train: int | None = None) -> ImageData:
    """Load CIFAR-10 from `directory`, or the digits if there is none.

    Args:
        directory: The published folder `cifar-10-batches-py` (or `-bin`), or its parent.
        limit_train: Keep only the first so many training images.

    Returns:
        The data set; its mean and deviation do not depend on `limit_train`.

    Raises:
        ConfigError: If the folder does not hold CIFAR-10, or `limit_train` is not positive.
    """
    return limited(digits() if directory is None else cifar10(directory), limit_train)


def limited(data: ImageData, limit_train: int | None) -> ImageData:
    """Keep only the first training images; all of them for None.

    Raises:
        ConfigError: If `limit_train` is not positive.
    """
    if limit_train is None:
        return data
    if limit_train < 1:
        raise ConfigError(f"cannot keep {limit_train} training images: give a positive number")
    few = Split(data.train.images[:limit_train], data.train.labels[:limit_train])
    return replace(data, train=few)


def digits() -> ImageData:
    """Load scikit-learn's 1,797 digits, enlarged from 8x8 to 32x32 so that convolutions dominate.

    Returns:
        1,408 training and 389 test images, always the same ones.

    Raises:
        ConfigError: If scikit-learn is not installed.
    """
    try:
        source = importlib.import_module("sklearn.datasets").load_digits()
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the built-in digits need scikit-learn, which is not installed: "
            "`pip install scikit-learn`, or name a CIFAR-10 folder with --data"
        ) from error
    small = torch.from_numpy(source.images).float()[:, None]  # [N, 1, 8, 8] in 0..16
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = (large * (255 / 16)).round().to(torch.uint8)
    # The file is ordered by writer: a fixed shuffle puts every writer in both splits.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.from_numpy(source.target).long()[order]
    train = Split(images[:DIGITS_TRAIN], labels[:DIGITS_TRAIN])
    test = Split(images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:])
    return _image_data("digits", train, test, flip=False)


def cifar10(directory: Path) -> ImageData:
    """Load CIFAR-10 from the files its authors publish.

    Args:
        directory: The folder `cifar-10-batches-py` or `cifar-10-batches-bin`, or its parent.

    Returns:
        The data set, in the order of the files.

    Raises:
        ConfigError: If files are missing, or their content is not what CIFAR-10 holds.
    """
    train, test = (_split(*part) for part in cifar10_files.read(directory))
    return _image_data("cifar10", train, test, flip=True)


def mnist(directory: Path) -> ImageData:
    """Load MNIST from the files its authors publish; images are trained on as they are.

    Args:
        directory: The folder with the four files, or one that has it as `raw` or `MNIST/raw`.

    Raises:
        ConfigError: If files are missing, or their content is not what MNIST holds.
    """
    train, test = (_split(*part) for part in mnist_files.read(directory))
    return _image_data("mnist", train, test, flip=False, pad=0)


class Batches:
    """An endless, reproducible stream of augmented training batches.

    Every epoch is a new shuffle; images that do not fill a last batch are dropped, so that every
    batch has one shape and the step is compiled once. All draws come from one generator of its
    own, the processor's wherever the images are: the stream depends on the seed alone and can be
    resumed exactly from `state_dict()`.
    """

    def __init__(
        self, data: ImageData, batch_size: int, seed: int, channels_last: bool = False
    ) -> None:
        """Start the stream.

        Args:
            data: The data set; only its training split is used.
            batch_size: Images in a batch.
            seed: Of the shuffles and augmentations.
            channels_last: Memory format of the images.

        Raises:
            ConfigError: If the training split does not fill one batch.
        """
        if not 1 <= batch_size <= len(data.train):
            raise ConfigError(
                f"batch size {batch_size} does not suit {len(data.train)} training images: "
                f"give one from 1 to {len(data.train)}"
            )
        self._data = data
        self._batch_size = batch_size
        self._channels_last = channels_last
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0
        self.per_epoch = len(data.train) // batch_size

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next batch: images `float32 [B, C, H, W]` and labels `int64 [B]`."""
        if self._position % self.per_epoch == 0:
            self._position = 0
            self._order = torch.randperm(len(self._data.train), generator=self._generator)
        start = self._position * self._batch_size
        # Nothing waits for a GPU: it is a visible part of a small step, and more where processes
        # share one.
        device = self._data.train.images.device
        chosen = self._order[start : start + self._batch_size].to(device, non_blocking=True)
        self._position += 1
        images = self._augment(self._data.train.images[chosen])
        return self._data.normalise(images, self._channels_last), self._data.train.labels[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the stream depends on."""
        return {
            "generator": self._generator.get_state(),
            "order": self._order,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream that `state` was taken from."""
        self._generator.set_state(state["generator"])
        self._order = state["order"]
        self._position = state["position"]

    def _augment(self, images: Tensor) -> Tensor:
        """Crop at a random offset and mirror: `uint8 [B, C, H, W]` to the same shape."""
        batch, channels, height, width = images.shape
        pad = self._data.pad
        if not pad and not self._data.flip:
            return images
        # Drawn on the processor; whole tensors are worked on where the images are.
        drawn = torch.randint(2 * pad + 1, (2, batch, 1), generator=self._generator)
        device = images.device
        offsets = drawn.to(device, non_blocking=True)
        rows = offsets[0] + torch.arange(height, device=device)  # [B, H]
        columns = torch.arange(width, device=device).expand(batch, width)
        if self._data.flip:
            mirrored = torch.rand(batch, 1, generator=self._generator) < 0.5
            mirrored = mirrored.to(device, non_blocking=True)
            columns = torch.where(mirrored, width - 1 - columns, columns)
        columns = columns + offsets[1]  # [B, W]
        # One gather crops and mirrors at once: positions in the padded image, row after row.
        positions = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
        padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
        index = positions.view(batch, 1, -1).expand(batch, channels, -1)
        return padded.gather(2, index).view(images.shape)


def evaluation_batches(
    data: ImageData, batch_size: int = 500, channels_last: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the test split in order, without augmentation: images `[B, C, H, W]`, labels `[B]`."""
    for start in range(0, len(data.test), batch_size):
        images = data.test.images[start : start + batch_size]
        yield data.normalise(images, channels_last), data.test.labels[start : start + batch_size]


def _split(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Split:
    # A copy: what was read from a file may not be written to, which torch warns about.
    return Split(torch.tensor(images), torch.from_numpy(labels))


def _image_data(name: str, train: Split, test: Split, *, flip: bool, pad: int = 4) -> ImageData:
    mean, std = _channel_statistics(train.images)
    return ImageData(name, train, test, mean, std, pad, flip)


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, `float32 [1, C, 1, 1]` both."""
    # From histograms: counts are integers, so the bits do not depend on the number of threads.
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
    share = counts.double() / counts.sum(dim=1, keepdim=True)  # [C, 256]
    values = torch.arange(256, dtype=torch.float64)
    mean = share @ values
    variance = share @ values.square() - mean.square()
    # A blank channel has variance 0: divide it by 1.
    std = torch.where(variance > 0, variance, 1).sqrt()
    return mean.float().view(1, -1, 1, 1), std.float().view(1, -1, 1, 1)
