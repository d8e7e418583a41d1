"""The probe: a training step that also finds out what approximations would add to its gradient.

Its own gradients are the exact ones. Beside each product stand its candidates: their noise by the
method's formula, where that is next to nothing beside the product, or else by drawing the
approximation and comparing. Of a whole plan, the backward pass is computed a second time, with its
approximations, beside the first one; that shows how errors of input gradients arrive at weights.
What is found is left in a tensor (`codegen.notes`), and read when nobody has to wait for it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node
from torch.utils.flop_counter import FlopCounterMode

import codegen.notes  # noqa: F401  (graphs name its operator)
from graphpass import fingerprint, joint_graph, verify
from graphpass.capture import UserPasses
from graphpass.errors import RewriteError
from graphpass.method import no_draw, salt_of
from graphpass.products import Replacement, named_operands, operands_of, result_sizes
from graphpass.shadow import Shadow, distance
from graphpass.sheet import Subject
from graphpass.site import Gradient, Site
from graphpass.splice import splice

# A formula whose products cost less than this share of the exact product is cheaper than a draw.
_CHEAP_FORMULA = 0.1
_OTHER_SEED = 0x3C6EF35F
_SEED_MASK = 0x7FFFFFFF


class ProbePass(CustomGraphPass):
    """Adds to a joint graph what a probe looks at; its identity enters Inductor's cache keys."""

    def __init__(
        self,
        candidates: Sequence[Replacement],
        plan: Sequence[Replacement],
        subject: Subject,
        users: UserPasses,
    ) -> None:
        """Hold what to look at, and the user's own passes."""
        self.candidates = tuple(candidates)
        self.plan = tuple(plan)
        self.subject = subject
        self.users = users

    def __call__(self, graph: Graph) -> None:
        """Change `graph` after the user's own passes."""
        self.users(graph)
        if any("tangents" in str(node.target) for node in graph.find_nodes(op="placeholder")):
            probe(graph, self.candidates, self.plan, self.subject)

    def uuid(self) -> str | None:
        """Return a hash of everything that is looked at, code and the user's passes."""
        records = [
            [
                (r.site.id, r.site.node, r.site.result, r.method.name, asdict(r.params))
                for r in group
            ]
            for group in (self.candidates, self.plan)
        ]
        users = self.users.uuids()
        if users is None:
            return None
        text = json.dumps([records, asdict(self.subject), list(map(repr, users))], default=str)
        return "probe" + hashlib.sha256((fingerprint.source_digest() + text).encode()).hexdigest()


def probe(
    graph: Graph, candidates: Sequence[Replacement], plan: Sequence[Replacement], subject: Subject
) -> None:
    """Add to a joint graph, whose last two inputs are the seed and the notes, what is looked at.

    Args:
        graph: a joint graph, changed in place; what it returns stays the same.
        candidates: looked at one by one.
        plan: looked at together; forward products of it are left exact.
        subject: what is known of the graph.

    Raises:
        RewriteError: if the graph has no such product, or came out malformed.
    """
    before = verify.interface(graph)
    seed, page = _last_inputs(graph)
    nodes = {node.name: node for node in graph.nodes}
    sheet = subject.sheet(len(candidates))
    found: dict[int, Node] = {}
    if plan:
        backward = [r for r in plan if r.site.gradient is not Gradient.FORWARD]
        weights = {(site.node, site.result) for site in subject.weights}
        shadow = Shadow(graph, backward, weights, seed)
        for number, site in enumerate(subject.weights):
            if (site.node, site.result) in shadow.arrived:
                found[sheet.of_weight(number)] = shadow.arrived[site.node, site.result]
        for position, gradient in joint_graph.gradients(graph).items():
            if position in subject.parameters and gradient in shadow.images:
                error = distance(graph, shadow.images[gradient], gradient)
                found[sheet.of_parameter(position)] = error
    for number, candidate in enumerate(candidates):
        if candidate.site.node not in nodes:
            raise RewriteError(f"the graph has no node {candidate.site.node!r}")
        node = nodes[candidate.site.node]
        found[sheet.of_candidate(number)] = _compare(graph, candidate, node, seed)
    _leave(graph, page, found)
    verify.check(graph, before, planned=0, fired=0)


