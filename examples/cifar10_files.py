"""Read CIFAR-10 from either layout its authors publish.

Krizhevsky 2009, "Learning multiple layers of features from tiny images". An image takes 3,072
bytes: its red, green and blue planes, each with 32 rows of 32 pixels. The "python" version keeps
images and labels in pickles, the "binary" version puts a label byte before each image.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graphpass.errors import ConfigError

IMAGE_SHAPE = (3, 32, 32)
CLASSES = 10
_IMAGE_BYTES = 3 * 32 * 32

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read(directory: Path) -> tuple[Arrays, Arrays]:
    """Read the training and the test split.

    Args:
        directory: The folder `cifar-10-batches-py` or `cifar-10-batches-bin`, or its parent.

    Returns:
        Images `uint8 [N, 3, 32, 32]` and labels `int64 [N]` of the training and of the test split.

    Raises:
        ConfigError: If files are missing, or their content is not what CIFAR-10 holds.
    """
    folder, layout = _find(directory)
    parts = [_checked(folder / name, layout.read(folder / name)) for name in layout.files]
    images = np.concatenate([images for images, _ in parts[:-1]])
    labels = np.concatenate([labels for _, labels in parts[:-1]])
    return (images, labels), parts[-1]


@dataclass(frozen=True, slots=True)
class _Layout:
    """A published version: the folder its archive makes, the files in it (test split last)."""

    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Arrays]


def _find(directory: Path) -> tuple[Path, _Layout]:
    if not directory.is_dir():
        raise ConfigError(
            f"cannot read CIFAR-10 from {directory}: no such folder. {_WHAT_IS_LEGAL}"
        )
    # A folder that holds most of the files is more telling than one that holds none.
    nearest: tuple[int, str] | None = None
    for layout in _LAYOUTS:
        for folder in (directory, directory / layout.folder):
            missing = [name for name in layout.files if not (folder / name).is_file()]
            if not missing:
                return folder, layout
            if len(missing) < len(layout.files) and (nearest is None or len(missing) < nearest[0]):
                nearest = len(missing), f"{folder} lacks {', '.join(missing)}"
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    what = nearest[1] if nearest else f"it holds {found}"
    raise ConfigError(f"cannot read CIFAR-10 from {directory}: {what}. {_WHAT_IS_LEGAL}")


def _checked(path: Path, arrays: Arrays) -> Arrays:
    images, labels = arrays
    if len(images) == 0 or len(images) != len(labels):
        raise ConfigError(f"{path} is not CIFAR-10: {len(images)} images, {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ConfigError(
            f"{path} is not CIFAR-10: labels from {labels.min()} to {labels.max()}, "
            f"legal are 0 to {CLASSES - 1}"
        )
    return arrays


def _read_binary(path: Path) -> Arrays:
    content = np.fromfile(path, dtype=np.uint8)
    if len(content) % (1 + _IMAGE_BYTES):
        raise ConfigError(
            f"{path} is not CIFAR-10: it has {len(content)} bytes, "
            f"legal are multiples of {1 + _IMAGE_BYTES}"
        )
    rows = content.reshape(-1, 1 + _IMAGE_BYTES)
    images = np.ascontiguousarray(rows[:, 1:]).reshape(-1, *IMAGE_SHAPE)
    return images, rows[:, 0].astype(np.int64)


def _read_pickle(path: Path) -> Arrays:
    content = _unpickle(path)
    # Written by Python 2, whose strings arrive as bytes; a copy written by Python 3 has both.
    named = {k.decode() if isinstance(k, bytes) else str(k): v for k, v in content.items()}
    data, labels = named.get("data"), named.get("labels")
    if not isinstance(data, np.ndarray) or not isinstance(labels, list):
        held = ", ".join(f"{name} ({type(v).__name__})" for name, v in named.items())
        raise ConfigError(
            f"{path} is not CIFAR-10: it must hold `data` (array) and `labels` (list), "
            f"but holds {held or 'nothing'}"
        )
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _IMAGE_BYTES:
        raise ConfigError(
            f"{path} is not CIFAR-10: data is {data.dtype} {list(data.shape)}, "
            f"legal is uint8 [N, {_IMAGE_BYTES}]"
        )
    try:
        return data.reshape(-1, *IMAGE_SHAPE), np.asarray(labels, dtype=np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path} is not CIFAR-10: labels are not integers") from error


def _unpickle(path: Path) -> dict[object, object]:
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except _UNPICKLING_ERRORS as error:
        raise ConfigError(
            f"cannot read {path}: {error or type(error).__name__}. "
            "It is damaged or not a CIFAR-10 batch: unpack the published archive again"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} is not CIFAR-10: it holds a {type(content).__name__}, not a dict"
        )
    return content


# What a damaged pickle makes the standard library and numpy raise.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


# `numpy.core` became `numpy._core`: files written under either name mean the same function.
_REBUILD_ARRAY = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _REBUILD_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _REBUILD_ARRAY,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and built-in containers only: a pickle may otherwise run any code."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        """Return an allowed global.

        Raises:
            UnpicklingError: If the pickle asks for any other one.
        """
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, but only numpy arrays are allowed"
            ) from None


_BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
_LAYOUTS = (
    _Layout("cifar-10-batches-py", _BATCHES, _read_pickle),
    _Layout("cifar-10-batches-bin", tuple(f"{name}.bin" for name in _BATCHES), _read_binary),
)
_WHAT_IS_LEGAL = (
    "Legal is the folder that the published archive cifar-10-python.tar.gz (or the binary version) "
    "unpacks to, or its parent: data_batch_1 to data_batch_5 and test_batch, all six with .bin or "
    "without. Unpack the archive and name that folder, or leave --data out to use the digits"
)
