"""The compiled variants of one graph, and the function that picks one of them on every step.

Each variant approximates another set of the planned sites. Dynamo sees one function; switching is
a dictionary lookup on the host, so it needs no retracing, no guard and no synchronisation.
"""

import contextlib
import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

import codegen.kernels  # noqa: F401  (graphs that come out of a cache name our operators)
from codegen import notes
from graphpass import fingerprint
from graphpass.capture import SavedBytes, UserPasses
from graphpass.probe import ProbePass
from graphpass.rewrite import Replacement, rewrite, seed_placeholder
from graphpass.sheet import Probe, Sheet, Subject

Compiled = Callable[..., Any]
Active = frozenset[int]
Key = Active | Probe
EXACT: Active = frozenset()


class Choice(NamedTuple):
    """What a call of the graph runs.

    Attributes:
        key: the sites that are approximated, or a probe.
        seed: seed of the draws.
        notes: where a probe leaves its numbers.
    """

    key: Key
    seed: int
    notes: torch.Tensor | None = None


class RewritePass(CustomGraphPass):
    """Rewrites the joint graph of one variant; its identity enters Inductor's cache keys."""

    def __init__(self, replacements: Sequence[Replacement], users: UserPasses) -> None:
        """Hold what is to be replaced, and the user's own passes."""
        self.replacements = tuple(replacements)
        self.users = users

    def __call__(self, graph: Graph) -> None:
        """Rewrite `graph` after the user's own passes."""
        self.users(graph)
        if any("tangents" in str(node.target) for node in graph.find_nodes(op="placeholder")):
            rewrite(graph, self.replacements, seed_placeholder(graph))

    def uuid(self) -> str | None:
        """Return a hash of plan, code and the user's passes; None if one of those has none."""
        records = [
            (r.site.id, r.site.node, r.site.result, r.method.name, asdict(r.params))
            for r in self.replacements
        ]
        users = self.users.uuids()
        if users is None:
            return None
        text = json.dumps([records, [repr(user) for user in users]], default=str)
        return hashlib.sha256((fingerprint.source_digest() + text).encode()).hexdigest()


@dataclass(slots=True)
class VariantLog:
    """What reports say of the variants; outlives them.

    Attributes:
        compiled: variants in the order they were compiled.
        keys: identity of each, the same in every process; None where it has none.
        saved_bytes: bytes each keeps for backward, where its compilation showed it.
    """

    compiled: list[Active] = field(default_factory=list)
    keys: dict[Active, str | None] = field(default_factory=dict)
    saved_bytes: dict[Active, int] = field(default_factory=dict)


