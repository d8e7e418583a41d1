"""Which forward a checkpoint outside of a compiled graph is running again.

The second run of a forward must see the variant and the draws of the first, whatever has been run
in between: the checkpoint compares what both save for backward.
"""

import weakref
from collections.abc import Callable

import torch
from torch.utils.checkpoint import _CheckpointFrame

from graphpass.dispatcher import Choice

# Returns the number of the backward pass that is running; NONE if none is.
backward_pass: Callable[[], int] = torch._C._current_graph_task_id
NONE = -1


class Recomputation:
    """Remembers what was chosen for the calls of each checkpointed region, in order."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._chosen: weakref.WeakKeyDictionary[_CheckpointFrame, list[Choice]]
        self._chosen = weakref.WeakKeyDictionary()
        # Calls seen again so far, by region and by the backward pass that asks for them.
        self._position: weakref.WeakKeyDictionary[_CheckpointFrame, dict[int, int]]
        self._position = weakref.WeakKeyDictionary()

    def choose(self, fresh: Callable[[], Choice]) -> Choice:
        """Return what the first run of this call was given, or a fresh choice for a first run."""
        region, backward = _region(), backward_pass()
        if region is None:
            return fresh()
        if backward == NONE:
            chosen = fresh()
            self._chosen.setdefault(region, []).append(chosen)
            return chosen
        positions = self._position.setdefault(region, {})
        position = positions[backward] = positions.get(backward, -1) + 1
        calls = self._chosen.get(region, [])
        return calls[position] if position < len(calls) else fresh()


def repeats() -> bool:
    """Return whether a checkpoint is running again what was run before."""
    return backward_pass() != NONE and _region() is not None


def _region() -> _CheckpointFrame | None:
    """Return what a non-reentrant checkpoint keeps of the region that is running, if one is.

    It is the same object in the forward pass and in the recomputation: a variable that the
    checkpoint's hook on saved tensors closes over, here as it is and there weakly (torch 2.11 to
    2.13). A reentrant checkpoint runs its first forward without gradients, so the second one is
    the only one that counts.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    pack = torch._dynamo.eval_frame.innermost_fn(hooks[0])
    for cell in getattr(pack, "__closure__", None) or ():
        value = cell.cell_contents
        value = value() if isinstance(value, weakref.ref) else value
        if isinstance(value, _CheckpointFrame):
            return value
    return None
