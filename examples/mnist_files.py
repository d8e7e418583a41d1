"""Read MNIST as its authors publish it: four files of bytes behind a short header, or those zipped.

LeCun, Cortes, Burges 1998, "The MNIST database of handwritten digits". A header is a number that
says what follows (0x08: bytes, then the number of axes) and the length of every axis, big-endian.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graphpass.errors import ConfigError

CLASSES = 10
_BYTES = 0x08
_SPLITS = ("train", "t10k")
# torchvision keeps the files two folders down.
_FOLDERS = (".", "raw", "MNIST/raw")
_WHAT_IS_LEGAL = (
    "Give the folder that holds train-images-idx3-ubyte, train-labels-idx1-ubyte, "
    "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each as it is or as .gz"
)

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read(directory: Path) -> tuple[Arrays, Arrays]:
    """Read the training and the test split.

    Args:
        directory: The folder with the four files, or one that has it as `raw` or `MNIST/raw`.

    Returns:
        Images `uint8 [N, 1, H, W]` and labels `int64 [N]` of the training and of the test split.

    Raises:
        ConfigError: If files are missing, or their content is not what MNIST holds.
    """
    train, test = (_split(directory, name) for name in _SPLITS)
    return train, test


def _split(directory: Path, name: str) -> Arrays:
    images = _array(_find(directory, f"{name}-images-idx3-ubyte"), axes=3)
    path = _find(directory, f"{name}-labels-idx1-ubyte")
    labels = _array(path, axes=1)
    if len(images) == 0 or len(images) != len(labels):
        raise ConfigError(f"{path} is not MNIST: {len(labels)} labels of {len(images)} images")
    if labels.max() >= CLASSES:
        raise ConfigError(f"{path} is not MNIST: label {labels.max()}, legal are 0 to 9")
    return images[:, None], labels.astype(np.int64)


def _find(directory: Path, name: str) -> Path:
    for folder in _FOLDERS:
        for path in (directory / folder / name, directory / folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ConfigError(f"cannot read MNIST from {directory}: no {name}. {_WHAT_IS_LEGAL}")


def _array(path: Path, axes: int) -> NDArray[np.uint8]:
    """Return what a file holds.

    Raises:
        ConfigError: If that is no array of bytes with so many axes.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        kind, *shape = struct.unpack_from(f">{1 + axes}I", content)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}. {_WHAT_IS_LEGAL}") from error
    values = np.frombuffer(content, np.uint8, offset=4 * (1 + axes))
    if kind != (_BYTES << 8) + axes or values.size != math.prod(shape):
        raise ConfigError(
            f"{path} is not MNIST: header {kind:#x} for {shape}, {values.size} bytes. "
            f"{_WHAT_IS_LEGAL}"
        )
    return values.reshape(shape)
