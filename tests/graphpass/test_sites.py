"""Which products are found in a model, and how they are called: what a user reads in the report.

A product is written (module path, gradient, kind of operation, number of the layer).
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

import graphpass
from graphpass.errors import Reason
from tests.graphpass.nets import NETS, Broken, frozen

Product = tuple[str, str, str, int]

# None of these sizes is 1, which would turn a product into a sum that Inductor does itself.
BATCH = 4

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # Raised, not shown, where warnings are errors: Dynamo looks for gradients on what one piece of
    # a broken graph hands to the next (2.13, torch/_dynamo/variables/builder.py, safe_has_grad).
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run exact graphs as they are: sites are known before Inductor is asked for any code."""

    def forward(gm: GraphModule, inputs: object, config_patches: object = None) -> object:
        return gm.forward

    monkeypatch.setattr("graphpass.backend.compile_fx", forward)


def report_of(model: Callable[..., Any], *inputs: Tensor, **compiling: Any) -> list[graphpass.Row]:
    """Compile a training step, and return the rows of every graph of it."""
    return [row for report in reports_of(model, *inputs, **compiling) for row in report.rows]


def reports_of(
    model: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = None, **options: Any
) -> tuple[graphpass.Report, ...]:
    """Compile a training step, and return the report of every graph of it.

    Args:
        model: module or function.
        inputs: what it is called with.
        dynamic: as `torch.compile` takes it.
        options: options of the backend.
    """
    before = len(graphpass.reports())
    given = {"strict": True, **options}
    torch.compile(model, backend="approx", options=given, dynamic=dynamic)(*inputs)
    return graphpass.reports()[before:]


def products(model: Callable[..., Any], *inputs: Tensor, **compiling: Any) -> list[Product]:
    rows = report_of(model, *inputs, **compiling)
    return sorted((row.where, row.gradient, row.op, row.layer) for row in rows)


def layer(path: str, number: int, forward: str, backward: str | None = None) -> list[Product]:
    """Return the three products of a layer.

    Args:
        path: module path.
        number: number of the layer.
        forward: kind of its forward product.
        backward: kind of the other two, where it is another one.
    """
    return [
        (path, "forward", forward, number),
        (path, "input", backward or forward, number),
        (path, "weight", backward or forward, number),
    ]


def normal(*shape: int) -> Tensor:
    """Return normal values that need a gradient."""
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        pytest.param(lambda: nn.Conv1d(3, 4, 3, bias=False), (2, 3, 9), id="1d"),
        pytest.param(lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 9, 8), id="2d"),
        pytest.param(lambda: nn.Conv3d(3, 4, 3, bias=False), (2, 3, 5, 4, 6), id="3d"),
        pytest.param(lambda: nn.Conv2d(3, 4, 3), (2, 3, 9, 8), id="bias"),
        pytest.param(lambda: nn.Conv2d(3, 4, 3, stride=2), (2, 3, 9, 8), id="strided"),
        pytest.param(lambda: nn.Conv2d(3, 4, 3, dilation=2), (2, 3, 9, 8), id="dilated"),
        pytest.param(lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 9, 8), id="grouped"),
        pytest.param(lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 8), id="depthwise"),
        pytest.param(lambda: nn.Conv2d(3, 4, 3), (3, 9, 8), id="unbatched"),
        pytest.param(
            lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, bias=False), (2, 3, 9), id="transposed_1d"
        ),
        pytest.param(
            lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2),
            (2, 4, 5, 6),
            id="transposed_2d_grouped",
        ),
    ],
)
def test_convolutions(module: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    assert products(nn.Sequential(module()), normal(*shape)) == layer("0", 1, "convolution")


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize(("bias", "forward"), [(True, "addmm"), (False, "mm")])
def test_linear_layers(shape: tuple[int, ...], bias: bool, forward: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=bias))
    assert products(model, normal(*shape)) == layer("0", 1, forward, "mm")


