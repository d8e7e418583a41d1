"""Which GPU programs are written for."""

from functools import cache

import torch

# Without a GPU, as grids are cut for: an H100.
_SUPPOSED = "sm_90"


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
