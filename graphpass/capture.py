"""Find out what a graph holds, before anything is decided about it.

Sites exist only in the joint graph, which Inductor's compilation makes; so a compilation is
started, what is needed is written down where the joint graph passes by, and the compilation is
abandoned before the expensive part. The result is remembered on disk: in the next process the
compiled graphs come from Inductor's own cache, and nothing is traced at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
from torch.fx import Graph, GraphModule, Node

from graphpass import fingerprint, joint_graph, traffic
from graphpass.dependence import Flow, flow_of
from graphpass.ends import Ends, ends_of
from graphpass.site import PathOf, Site, find_sites


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of one training graph.

    Attributes:
        sites: every product, in the order of the joint graph.
        hints: value of each symbolic size in the example inputs.
        saved_bytes: bytes kept from forward to backward by the exact graph, parameters left out.
        variants: the same for every approximate variant compiled so far, by its identity.
        flow: which gradient enters which product; see `graphpass.dependence`.
        ends: which parameters weight gradients are the gradients of; see `graphpass.ends`.
        remembered: whether it was read from disk.
        rest_bytes: bytes read and written by each kernel of a step that computes no product, for
            the sizes of the example inputs.
        device: type of device that it runs on.
        nested: whether nothing was looked at, as the graph has regions that are compiled apart.
    """

    sites: tuple[Site, ...]
    hints: dict[str, int] = field(default_factory=dict)
    saved_bytes: int = 0
    variants: dict[str, int] = field(default_factory=dict)
    flow: Flow = ()
    ends: Ends = ()
    nested: bool = False
    remembered: bool = False
    rest_bytes: tuple[int, ...] = ()
    device: str = "cpu"

    @property
    def layers(self) -> int:
        """Number of layers of the graph."""
        return max((site.layer for site in self.sites), default=0)


class _Captured(Exception):
    """Ends the compilation that was started for its joint graph alone."""


class UserPasses:
    """The joint passes that the user configured: ours would take their place, so it calls them."""

    def __init__(self, patches: dict[str, Any]) -> None:
        """Find the passes.

        Args:
            patches: Inductor configuration asked for by the user.
        """
        name = "joint_custom_pre_pass"
        given = patches.get(name, getattr(torch._inductor.config, name))
        several = isinstance(given, (list, tuple))
        self.passes: list[Any] = list(given) if several else [given] if given else []

    def __call__(self, graph: Graph) -> None:
        """Run the passes in order."""
        for user_pass in self.passes:
            user_pass(graph)

    def uuids(self) -> list[Any] | None:
        """Return the identities of the passes; None if one of them has none."""
        uuids = [getattr(user_pass, "uuid", lambda: None)() for user_pass in self.passes]
        return None if None in uuids else uuids


class _SiteRecorder(CustomGraphPass):
    """Writes down the sites of the joint graph."""

    def __init__(self, users: UserPasses, parameters: frozenset[int], path_of: PathOf) -> None:
        self.users = users
        self.parameters = parameters
        self.path_of = path_of
        self.sites: tuple[Site, ...] = ()
        self.hints: dict[str, int] = {}
        self.rest_bytes: tuple[int, ...] = ()
        self.device = "cpu"
        self.flow: Flow = ()
        self.ends: Ends = ()

    def __call__(self, graph: Graph) -> None:
        self.users(graph)
        self.rest_bytes = traffic.kernel_bytes(graph)
        self.device = _device(graph)
        self.sites = find_sites(graph, self.parameters, self.path_of)
        self.flow = flow_of(graph, self.sites, self.parameters)
        self.ends = ends_of(graph, self.sites, self.parameters)
        self.hints = _hints(graph)

    def uuid(self) -> str:
        return f"graphpass-capture-{fingerprint.source_digest()}"