class Scaled(nn.Module):
    """Any function of the inputs, in a model that has something to train."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs) * self.scale


class Weighted(nn.Module):
    """Any function of a weight `[*shape]` and the inputs."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.weight, *inputs)


@pytest.mark.parametrize(
    ("function", "shapes", "forward", "backward"),
    [
        pytest.param(torch.bmm, [(2, 3, 4), (2, 4, 5)], "bmm", "bmm", id="bmm"),
        pytest.param(
            torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], "baddbmm", "bmm", id="baddbmm"
        ),
        pytest.param(torch.matmul, [(3, 4), (4, 5)], "mm", "mm", id="matmul_2d"),
        pytest.param(torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 2)], "bmm", "bmm", id="matmul_4d"),
        pytest.param(
            lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b),
            [(2, 3, 5, 4), (2, 3, 6, 4)],
            "bmm",
            "bmm",
            id="einsum",
        ),
        pytest.param(lambda a: a @ a.mT, [(4, 5)], "mm", "mm", id="with_itself"),
    ],
)
def test_products_of_activations(
    function: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    forward: str,
    backward: str,
) -> None:
    """Both gradients are passed on to what came before."""
    found = products(Scaled(function), *(normal(*shape) for shape in shapes))
    assert found == [
        ("(model)", "forward", forward, 1),
        ("(model)", "input", backward, 1),
        ("(model)", "input", backward, 1),
    ]


@pytest.mark.parametrize(
    ("function", "weight", "x", "op"),
    [
        pytest.param(lambda w, x: x @ w, (4, 3), (5, 4), "mm", id="right"),
        pytest.param(lambda w, x: w @ x, (3, 4), (4, 5), "mm", id="left"),
        pytest.param(lambda w, x: F.linear(x, w), (3, 4), (5, 4), "mm", id="transposed"),
        pytest.param(lambda w, x: torch.bmm(x, w), (2, 4, 3), (2, 5, 4), "bmm", id="bmm"),
        pytest.param(
            lambda w, x: torch.einsum("bti,oi->bto", x, w), (3, 4), (2, 5, 4), "bmm", id="einsum"
        ),
    ],
)
def test_weight_on_either_side(
    function: Callable[..., Tensor], weight: tuple[int, ...], x: tuple[int, ...], op: str
) -> None:
    """The gradient of the parameter is the weight gradient, wherever the parameter stands."""
    model = Weighted(function, *weight)
    assert products(model, normal(*x)) == layer("(model)", 1, op)


def test_fused_attention() -> None:
    """One operation that no method can take apart; a method that asks for it is told so."""
    net = NETS["transformer"]
    asked = {"layers.0.attention": {"name": "zero", "gradient": "input"}}
    rows = report_of(net.build(), *net.batch(BATCH), methods=asked)
    fused = [row for row in rows if row.op == "attention"]
    assert [(row.where, row.gradient) for row in fused] == [
        ("layers.0.attention", "forward"),
        ("layers.0.attention", "input"),
    ]
    assert fused[1].reason == Reason.FUSED.value
    assert all(row.method == "exact" for row in rows)


def test_fused_attention_says_so_unasked() -> None:
    net = NETS["transformer"]
    rows = report_of(net.build(), *net.batch(BATCH))
    (backward,) = (row for row in rows if row.op == "attention" and row.gradient == "input")
    assert backward.reason == Reason.FUSED.value


def test_attention_that_is_not_fused() -> None:
    """With dropout it is two products forward, and two backward for each of them."""
    net = NETS["transformer_dropout"]
    found = products(net.build(), *net.batch(BATCH))
    # Scores and values; both follow the one layer with a weight that is there so far.
    assert [product for product in found if product[2] == "bmm"] == sorted(
        (f"layers.0.attention#{use}", gradient, "bmm", 1)
        for use in (1, 2)
        for gradient in ("forward", "input", "input")
    )


