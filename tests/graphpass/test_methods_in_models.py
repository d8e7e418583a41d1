"""Methods that the user forces do what they say, in whole models: to gradients, and to memory.

Gradients are compared with those of eager mode in float64. B batch, P positions of a map, C
channels, k kept positions.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphpass
from tests.graphpass.nets import NETS, Batch, ConvOnly, Net

Gradients = Mapping[str, Tensor]

BATCH = 4


# What is tested here are graphs, not the loops that Inductor writes for them.
pytestmark = pytest.mark.usefixtures("interpreted")


def compile_with(model: nn.Module, **options: Any) -> nn.Module:
    compiled: nn.Module = torch.compile(
        model, backend="approx", options={"strict": True, **options}
    )
    return compiled


def backward(model: nn.Module, batch: Batch) -> None:
    """Take the gradients of a loss, from zero."""
    model.zero_grad()
    model(*batch).square().mean().backward()


def gradients(model: nn.Module) -> Gradients:
    return {
        name.removeprefix("_orig_mod."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def double(values: Batch) -> Batch:
    return tuple(value.double() if value.is_floating_point() else value for value in values)


def build_twice(net: Net) -> tuple[nn.Module, nn.Module]:
    """Return a model, and the same one in float64."""
    model, reference = net.build(), net.build()
    reference.load_state_dict(model.state_dict())
    return model, reference.double()


def rounding(model: nn.Module, batch: Batch) -> float:
    """Return a bound on the relative error of the gradients of `model` in float32.

    A sum has an error of at most its length times the unit of rounding; forward and backward, the
    errors of the layers add up.
    """
    terms = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal terms
        (x,) = inputs
        axis = -1 if isinstance(module, nn.Linear) else 1
        channels_in, channels_out = x.shape[axis], output.shape[axis]
        # Outputs and input gradients are sums over channels and taps; those of weights, and the
        # moments of a norm, over samples and positions.
        terms += 2 * max(channels_in, channels_out) * module.weight[0, 0].numel()
        terms += x.numel() // channels_in + output.numel() // channels_out

    leaves = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    hooks = [leaf.register_forward_hook(count) for leaf in leaves]
    model(*batch)
    for hook in hooks:
        hook.remove()
    return terms * torch.finfo(torch.float32).eps


def assert_gradients(got: Gradients, expected: Gradients, bound: float) -> None:
    """Compare gradients in the norm; what is expected to be zero must be zero in every bit."""
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        error = (got[name].double() - exact).norm()
        assert error <= bound * exact.norm(), name


def zeroed(exact: Gradients, *names: str) -> Gradients:
    assert all(exact[name].count_nonzero() for name in names)
    return {
        name: torch.zeros_like(value) if name in names else value for name, value in exact.items()
    }


# Zero.


@pytest.mark.parametrize(
    ("name", "methods", "zero"),
    [
        pytest.param(
            "separable",
            {"pointwise": "zero", "fc": "zero"},
            ["pointwise.weight", "fc.weight"],
            id="behind_norms",
        ),
        pytest.param(
            "separable",
            {"depthwise": "zero", "g*": {"name": "zero", "gradient": "weight"}},
            ["depthwise.weight", "grouped.weight"],
            id="grouped",
        ),
        pytest.param("unet", {"up": "zero"}, ["up.weight"], id="transposed"),
        pytest.param("mlp", {"2": "zero"}, ["2.weight"], id="linear"),
        pytest.param("frozen", {"*": "zero"}, ["conv1.weight", "conv3.weight"], id="frozen"),
        pytest.param("checkpointed", {"block.0": "zero"}, ["block.0.weight"], id="checkpointed"),
    ],
)
def test_zero_weight_gradient(name: str, methods: Mapping[str, object], zero: list[str]) -> None:
    """The named layers get zeros, and all other gradients are exact."""
    net = NETS[name]
    model, reference = build_twice(net)
    batch = net.batch(BATCH)
    backward(reference, double(batch))
    bound = rounding(model, batch)
    compiled = compile_with(model, methods=methods)
    backward(compiled, batch)
    assert_gradients(gradients(compiled), zeroed(gradients(reference), *zero), bound)


def test_zero_input_gradient() -> None:
    """What lies behind the layer gets nothing along this path, and all of it along others."""
    net = NETS["unet"]
    model, reference = build_twice(net)
    batch = net.batch(BATCH)
    reference.up.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
    backward(reference, double(batch))
    bound = rounding(model, batch)
    compiled = compile_with(model, methods={"up": {"name": "zero", "gradient": "input"}})
    backward(compiled, batch)
    behind = {
        f"{layer}.{kind}": torch.zeros_like(model.get_parameter(f"{layer}.{kind}")).double()
        for layer in ("down", "middle")
        for kind in ("weight", "bias")
    }
    assert_gradients(gradients(compiled), {**gradients(reference), **behind}, bound)


def test_zero_for_one_use_of_a_layer() -> None:
    """Of a layer that is called twice, the gradient of the other call is left."""
    net = NETS["tied"]
    model, reference = build_twice(net)
    batch = net.batch(BATCH)
    calls = []

    def detach_first(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.append(module)
        if len(calls) > 1:
            return output
        return F.linear(inputs[0], module.weight.detach(), module.bias)

    reference.shared.register_forward_hook(detach_first)
    backward(reference, double(batch))
    bound = rounding(model, batch)
    compiled = compile_with(model, methods={"shared#1": "zero"})
    backward(compiled, batch)
    assert_gradients(gradients(compiled), gradients(reference), bound)


def test_zero_after_exact_steps_and_before_them() -> None:
    """Both variants compile when their first step comes, behind a norm as well."""
    net = NETS["separable"]
    for until, is_zero in ((0, [False, True, True]), (2, [True, True, False])):
        torch._dynamo.reset()
        schedule = graphpass.Schedule.until(until) if until else None
        options = {"schedule": schedule, "warmup_steps": 0 if until else 1}
        model = compile_with(net.build(), methods={"pointwise": "zero"}, **options)
        seen = []
        for _ in is_zero:
            backward(model, net.batch(BATCH))
            seen.append(not gradients(model)["pointwise.weight"].any())
        assert seen == is_zero


def test_zero_in_a_model_that_was_evaluated_first() -> None:
    """The first call decides nothing: in training mode the plan applies."""
    net = NETS["conv_only"]
    model = compile_with(net.build().eval(), methods={"conv2": "zero"})
    backward(model, net.batch(BATCH))
    assert gradients(model)["conv2.weight"].any()
    model.train()
    backward(model, net.batch(BATCH))
    assert not gradients(model)["conv2.weight"].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_zero_below_a_checkpoint(reentrant: bool) -> None:
    """The plan applies where the forward pass that counts is the one that backward repeats."""
    net = NETS["conv_only"]
    model, reference = build_twice(net)
    (x,) = net.batch(BATCH)
    backward(reference, (x.double(),))
    bound = rounding(model, (x,))
    compiled = compile_with(model, methods={"conv2": "zero"})
    y = checkpoint(compiled, x.requires_grad_(), use_reentrant=reentrant)
    y.square().mean().backward()
    assert_gradients(gradients(compiled), zeroed(gradients(reference), "conv2.weight"), bound)
    assert graphpass.session(compiled).step == 1


# Random.


class Drawn(nn.Module):
    """A convolution and two linear layers of one shape, applied to every pixel: `[B, P, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 48, 3)
        self.first = nn.Linear(48, 48)
        self.second = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        pixels = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)
        y: Tensor = self.second(torch.tanh(self.first(pixels)))
        return y


def drawn(steps: int, methods: Mapping[str, object], **options: Any) -> list[Gradients]:
    """Return the gradients of so many steps of a fresh model, whose parameters stay as they are."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = compile_with(Drawn(), methods=methods, **options)
    batch = (torch.randn(BATCH, 8, 5, 5),)
    seen = []
    for _ in range(steps):
        backward(model, batch)
        seen.append(gradients(model))
    return seen


def assert_normal(values: Tensor, std: float) -> None:
    """Check mean and standard deviation, to five standard errors of either."""
    count = values.numel()
    assert abs(values.mean().item()) < 5 * std / math.sqrt(count)
    assert abs(values.std().item() / std - 1) < 5 / math.sqrt(2 * count)


def assert_unrelated(one: Tensor, other: Tensor) -> None:
    """Check that the correlation is within five standard errors of none."""
    correlation = F.cosine_similarity(one.flatten(), other.flatten(), dim=0)
    assert abs(correlation.item()) < 5 / math.sqrt(one.numel())


def test_random_weight_gradient() -> None:
    """Normal, with a deviation of 1 / batch; new on every step and in every layer."""
    methods = {"*": "random", "second": {"name": "random", "std": 0.5}}
    first, second = drawn(2, methods)
    rows = BATCH * 3 * 3
    for step in (first, second):
        assert_normal(step["conv.weight"], 1 / BATCH)
        assert_normal(step["first.weight"], 1 / rows)
        assert_normal(step["second.weight"], 0.5)
        assert_unrelated(step["first.weight"], step["second.weight"])
    for name in ("conv.weight", "first.weight", "second.weight"):
        assert_unrelated(first[name], second[name])


def test_random_weight_gradient_follows_the_seed() -> None:
    """The same run has the same bits, another seed other ones; torch's own seed does not matter."""
    methods = {"conv": "random", "first": "random"}
    runs = [drawn(2, methods, seed=seed) for seed in (3, 3, 4)]
    for name in ("conv.weight", "first.weight"):
        one, again, other = ([step[name] for step in steps] for steps in runs)
        assert all(map(torch.equal, one, again))
        for left, right in zip(one, other, strict=True):
            assert_unrelated(left, right)


def test_random_leaves_other_gradients_exact() -> None:
    net = NETS["separable"]
    model, reference = build_twice(net)
    batch = net.batch(BATCH)
    backward(reference, double(batch))
    bound = rounding(model, batch)
    compiled = compile_with(model, methods={"pointwise": "random"})
    backward(compiled, batch)
    got, expected = dict(gradients(compiled)), dict(gradients(reference))
    assert got.pop("pointwise.weight").count_nonzero() == expected.pop("pointwise.weight").numel()
    assert_gradients(got, expected, bound)


# Top-k.


class Tapped(nn.Module):
    """A convolution between two others, with both factors of its weight gradient in sight.

    `tap`, zeros of the shape of its output, has the gradient that the convolution gets; its input
    is returned beside the output.
    """

    def __init__(self, middle: nn.Conv2d) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, middle.in_channels, 3, padding=1)
        self.middle = middle
        self.after = nn.Conv2d(middle.out_channels, 2, 2)

    def forward(self, image: Tensor, tap: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.before(image))
        z = self.middle(x) + tap
        return self.after(F.relu(z)), x


def factors(model: nn.Module, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Take one step, and return (output gradient, input) of the middle convolution."""
    conv = model.middle
    shape = conv(image.new_zeros(len(image), conv.in_channels, *image.shape[2:])).shape
    layout = torch.contiguous_format if image.is_contiguous() else torch.channels_last
    tap = torch.zeros(shape, dtype=dtype).to(memory_format=layout).requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, x = model(image, tap)
    y.float().square().mean().backward()
    assert tap.grad is not None
    assert tap.grad.dtype == x.dtype == dtype
    return tap.grad, x.detach()


def largest(grad: Tensor, x: Tensor, conv: nn.Conv2d, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return GA's weight gradient by definition, in float64, and what its rounding depends on.

    For every sample and output channel, the k largest output gradients are kept, the first of
    equal ones. What the others sum to is shared out among them, and each takes its patch.

    Args:
        grad: [B, Co, *out].
        x: [B, Ci, *in].
        conv: the convolution.
        k: how many are kept.

    Returns:
        dw; the same with the absolute value of everything that is added up in the end; and with
        the absolute values of the whole map in place of the kept ones: each [Co, Ci/groups, h, w].
    """
    maps, groups = grad.double().flatten(2), conv.groups
    patches = F.unfold(x.double(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    patches = patches.unflatten(1, (groups, -1))  # [B, groups, Ci/groups * taps, P]
    dw, kept_size, map_size = (
        torch.zeros(conv.weight.shape, dtype=torch.float64).flatten(1) for _ in range(3)
    )
    for sample in range(maps.shape[0]):
        for channel in range(maps.shape[1]):
            values = maps[sample, channel]
            kept = values.abs().argsort(descending=True, stable=True)[:k]
            weights = values[kept] + (values.sum() - values[kept].sum()) / k
            patch = patches[sample, channel * groups // maps.shape[1]][:, kept]
            dw[channel] += patch @ weights
            kept_size[channel] += patch.abs() @ weights.abs()
            map_size[channel] += patch.abs().sum(1) * values.abs().sum()
    shape = conv.weight.shape
    return dw.view(shape), kept_size.view(shape), map_size.view(shape)


def check_topk(
    model: nn.Module, image: Tensor, dtype: torch.dtype, k: int = 1, scale: float = 1.0
) -> None:
    """Compare the weight gradient of one step with the definition, element by element."""
    grad, x = factors(model, image, dtype)
    conv = model.middle
    expected, kept_size, map_size = (scale * value for value in largest(grad, x, conv, k))
    # In the operands' dtype are rounded: the map's sum, its product with the scale, that with the
    # patch, the sum over samples and the result. Sums are accumulated in float32 or wider, over
    # the map and over what is kept of the batch.
    terms = grad[0, 0].numel() + len(grad) * k
    bound = (
        5 * torch.finfo(dtype).eps * kept_size + terms * torch.finfo(torch.float32).eps * map_size
    )
    got = conv.weight.grad
    assert got.dtype == conv.weight.dtype
    assert ((got.double() - expected).abs() <= bound).all()
    # What an exact step gives lies outside the bound.
    exact = torch.nn.grad.conv2d_weight(
        x.double(), conv.weight.shape, grad.double(),
        conv.stride, conv.padding, conv.dilation, conv.groups,
    )  # fmt: skip
    assert ((exact - expected).abs() > bound).any()


GEOMETRIES: Mapping[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "grouped_dilated": lambda: nn.Conv2d(4, 6, (3, 2), padding=2, dilation=(2, 1), groups=2),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (3, 0.25)])
def test_topk_weight_gradient(geometry: str, k: int, scale: float) -> None:
    record = {"name": "topk", "k": k, "scale": scale, "min_positions": 1}
    model = compile_with(Tapped(GEOMETRIES[geometry]()), methods={"middle": record})
    check_topk(model, torch.randn(BATCH, 3, 8, 9), torch.float32, k, scale)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_in_layouts_and_precisions(layout: torch.memory_format, dtype: torch.dtype) -> None:
    model = compile_with(
        Tapped(GEOMETRIES["plain"]()).to(memory_format=layout), methods={"middle": "topk"}
    )
    image = torch.randn(BATCH, 3, 8, 9).to(memory_format=layout)
    check_topk(model, image, dtype)


def test_topk_with_dynamic_batch() -> None:
    model = torch.compile(
        Tapped(GEOMETRIES["plain"]()),
        backend="approx",
        options={"strict": True, "methods": {"middle": "topk"}},
        dynamic=True,
    )
    for batch in (5, 11):
        check_topk(model, torch.randn(batch, 3, 8, 9), torch.float32)


@pytest.mark.parametrize("geometry", ["strided", "transposed"])
def test_a_forward_convolution_with_dynamic_sizes(geometry: str) -> None:
    layers = {
        "strided": nn.Conv2d(3, 4, (3, 2), (2, 3), (1, 2), (2, 1)),
        "transposed": nn.ConvTranspose2d(3, 4, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(2, 1)),
    }
    layer = layers[geometry]
    rounded = {"name": "bf16", "gradient": "forward"}
    options = {"strict": True, "methods": {"*": rounded}}
    compiled = torch.compile(nn.Sequential(layer), backend="approx", options=options, dynamic=True)
    for shape in ((2, 3, 9, 8), (5, 3, 7, 11)):
        x = torch.randn(shape)
        product, exact = compiled(x), layer(x)
        assert not torch.equal(product, exact)
        torch.testing.assert_close(product, exact, atol=0.05, rtol=0)
    assert graphpass.reports()[-1].approximated


def test_topk_leaves_other_gradients_exact() -> None:
    net = NETS["separable"]
    model, reference = build_twice(net)
    batch = net.batch(BATCH)
    backward(reference, double(batch))
    bound = rounding(model, batch)
    compiled = compile_with(model, methods={"pointwise": "topk"})
    backward(compiled, batch)
    got, expected = dict(gradients(compiled)), dict(gradients(reference))
    difference = got.pop("pointwise.weight") - expected.pop("pointwise.weight")
    assert difference.norm() > 0
    assert_gradients(got, expected, bound)


# Memory.


@pytest.mark.parametrize(
    ("name", "layer", "freed"),
    [
        pytest.param("noisy", "0", BATCH * 3 * 8 * 8, id="convolution"),
        pytest.param("mlp", "0", BATCH * 6, id="linear"),
    ],
)
def test_zero_frees_the_input(name: str, layer: str, freed: int) -> None:
    """The input of a first layer is kept for its weight gradient alone."""
    net = NETS[name]
    backward(compile_with(net.build(), methods={layer: "zero"}), net.batch(BATCH))
    report = graphpass.reports()[-1]
    assert [row.where for row in report.approximated] == [layer]
    assert report.planned_saved_bytes is not None
    assert report.exact_saved_bytes - report.planned_saved_bytes == freed * torch.float32.itemsize


def test_topk_keeps_the_input() -> None:
    """It reads the patches in backward, at places that are known only then."""
    net = Net(ConvOnly, lambda count: (torch.randn(count, 3, 8, 8),))
    backward(compile_with(net.build(), methods={"conv1": "topk"}), net.batch(BATCH))
    report = graphpass.reports()[-1]
    assert len(report.approximated) == 1
    assert report.planned_saved_bytes == report.exact_saved_bytes