def _last_inputs(graph: Graph) -> tuple[Node, Node]:
    inputs = [
        node for node in graph.find_nodes(op="placeholder") if "tangents" not in str(node.target)
    ]
    return inputs[-2], inputs[-1]


def _compare(graph: Graph, candidate: Replacement, node: Node, seed: Node) -> Node:
    """Return noise and bias of a candidate, the square of its product, and its density: [4]."""
    site, method, params = candidate.site, candidate.method, candidate.params
    exact = _result(node, site)
    operands, _ = operands_of(node)
    sizes = result_sizes(graph, node, site, operands)
    named = named_operands(graph, candidate, operands)
    by_formula = _has_cheap_formula(candidate, named)
    value = joint_graph.value_of(exact)
    dtype, device, rank, salt = value.dtype, value.device, len(sizes), salt_of(site)
    unbiased, deterministic = method.unbiased, method.draw is no_draw

    def draw(seed: Tensor, *args: Any) -> Tensor:
        template = torch.empty((), dtype=dtype, device=device).expand(args[:rank])
        result: Tensor = method.lower(site, params, template, seed, salt, *args[rank:])
        return _wide(result)

    def compare(seed: Tensor, exact: Tensor, *args: Any) -> Tensor:
        exact = _wide(exact)
        square = exact.square().sum()
        nothing, density = torch.zeros_like(square), torch.ones_like(square)
        if method.density is not None:
            density = method.density(site, params, *args[rank:]).to(square.dtype)
        if by_formula:
            assert method.noise is not None
            noise = method.noise(site, params, *map(_wide, args[rank:]))
            return torch.stack([noise.to(square.dtype), nothing, square, density])
        error = draw(seed, *args) - exact
        if unbiased:
            return torch.stack([error.square().sum(), nothing, square, density])
        if deterministic:
            return torch.stack([nothing, error.square().sum(), square, density])
        other = draw((seed + _OTHER_SEED) & _SEED_MASK, *args) - exact
        # Two independent draws: the product of their errors expects the bias, and nothing else.
        noise = (error - other).square().sum() / 2
        return torch.stack([noise, (error * other).sum(), square, density])

    return splice(graph, exact.next, compare, (seed, exact, *sizes, *named), like=exact)


def _result(node: Node, site: Site) -> Node:
    if site.result is None:
        return node
    for user in node.users:
        if user.args[1] == site.result:
            return user
    raise RewriteError(f"{node.format_node()} has no result {site.result}")


def _has_cheap_formula(candidate: Replacement, operands: Sequence[Node]) -> bool:
    """Return whether the noise by formula costs less than a draw."""
    method, site = candidate.method, candidate.site
    if method.noise is None or not method.unbiased:
        return False
    values = [joint_graph.value_of(operand) for operand in operands]
    mode = detect_fake_mode(values)
    assert mode is not None
    with mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        method.noise(site, candidate.params, *map(_wide, values))
    return bool(counter.get_total_flops() < _CHEAP_FORMULA * float(site.cost.flops))


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _leave(graph: Graph, page: Node, found: dict[int, Node]) -> None:
    """Let the smallest gradient carry the numbers out of the graph."""
    gradients = joint_graph.gradients(graph).values()
    carrier = min(gradients, key=lambda node: joint_graph.value_of(node).numel())
    value = joint_graph.value_of(carrier)
    (output,) = graph.find_nodes(op="output")
    name, places = carrier.name, sorted(found)
    operator = torch.ops.approx.leave_notes.default
    with graph.inserting_before(output):
        numbers = [found[place] for place in places]
        new = graph.call_function(operator, (carrier, page, numbers, places))
    mode = detect_fake_mode(value)
    assert mode is not None
    with mode:
        new.meta = {**carrier.meta, "val": torch.empty_like(value)}
    output.replace_input_with(carrier, new)
    # Results are known by their names.
    carrier.name = f"{name}_plain"
    new.name = name
