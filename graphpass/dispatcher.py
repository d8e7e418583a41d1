"""The function that Dynamo sees in place of a graph: it runs one of the compiled variants.

Switching is a dictionary lookup on the host, so it needs no retracing, no guard and no
synchronisation. A variant that is compiled while training runs, and cannot be, is no reason to lose
the run: the exact one runs instead.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from graphpass.sheet import Probe
from graphpass.variants import EXACT, Compiled, Key, Variants, warn_once


class Choice(NamedTuple):
    """What a call of the graph runs.

    Attributes:
        key: the sites that are approximated, or a probe.
        seed: seed of the draws.
        notes: where a probe leaves its numbers.
        step: the step that the call belongs to.
        kept: what the methods of the variant keep from step to step.
    """

    key: Key
    seed: int
    notes: torch.Tensor | None = None
    step: int = 0
    kept: tuple[torch.Tensor, ...] = ()


class Dispatcher:
    """Picks and calls the variant of each step.

    Attributes:
        variants: the compiled variants.
    """

    def __init__(
        self,
        variants: Variants,
        choose: Callable[[Sequence[Any]], Choice],
        compiled: Callable[[], None],
        failed: Callable[[Key, str], None],
        device: torch.device,
        limit: int,
        frozen: bool,
        strict: bool,
    ) -> None:
        """Compile nothing yet.

        Args:
            variants: the variants, some of them compiled.
            choose: returns what a call runs.
            compiled: called after a variant was compiled.
            failed: called with a variant that cannot be compiled, and why.
            device: where the seed input lives.
            limit: most variants that may be compiled.
            frozen: whether no variant may be compiled any more (sizes are symbolic: guards that a
                late compilation finds could not be installed).
            strict: whether a failure raises instead of being answered by the exact variant.
        """
        self.variants = variants
        self._choose = choose
        self._compiled = compiled
        self._failed = failed
        self._device = device
        self._limit = limit
        self.frozen = frozen
        self._strict = strict
        self._refused: set[Key] = set()
        context = variants.context
        self._first_on_fakes = context is not None and context.fakify_first_call

    def __call__(self, *args: Any) -> Any:
        """Run one call of the graph."""
        if self._first_on_fakes:
            return self._run_all_on_fakes(args)
        key, seed, page, step, kept = self._choose(args)
        if not key:
            return self._get(EXACT, args)(*args)
        variant = self._get(key, args)
        if variant is self.variants.compiled.get(EXACT):
            return variant(*args)
        if page is not None:
            return variant(*args, self.seed_tensor(seed), page)
        if kept:
            return variant(*args, *kept, self.seed_tensor(step), self.seed_tensor(seed))
        return variant(*args, self.seed_tensor(seed))

    def compile(self, key: Key, inputs: Sequence[Any]) -> Compiled:
        """Return the compiled variant of a key, as `Variants.compile` does."""
        failed = partial(self._refuse, key)
        return self.variants.compile(key, inputs, self.seed_tensor(0), failed)

    def seed_tensor(self, seed: int) -> torch.Tensor:
        """Return a fresh tensor, as an earlier backward may still read the last one.

        It is filled where it lives: nothing is copied, so nothing is waited for.
        """
        return torch.full((), seed, dtype=torch.int64, device=self._device)

    def _get(self, active: Key, args: Sequence[Any]) -> Compiled:
        variant = self.variants.compiled.get(active)
        if variant is not None:
            return variant
        if active in self._refused or not self._may_compile(active):
            return self._get(EXACT, args)
        try:
            compiled = self.compile(active, self._static(args))
            self._compiled()
            return compiled
        except Exception as error:
            if not active:
                raise
            self._refuse(active, error)
            return self._get(EXACT, args)

    def _refuse(self, key: Key, error: Exception) -> None:
        """Run exactly, from now on, what cannot be compiled, and say so.

        Raises:
            Exception: the error, where that was asked for.
        """
        if self._strict:
            raise error
        self._refused.add(key)
        self.variants.drop(key)
        why = f"a variant could not be compiled and runs exactly instead: {error}"
        self._failed(key, why)
        warn_once(why)

    def _static(self, args: Sequence[Any]) -> Sequence[Any]:
        """Return stand-ins for the inputs whose sizes are constants.

        A compilation at run time has nothing to tell it so, and would take every size of the
        inputs for one that may change.
        """
        context = self.variants.context
        if self.frozen or context is None or context.fake_mode is None:
            return args
        fake = context.fake_mode.from_tensor
        return [fake(x, static_shapes=True) if isinstance(x, torch.Tensor) else x for x in args]

    def _may_compile(self, active: Key) -> bool:
        if not active or (isinstance(active, Probe) and not self.frozen):
            return True
        compiled = self.variants.compiled
        approximate = sum(1 for other in compiled if other and not isinstance(other, Probe))
        if not self.frozen and approximate < self._limit:
            return True
        self._refused.add(active)
        why = "sizes are dynamic" if self.frozen else f"there are {approximate} already"
        warn_once(
            f"the schedule asks for one more combination of approximated layers, but {why}: those "
            "steps are exact. Use a schedule with fewer combinations, or raise max_variants"
        )
        return False

    def _run_all_on_fakes(self, args: Sequence[Any]) -> Any:
        """Run every variant once on fake tensors, as DDP's graph splitting asks of a backend."""
        self._first_on_fakes = False
        context = self.variants.context
        assert context is not None and context.fake_mode is not None
        results = []
        for active, variant in self.variants.compiled.items():
            if isinstance(active, Probe):
                continue
            with context.fake_mode:
                kept = self.variants.fresh_state(active, self._device)
                count = (2 if kept else 1) if active else 0
                added = [*kept, *(self.seed_tensor(0) for _ in range(count))]
            results.append(variant(*args, *added))
        return results[0]
