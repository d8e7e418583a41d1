"""Where things are kept between processes, and how they are written there."""

import os
import uuid
from pathlib import Path


def cache_dir() -> Path:
    """Return the user's cache directory for this project; `GRAPHPASS_CACHE_DIR` overrides it."""
    if override := os.environ.get("GRAPHPASS_CACHE_DIR"):
        return Path(override)
    # Imported here: a machine without it works where the variable is set.
    import platformdirs

    return Path(platformdirs.user_cache_dir("graphpass"))


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all, safe against other processes doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`, whose files only their owner may read: others may share what is kept.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
