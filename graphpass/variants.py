"""The compiled variants of one graph: each approximates another set of the planned sites."""

import contextlib
import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

import codegen.kernels  # noqa: F401  (graphs that come out of a cache name our operators)
from codegen import notes
from graphpass import fingerprint
from graphpass.capture import SavedBytes, UserPasses
from graphpass.keeping import slots_of
from graphpass.probe import ProbePass
from graphpass.rescue import or_interpreted
from graphpass.rewrite import Replacement, rewrite, seed_placeholder
from graphpass.sheet import Probe, Sheet, Subject

Compiled = Callable[..., Any]
Active = frozenset[int]
Key = Active | Probe
EXACT: Active = frozenset()


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

    def compile(
        self,
        key: Key,
        inputs: Sequence[Any],
        seed: torch.Tensor,
        failed: Callable[[Exception], None],
    ) -> Compiled:
        """Return the compiled variant that approximates some sites, or that probes.

        Args:
            key: positions in `replacements`, or a probe.
            inputs: example inputs of the graph.
            seed: example of the seed input.
            failed: called where the backward part, which is compiled later, is not exact and cannot
                be compiled.
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
            self.compiled[key] = self.compile_raw(gm, inputs, patches, or_interpreted(failed))
            return self.compiled[key]
        partitioner = SavedBytes(patches, self.parameters)
        if key:
            kept = self.fresh_state(key, seed.device)
            added = {f"approx_state_{i}": tensor for i, tensor in enumerate(kept)}
            if kept:
                added["approx_step"] = torch.zeros_like(seed)
                # A recorded graph would copy these inputs, and write into the copies.
                patches["triton.cudagraphs"] = False
            added["approx_seed"] = seed
            inputs = [*inputs, *added.values()]
            _add_inputs(gm, **added)
            rewriting = RewritePass(self._chosen(key), UserPasses(patches))
            self.log.keys[key] = rewriting.uuid()
            patches |= {
                "joint_custom_pre_pass": rewriting,
                "custom_partitioner_fn": partitioner,
            }
        inner = or_interpreted(failed) if key else compile_fx_inner
        self.compiled[key] = self.compile_raw(gm, inputs, patches, inner)
        self.log.compiled.append(key)
        if partitioner.count is not None:
            self.log.saved_bytes[key] = partitioner.count
        return self.compiled[key]

    def fresh_state(self, key: Active, device: torch.device) -> list[torch.Tensor]:
        """Return what the methods of a variant keep, as it is before the first step."""
        return [slot.fresh(device) for slot in slots_of(self._chosen(key)).values()]

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
            self.drop(key)

    def drop(self, key: Key) -> None:
        """Forget a variant, if it was compiled."""
        self.compiled.pop(key, None)
        if key in self.log.compiled:
            self.log.compiled.remove(key)

    def _chosen(self, numbers: Active) -> list[Replacement]:
        return [self.replacements[i] for i in sorted(numbers)]

    def compile_raw(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        patches: dict[str, Any],
        inner: Callable[..., Any] = compile_fx_inner,
    ) -> Compiled:
        """Compile a graph with Inductor, its parts with `inner`, in a tracing context of its own.

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
            compiled: Any = compile_fx(gm, inputs, inner, config_patches=patches or None)
        if self.context is not None and context is not None and self.context.fw_metadata is None:
            self.context.fw_metadata = context.fw_metadata
        result: Compiled = compiled
        return result


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