class Variants:
    """Compiles variants of one graph, each once, and keeps them."""

    def __init__(
        self,
        gm: GraphModule,
        patches: dict[str, Any],
        parameters: frozenset[int],
    ) -> None:
        """Hold a private copy of the graph; compile nothing yet.

        Args:
            gm: the graph that Dynamo handed to the backend; copied.
            patches: Inductor configuration asked for by the user.
            parameters: positions of the parameters among the example inputs.
        """
        self.gm = copy_of(gm)
        self.patches = patches
        self.parameters = parameters
        # Every planned site of every caller; a variant is a set of positions in this list.
        self.replacements: list[Replacement] = []
        # What probes look at.
        self.subject = Subject((), tuple(sorted(parameters)))
        self.context = TracingContext.try_get()
        self.compiled: dict[Key, Compiled] = {}
        self.log = VariantLog()

    def adopt_exact(self, compiled: Any) -> None:
        """Take a compiled graph for the exact variant."""
        self.compiled[EXACT] = compiled
        self.log.compiled.append(EXACT)

    def position(self, replacement: Replacement) -> int:
        """Return the number of a replacement of this graph, added where it is new."""
        for number, other in enumerate(self.replacements):
            same = (other.site.node, other.site.result) == (
                replacement.site.node,
                replacement.site.result,
            )
            if same and (other.method, other.params) == (replacement.method, replacement.params):
                return number
        self.replacements.append(replacement)
        return len(self.replacements) - 1

    def sheet(self, probe: Probe) -> Sheet:
        """Return how the notes of a probe are laid out."""
        return self.subject.sheet(len(probe.candidates))

    def compile(self, key: Key, inputs: Sequence[Any], seed: torch.Tensor) -> Compiled:
        """Return the compiled variant that approximates some sites, or that probes.

        Args:
            key: positions in `replacements`, or a probe.
            inputs: example inputs of the graph.
            seed: example of the seed input.
        """
        if key in self.compiled:
            return self.compiled[key]
        gm = copy_of(self.gm)
        patches = dict(self.patches)
        if isinstance(key, Probe):
            page = notes.fresh(self.sheet(key).size, seed.device)
            inputs = [*inputs, seed, page]
            _add_inputs(gm, approx_seed=seed, approx_notes=page)
            users = UserPasses(patches)
            looked_at = self._chosen(key.candidates), self._chosen(key.plan)
            patches["joint_custom_pre_pass"] = ProbePass(*looked_at, self.subject, users)
            # A probe runs for a few steps, and holds every candidate: generating and compiling
            # code for it takes minutes, where calling ATen takes a few of its steps longer.
            patches["fallback_by_default"] = True
            self.compiled[key] = self.compile_raw(gm, inputs, patches)
            return self.compiled[key]
        partitioner = SavedBytes(patches, self.parameters)
        if key:
            inputs = [*inputs, seed]
            _add_inputs(gm, approx_seed=seed)
            rewriting = RewritePass(self._chosen(key), UserPasses(patches))
            self.log.keys[key] = rewriting.uuid()
            patches |= {
                "joint_custom_pre_pass": rewriting,
                "custom_partitioner_fn": partitioner,
            }
        self.compiled[key] = self.compile_raw(gm, inputs, patches)
        self.log.compiled.append(key)
        if partitioner.count is not None:
            self.log.saved_bytes[key] = partitioner.count
        return self.compiled[key]

    def retire(self, in_use: Collection[Active], limit: int) -> None:
        """Drop what no plan runs any more; what was compiled stays in Inductor's cache.

        Args:
            in_use: the sites that each plan approximates.
            limit: most approximate variants; there is room for one more afterwards.
        """
        for key in list(self.compiled):
            if isinstance(key, Probe) and key.plan and key.plan not in in_use:
                del self.compiled[key]
        alive = [key for key in self.log.compiled if key and key in self.compiled]
        old = [key for key in alive if key not in in_use]
        for key in old[: max(0, len(alive) - limit + 1)]:
            del self.compiled[key]
            self.log.compiled.remove(key)

    def _chosen(self, numbers: Active) -> list[Replacement]:
        return [self.replacements[i] for i in sorted(numbers)]

    def compile_raw(
        self, gm: GraphModule, inputs: Sequence[Any], patches: dict[str, Any]
    ) -> Compiled:
        """Compile a graph with Inductor in a tracing context of its own.

        The backward part is compiled late and reads the context it was traced in (which buffers
        were donated to it, for one). With a shared context, one variant would follow what was
        noted for another, and overwrite tensors that the user still holds.
        """
        context = copy.copy(self.context)
        scope: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if context is not None:
            # DDP's own splitting bookkeeping counts one forward and backward a piece.
            context.ddp_optimizer_ctx = None
            scope = tracing(context)
        with scope:
            compiled: Any = compile_fx(gm, inputs, config_patches=patches or None)
        if self.context is not None and context is not None and self.context.fw_metadata is None:
            self.context.fw_metadata = context.fw_metadata
        result: Compiled = compiled
        return result


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
            device: where the seed input lives.
            limit: most variants that may be compiled.
            frozen: whether no variant may be compiled any more (sizes are symbolic: guards that a
                late compilation finds could not be installed).
            strict: whether a failure raises instead of being answered by the exact variant.
        """
        self.variants = variants
        self._choose = choose
        self._compiled = compiled
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
        key, seed, page = self._choose(args)
        if not key:
            return self._get(EXACT, args)(*args)
        variant = self._get(key, args)
        if variant is self.variants.compiled.get(EXACT):
            return variant(*args)
        if page is not None:
            return variant(*args, self.seed_tensor(seed), page)
        return variant(*args, self.seed_tensor(seed))

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
            compiled = self.variants.compile(active, self._static(args), self.seed_tensor(0))
            self._compiled()
            return compiled
        except Exception as error:
            if self._strict or not active:
                raise
            self._refused.add(active)
            warn_once(f"a variant could not be compiled and runs exactly instead: {error}")
            return self._get(EXACT, args)

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
        with context.fake_mode:
            seed = self.seed_tensor(0)
        results = [
            variant(*args, seed) if active else variant(*args)
            for active, variant in self.variants.compiled.items()
            if not isinstance(active, Probe)
        ]
        return results[0]


def copy_of(gm: GraphModule) -> GraphModule:
    """Return a copy that a compilation may consume.

    What Dynamo notes on the inputs (which of them are parameters) is carried over: a plain copy
    loses it.
    """
    new = copy.deepcopy(gm)
    # The reason for a graph break is part of Inductor's cache keys; the sources say which inputs
    # never move.
    for name in ("compile_subgraph_reason", "_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(new, name, getattr(gm, name))
    pairs = zip(
        gm.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"), strict=True
    )
    for old_input, new_input in pairs:
        if hasattr(old_input, "_dynamo_source"):
            new_input._dynamo_source = old_input._dynamo_source
    return new


def warn_once(message: str) -> None:
    """Warn the user; the same message is shown once in a process."""
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(f"graphpass: {message}", UserWarning, stacklevel=2)


_WARNED: set[str] = set()


def _add_inputs(gm: GraphModule, **examples: torch.Tensor) -> None:
    """Add inputs behind the last one."""
    for name, example in examples.items():
        *_, last = gm.graph.find_nodes(op="placeholder")
        with gm.graph.inserting_after(last):
            placeholder = gm.graph.placeholder(name)
        placeholder.meta["example_value"] = example
        # It comes from nowhere in the user's program.
        placeholder._dynamo_source = None
    gm.recompile()