# Paths, numbers of layers, numbers of uses.


def test_nested_containers() -> None:
    """Paths are those of `named_modules`, layers are numbered as forward runs."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.ReLU())
            self.listed = nn.ModuleList([nn.ModuleDict({"deep": nn.Linear(4, 5, bias=False)})])
            self._private = nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self._private(self.listed[0]["deep"](self.first(x)))
            return y

    assert products(Nested(), normal(7, 3)) == sorted(
        layer("first.0.0", 1, "addmm", "mm")
        + layer("listed.0.deep", 2, "mm")
        + layer("_private", 3, "addmm", "mm")
    )


def test_layers_are_numbered_as_forward_runs() -> None:
    """Not as the model lists its modules."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(self.b(x))
            return y

    expected = layer("a", 2, "addmm", "mm") + layer("b", 1, "addmm", "mm")
    assert products(Backwards(), normal(7, 3)) == expected


def test_function_around_a_model() -> None:
    """Paths are the model's, where a function is compiled that calls it."""
    model = nn.Sequential(nn.Linear(3, 4))
    assert products(lambda x: model(x).sin(), normal(7, 3)) == layer("0", 1, "addmm", "mm")


def test_module_compiled_in_place() -> None:
    before = len(graphpass.reports())
    net = NETS["conv_only"]
    model = net.build()
    model.compile(backend="approx", options={"strict": True})
    model(*net.batch(BATCH))
    (report,) = graphpass.reports()[before:]
    assert {(row.where, row.layer) for row in report.rows} == {
        ("conv1", 1),
        ("conv2", 2),
        ("conv3", 3),
    }


def test_graph_break() -> None:
    """Each piece has a report; paths are full, and layers go on counting."""
    net = NETS["graph_break"]
    reports = reports_of(net.build(), *net.batch(BATCH))
    found = [
        sorted((row.where, row.gradient, row.op, row.layer) for row in report.rows)
        for report in reports
    ]
    assert found == [
        [("first", "forward", "convolution", 1), ("first", "weight", "convolution", 1)],
        layer("blocks.broken.before", 2, "convolution"),
        layer("blocks.broken.after", 3, "convolution"),
        layer("fc", 4, "addmm", "mm"),
    ]


def test_blocks_of_a_class_have_their_own_decisions() -> None:
    """Two blocks, both broken: Dynamo traces the second one's code no more than once."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Broken(), Broken()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Blocks()
    reports = reports_of(model, normal(BATCH, 4, 8, 8), methods={"blocks.1.before": "zero"})
    rows = [row for report in reports for row in report.rows]
    assert {row.where for row in rows if row.method != "exact"} == {"blocks.1.before"}
    assert {row.layer for row in rows} == {1, 2, 3, 4}


def test_module_called_twice() -> None:
    """Its uses are numbered as forward runs, in all three products."""
    net = NETS["tied"]
    assert products(net.build(), *net.batch(BATCH)) == sorted(
        layer("shared#1", 1, "addmm", "mm")
        + layer("shared#2", 2, "addmm", "mm")
        + layer("head", 3, "mm")
    )


def test_uses_that_lack_a_gradient() -> None:
    """The first hidden state is constant: the input gradients are those of the later uses."""
    net = NETS["lstm"]
    found = products(net.build(), *net.batch(BATCH))
    assert found == sorted(
        [
            *layer("fc", 7, "addmm", "mm"),
            *layer("cell.from_hidden#2", 4, "mm"),
            *layer("cell.from_hidden#3", 6, "mm"),
            ("cell.from_hidden#1", "forward", "mm", 2),
            ("cell.from_hidden#1", "weight", "mm", 2),
        ]
        + [(f"cell.from_input#{use}", "forward", "addmm", 2 * use - 1) for use in (1, 2, 3)]
        + [(f"cell.from_input#{use}", "weight", "mm", 2 * use - 1) for use in (1, 2, 3)]
    )


def test_products_of_several_kinds_in_one_module() -> None:
    """The projections and the attention of torch's own layer are told apart alike."""
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    found = products(model, normal(2, 5, 8))
    assert [product for product in found if product[0].startswith("self_attn")] == sorted(
        [
            *layer("self_attn#1", 1, "mm"),
            ("self_attn#2", "forward", "attention", 1),
            ("self_attn#2", "input", "attention", 1),
            *layer("self_attn#3", 2, "addmm", "mm"),
        ]
    )