class SavedBytes(CustomPartitionerFn):
    """Inductor's own partitioner, with a note of what it keeps for backward.

    Attributes:
        count: bytes kept, set once the partitioner has run; None before.
    """

    def __init__(
        self,
        patches: dict[str, Any],
        parameters: frozenset[int],
        then: Callable[[], None] | None = None,
    ) -> None:
        """Wrap the partitioner that the user configured, or else Inductor's default.

        Args:
            patches: Inductor configuration asked for by the user.
            parameters: positions of the parameters among the example inputs.
            then: called when the number is known.
        """
        self.parameters = parameters
        self.then = then
        self.count: int | None = None
        name = "custom_partitioner_fn"
        self.wrapped = patches.get(name, getattr(torch._inductor.config, name))

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        """Partition, and count the bytes of what the forward part hands to the backward part."""
        from torch._functorch.partitioners import (
            min_cut_rematerialization_partition,
        )

        partition = self.wrapped or min_cut_rematerialization_partition
        forward, backward = partition(gm, joint_inputs, **kwargs)
        self.count = _saved_bytes(forward.graph, kwargs["num_fwd_outputs"], self.parameters)
        if self.then is not None:
            self.then()
        return forward, backward

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Stand for the identity alone: Inductor pickles its configuration to make cache keys."""
        return str, (str(self.uuid()),)

    def uuid(self) -> str | None:
        """Return the identity of the wrapped partitioner; the count changes nothing."""
        if self.wrapped is None:
            return "graphpass-saved-bytes"
        wrapped = self.wrapped.uuid()
        return None if wrapped is None else f"graphpass-saved-bytes-{wrapped}"


def analyse(
    gm: GraphModule,
    compile_copy: Callable[[dict[str, Any]], object],
    patches: dict[str, Any],
    parameters: frozenset[int],
    path_of: PathOf,
) -> Analysis | None:
    """Return what the joint graph of `gm` holds, or None if nothing is trained in it.

    Args:
        gm: the graph that Dynamo handed to the backend; not changed.
        compile_copy: compiles a copy of it under the given Inductor configuration.
        patches: Inductor configuration asked for by the user.
        parameters: positions of the parameters among the example inputs.
        path_of: maps a traced module path to the path that the user knows.
    """

    def stop() -> None:
        raise _Captured

    recorder = _SiteRecorder(UserPasses(patches), parameters, path_of)
    partitioner = SavedBytes(patches, parameters, then=stop)
    ours = {"joint_custom_pre_pass": recorder, "custom_partitioner_fn": partitioner}
    try:
        compile_copy({**patches, **ours})
    except _Captured:
        assert partitioner.count is not None
        return Analysis(
            recorder.sites,
            recorder.hints,
            partitioner.count,
            rest_bytes=recorder.rest_bytes,
            device=recorder.device,
            flow=recorder.flow,
            ends=recorder.ends,
        )
    return None


def has_nested_regions(gm: GraphModule) -> bool:
    """Return whether `gm` holds control flow or regions that are compiled on their own.

    A checkpointed region is none of these: it is inlined into the joint graph.
    """
    from torch._higher_order_ops.wrap import tag_activation_checkpoint

    return any(
        isinstance(node.target, torch._ops.HigherOrderOperator)
        and node.target is not tag_activation_checkpoint
        and any(_is_region(argument) for argument in node.all_input_nodes)
        for node in gm.graph.nodes
    )


def _is_region(argument: Node) -> bool:
    return argument.op == "get_attr" and isinstance(
        getattr(argument.graph.owning_module, str(argument.target), None), GraphModule
    )


def _device(graph: Graph) -> str:
    """Return the type of device that most inputs of a graph are on."""
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    types = [value.device.type for value in values if isinstance(value, torch.Tensor)]
    return max(sorted(set(types)), key=types.count, default="cpu")


def _hints(graph: Graph) -> dict[str, int]:
    hints = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                hints[str(size.node.expr)] = int(size.node.hint)
    return hints


def _saved_bytes(forward: Graph, user_outputs: int, parameters: frozenset[int]) -> int:
    """Return the bytes of distinct storages that the forward part keeps for backward."""
    kept = {
        joint_graph.storage_of(value)
        for value in joint_graph.output_values(forward)[user_outputs:]
        if isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)
    }
    return sum(
        _bytes(node)
        for node in kept
        if not (node.op == "placeholder" and joint_graph.input_index(node) in parameters)
    )


def _bytes(node: Node) -> int:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= size if isinstance(size, int) else int(size.node.hint)
    return count * value.dtype.itemsize
