"""The networks have the sizes their papers give, readable module paths, and a clear refusal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples.models import BasicBlock, build
from graphpass import ConfigError


def paths(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("name", "convolutions", "linears"),
    [
        ("cnn2", 2, 3),
        ("resnet14", 13, 1),
        ("resnet20", 19, 1),
        ("resnet32", 31, 1),
        ("vgg16", 13, 1),
        ("vgg19", 16, 1),
        ("alexnet", 5, 1),
        ("densenet121", 120, 1),
        ("resnet18", 20, 1),
        ("resnet50", 53, 1),
        ("resnet152", 155, 1),
        ("wrn-16-4", 16, 1),
        ("vit", 1, 25),
        ("vit-s", 1, 49),
        ("mlp", 0, 4),
    ],
)
def test_number_of_layers(name: str, convolutions: int, linears: int) -> None:
    model = build(name)
    assert len(paths(model, nn.Conv2d)) == convolutions
    assert len(paths(model, nn.Linear)) == linears


def test_resnet20_has_the_published_number_of_parameters() -> None:
    # Table 6 of He et al. says 0.27 million; this is that number in full, for option A shortcuts.
    assert sum(p.numel() for p in build("resnet20").parameters()) == 269_722


@pytest.mark.parametrize(
    "name", ["cnn2", "resnet8", "vgg19", "alexnet", "resnet18", "wrn-10-1", "vit", "mlp"]
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_logits_and_gradients(name: str, in_channels: int) -> None:
    model = build(name, in_channels=in_channels, num_classes=7)
    logits = model(torch.randn(2, in_channels, 32, 32))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([1, 6])).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("name", ["cnn2", "resnet8"])
def test_smaller_images(name: str) -> None:
    model = build(name, image_size=16)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_width_of_a_resnet() -> None:
    model = build("resnet8", width=4)
    channels = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert channels == [4, 4, 4, 8, 8, 16, 16]


def test_module_paths_are_readable() -> None:
    assert paths(build("resnet14"), nn.Conv2d)[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert paths(build("vgg19"), nn.Conv2d)[:3] == ["features.0", "features.3", "features.7"]
    assert paths(build("cnn2"), nn.Conv2d) == ["conv1", "conv2"]


def test_shortcut_slices_and_pads() -> None:
    block = BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 6, 6)
    expected = torch.zeros(1, 4, 3, 3)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_convolutions_start_with_kaiming_variance() -> None:
    # Of n normal values the sample variance is within 5 * sqrt(2 / n) of the true one, relatively.
    for module in build("vgg19").modules():
        if isinstance(module, nn.Conv2d):
            expected = 2 / (module.out_channels * 9)
            tolerance = 5 * (2 / module.weight.numel()) ** 0.5
            assert module.weight.var().item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("lenet", {}, "unknown model 'lenet': legal are alexnet, .*, vit-s, resnet<depth>"),
        ("resnet21", {}, "no ResNet has depth 21: legal are 6n \\+ 2"),
        ("resnet2", {}, "no ResNet has depth 2"),
        ("vgg19", {"image_size": 16}, "vgg19 cannot take images of 16 pixels .* multiples of 32"),
        ("cnn2", {"image_size": 30}, "cnn2 cannot take images of 30 pixels .* multiples of 4"),
        ("resnet8", {"image_size": 0}, "resnet cannot take images of 0 pixels"),
    ],
)
def test_refusals(name: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **sizes)