def test_input_that_needs_no_gradient() -> None:
    assert products(nn.Sequential(nn.Linear(3, 4)), torch.randn(7, 3)) == [
        ("0", "forward", "addmm", 1),
        ("0", "weight", "mm", 1),
    ]


def test_frozen_layer() -> None:
    """It passes the gradient on, and has none of its own."""
    assert products(frozen(), *NETS["frozen"].batch(BATCH)) == sorted(
        [
            ("conv1", "forward", "convolution", 1),
            ("conv1", "weight", "convolution", 1),
            ("conv2", "forward", "convolution", 2),
            ("conv2", "input", "convolution", 2),
            *layer("conv3", 3, "convolution"),
        ]
    )


def test_model_that_trains_nothing() -> None:
    """Nothing is planned, and nothing reported, for a model without gradients."""
    model = nn.Sequential(nn.Linear(3, 4)).requires_grad_(False)
    assert reports_of(model, torch.randn(7, 3)) == ()


def conv_and_linear() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))


def test_autocast() -> None:
    """In bfloat16 the products are the same, on half the bytes."""
    x = normal(7, 3, 5, 5)
    exact = report_of(conv_and_linear(), x)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        cast = report_of(conv_and_linear(), x)
    named = [
        [(row.where, row.gradient, row.op, row.layer) for row in rows] for rows in (exact, cast)
    ]
    assert sorted(named[0]) == sorted(named[1])
    assert sorted(named[0]) == layer("0", 1, "convolution") + layer("3", 2, "addmm", "mm")
    assert sum(row.exact_flops for row in cast) == sum(row.exact_flops for row in exact)
    assert 2 * sum(row.exact_bytes for row in cast) == sum(row.exact_bytes for row in exact)


def test_dynamic_sizes() -> None:
    """Symbols are named with the value they have in the example, and FLOPs are those of it."""
    x = normal(7, 3, 5, 5)
    (static,) = reports_of(conv_and_linear(), x)
    torch._dynamo.reset()
    (dynamic,) = reports_of(conv_and_linear(), x, dynamic=True)
    assert static.sizes == {}
    assert set(dynamic.sizes.values()) == {7, 5}
    assert figures(dynamic) == figures(static)


def figures(report: graphpass.Report) -> Mapping[tuple[str, str], tuple[int, int]]:
    return {(row.where, row.gradient): (row.exact_flops, row.exact_bytes) for row in report.rows}


# Torch counts a weight gradient as if every input channel met every output channel; in a grouped
# convolution they meet in groups only (see tests/cost_model/test_cost_convolution.py).
GROUPS = {"separable": {"depthwise": 4, "grouped": 2}}


@pytest.mark.parametrize(
    "name", ["cnn2", "resnet8", "unet", "separable", "mlp", "lstm", "tied", "frozen", "graph_break"]
)
def test_flops_are_those_of_a_step_in_eager_mode(name: str) -> None:
    net = NETS[name]
    model, batch = net.build(), net.batch(BATCH)
    with FlopCounterMode(display=False) as counter:
        model(*batch).sum().backward()
    rows = report_of(model, *batch, budget=0)
    groups = GROUPS.get(name, {})
    counted = [
        row.exact_flops * (groups.get(row.where, 1) if row.gradient == "weight" else 1)
        for row in rows
    ]
    assert sum(counted) == counter.get_total_flops()
    assert all(row.planned_flops == row.exact_flops for row in rows)
