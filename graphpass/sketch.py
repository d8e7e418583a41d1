"""The noise of the batch: how much the gradient differs between consecutive steps.

V = E|g - E g|^2 is half of E|g_t - g_(t-1)|^2, as the batches of two steps are independent and the
weights nearly the same. (The two halves of one batch will not do: behind BatchNorm the samples'
contributions cancel by construction.) A fixed random subset of every parameter's entries stands for
all of them: a few thousand numbers, gathered by hooks that exist only while this is measured.
"""

import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Entries of a matrix or kernel, and of a vector, whose share of the gradient is small.
_OF_MATRIX, _OF_VECTOR = 192, 32


class Sketch:
    """Gathers entries of gradients, and adds up the differences of consecutive ones.

    Attributes:
        positions: the parameters, in order.
        pairs: number of pairs of consecutive gradients so far.
    """

    def __init__(self, parameters: Mapping[int, Tensor]) -> None:
        """Choose the entries; gather nothing yet.

        Args:
            parameters: what is trained, by any number.
        """
        self.positions = tuple(parameters)
        self.pairs = 0
        self._index: dict[int, tuple[Tensor, ...]] = {}
        self._place: dict[int, slice] = {}
        self._size = {position: parameter.numel() for position, parameter in parameters.items()}
        start = 0
        for position, parameter in parameters.items():
            entries = _entries(parameter, position)
            count = max(1, entries[0].numel())
            self._index[position] = entries
            self._place[position] = slice(start, start + count)
            start += count
        device = next(iter(parameters.values())).device
        self._row = torch.full((start,), torch.nan, device=device)
        self._last = self._row.clone()
        # Of every entry: halves of squared differences, squares, and how many of them.
        self._sums = torch.zeros(3, start, dtype=torch.float64, device=device)
        self._arrived = False
        self._failure: Exception | None = None
        self._hooks: list[Any] = []

    @property
    def is_open(self) -> bool:
        """Whether gradients are being gathered."""
        return bool(self._hooks)

    def open(self, parameters: Mapping[int, Tensor]) -> None:
        """Begin to gather the gradients of the parameters it was made for."""
        for position in self.positions:
            parameter = parameters[position]
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(partial(self._in_backward, position)))

    def close(self) -> None:
        """Gather no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def gather(self, position: int, grad: Tensor) -> None:
        """Take the chosen entries of the gradient of a parameter."""
        if type(grad) is not Tensor or grad.layout != torch.strided:
            return
        values = grad.detach() if grad.dim() else grad.detach()[None]
        self._row[self._place[position]] = values[self._index[position]].float()
        self._arrived = True

    def _in_backward(self, position: int, grad: Tensor) -> None:
        """Gather; what fails would come up in the user's backward pass, and is kept for `fold`."""
        try:
            self.gather(position, grad)
        except Exception as error:
            self._failure = error

    def fold(self) -> None:
        """Add what the last backward pass brought, if there was one, to the sums.

        What is not finite, or has not arrived, makes no pair. What failed while it was gathered is
        raised here.
        """
        if self._failure is not None:
            raise self._failure
        if not self._arrived:
            return
        difference = (self._row - self._last).double()
        valid = difference.isfinite()
        terms = torch.stack([difference.square() / 2, self._row.double().square(), valid.double()])
        self._sums += torch.where(valid, terms, 0.0)
        self._row, self._last = torch.full_like(self._row, torch.nan), self._row
        self._arrived = False
        self.pairs += 1

    def result(self) -> Tensor:
        """Return, of each parameter, V, mean |g|^2, and the number of pairs: float64 [3 P]."""
        rows = []
        for position in self.positions:
            half, square, pairs = self._sums[:, self._place[position]].sum(1).unbind()
            size = self._size[position]
            rows.append(torch.stack([half * size / pairs, square * size / pairs, pairs]))
        return torch.cat(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as lists of numbers, with what the last backward pass brought."""
        self.fold()
        return {"sums": self._sums.tolist(), "last": self._last.tolist(), "pairs": self.pairs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the sums of another sketch of the same parameters."""
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._last.copy_(torch.tensor(state["last"]))
        self.pairs = state["pairs"]


def values_of(result: Iterable[float]) -> list[tuple[float, float]]:
    """Return V and mean |g|^2 of each parameter from the numbers of `Sketch.result`.

    A parameter without a pair of gradients has neither.
    """
    numbers = list(result)
    triples = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    return [(half, square) if pairs else (0.0, 0.0) for half, square, pairs in triples]


def _entries(parameter: Tensor, position: int) -> tuple[Tensor, ...]:
    """Return the same entries of a parameter in every run, as an index; all of a small one."""
    count = min(parameter.numel(), _OF_MATRIX if parameter.dim() > 1 else _OF_VECTOR)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{position}".encode()))
    flat = torch.randint(parameter.numel(), (count,), generator=generator)
    if count == parameter.numel():
        flat = torch.arange(count)
    shape = parameter.shape or torch.Size((1,))
    return tuple(index.to(parameter.device) for index in torch.unravel_index(flat, shape))
