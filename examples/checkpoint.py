"""Files that are either complete or absent: results and checkpoints.

A file is written beside its destination and then renamed, so a crash leaves the previous one.
Checkpoints are read with `weights_only=True`: a file from elsewhere cannot run code.
"""

import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphpass.errors import ConfigError

FORMAT = 1


def check_destination(path: Path) -> None:
    """Check, before hours of training, that `path` can be written at their end.

    Raises:
        ConfigError: If it is a folder, or lies in a folder that does not exist or is read-only.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file")
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write {path}: the folder {folder} is read-only")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which never holds a part of it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # The rename may reach the disk before the data does, unless the data is forced out.
            os.fsync(file.fileno())
        # mkstemp makes files private; these are ordinary ones.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, which must not hold NaN or infinities, as indented JSON."""
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint that holds `state`: tensors, numbers, strings and containers of them."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Returns:
        The `state` that `save` was given.

    Raises:
        ConfigError: If the file is missing, damaged, or of another format.
    """
    if not path.is_file():
        raise ConfigError(f"cannot resume from {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Bytes that are no checkpoint fail in whatever way the reader happens to take them.
        raise ConfigError(
            f"cannot resume from {path}: the file is damaged or not a checkpoint; "
            "name a file that --checkpoint wrote"
        ) from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise ConfigError(
            f"cannot resume from {path}: it is not a checkpoint of format {FORMAT}; "
            "name a file that this version's --checkpoint wrote"
        )
    return state
