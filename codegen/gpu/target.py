"""Which GPU programs are written for."""

from functools import cache

import torch

# Without a GPU, as grids are cut for: an H100.
_SUPPOSED = "sm_90"


# Those with 227 KB of shared memory, and tensor cores that read it themselves.
_LARGE = ("sm_90", "sm_100", "sm_103")


def is_large() -> bool:
    """Return whether a program may have tiles of 256 columns, and 128 bytes to contract."""
    return architecture() in _LARGE


@cache
def architecture() -> str:
    """Return the current GPU as compilers call it, such as "sm_90" or "gfx942"."""
    if not torch.cuda.is_available():
        return _SUPPOSED
    if torch.version.hip is not None:
        # With features behind it, such as "gfx942:sramecc+:xnack-".
        name: str = torch.cuda.get_device_properties().gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
