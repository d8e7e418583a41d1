"""How tests compile when they are about graphs, not about what Inductor makes of them."""

from contextlib import AbstractContextManager

import torch


def aten_only(enabled: bool = True) -> AbstractContextManager[None]:
    """Let Inductor call ATen for every operation, instead of writing and compiling C++.

    A backend in front of Inductor can change no more than the graphs and the inputs. Those are the
    same here, and compiling takes a tenth of the time. Nor are there copies to channels_last,
    which would be the only C++ that is left.
    """
    settings = {"fallback_by_default": True, "layout_optimization": False} if enabled else {}
    patch: AbstractContextManager[None] = torch._inductor.config.patch(settings)
    return patch
