"""The convolutional networks the examples train.

Inputs are images `[B, C, H, W]` with `C = in_channels` and `H = W = image_size`, outputs logits
`[B, num_classes]`. Module paths are what reports print and `methods` patterns match: `conv1`,
`layer1.0.conv1`, `features.0`, `fc`.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dense_models import alexnet, densenet121
from examples.large_models import DEPTHS, deep_resnet, mlp, vit, vit_s, wide_resnet
from examples.mnist_models import MnistCnn, MnistMlp
from graphpass.errors import ConfigError


def build(name: str, **sizes: int) -> nn.Module:
    """Build the model called `name`, with freshly initialised parameters.

    Args:
        name: `cnn2`, `vgg16`, `vgg19`, `alexnet`, `densenet121`, `vit`, `vit-s`, `mlp`,
            `mnist-mlp`, `mnist-cnn`, `wrn-<depth>-<widening>` or `resnet<depth>`: depths 18, 34,
            50, 101 and 152 are the ImageNet family, others that of CIFAR (`resnet20`).
        **sizes: Keyword arguments of the model: `in_channels`, `image_size`, `num_classes`, and for
            CIFAR ResNets `width`.

    Returns:
        The model in training mode.

    Raises:
        ConfigError: If no model has that name, or it cannot take images of that size.
    """
    if depth := re.fullmatch(r"resnet(\d+)", name):
        build_resnet = deep_resnet if int(depth[1]) in DEPTHS else resnet
        return build_resnet(int(depth[1]), **sizes)
    if wide := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return wide_resnet(int(wide[1]), int(wide[2]), **sizes)
    if name not in _BUILDERS:
        legal = ", ".join(sorted(_BUILDERS))
        raise ConfigError(
            f"unknown model {name!r}: legal are {legal}, resnet<depth> with a depth of 6n + 2, "
            "such as resnet14 and resnet20, resnet18, resnet34, resnet50, resnet101, resnet152, "
            "and wrn-<depth>-<widening>, such as wrn-16-4"
        )
    return _BUILDERS[name](**sizes)


def resnet(
    depth: int = 20,
    width: int = 16,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
) -> nn.Module:
    """Build the CIFAR ResNet of a given depth: `depth - 1` convolutions and one linear layer.

    He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", section 4.2.

    Args:
        depth: `6n + 2`; 20 and 14 are the ones the gradient-approximation papers compare.
        width: Channels of the first stage; the next stages have two and four times as many.
        in_channels: Channels of the images.
        image_size: Pixels along one side; a multiple of 4.
        num_classes: Columns of the logits.

    Returns:
        The model in training mode.

    Raises:
        ConfigError: If `depth` is not `6n + 2` or `image_size` is not a multiple of 4.
    """
    blocks, remainder = divmod(depth - 2, 6)
    if blocks < 1 or remainder:
        raise ConfigError(f"no ResNet has depth {depth}: legal are 6n + 2, such as 8, 14, 20, 32")
    _check_image_size("resnet", image_size, multiple=4)
    return ResNet(blocks, width, in_channels, num_classes)


def cnn2(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """Build the two-convolution network of the gradient-approximation papers.

    Krizhevsky's CIFAR tutorial network (two 5x5 convolutions with 64 channels, then linear layers
    of 384 and 192 units) with batch normalisation in place of local response normalisation, as in
    Wang, Nelaturu, Amarasinghe 2019, "Accelerated CNN training through gradient approximation".

    Args:
        in_channels: Channels of the images.
        image_size: Pixels along one side; a multiple of 4.
        num_classes: Columns of the logits.

    Returns:
        The model in training mode.

    Raises:
        ConfigError: If `image_size` is not a multiple of 4.
    """
    _check_image_size("cnn2", image_size, multiple=4)
    return Cnn2(in_channels, image_size, num_classes)


def vgg19(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """Build VGG-19 for small images: 16 convolutions with BatchNorm and one linear classifier.

    Simonyan, Zisserman 2014, "Very deep convolutional networks for large-scale image recognition",
    configuration E. At 32 pixels the last map is 1x1, so one linear layer replaces the original
    three.

    Args:
        in_channels: Channels of the images.
        image_size: Pixels along one side; a multiple of 32 (five poolings).
        num_classes: Columns of the logits.

    Returns:
        The model in training mode.

    Raises:
        ConfigError: If `image_size` is not a multiple of 32.
    """
    _check_image_size("vgg19", image_size, multiple=32)
    return Vgg(4, in_channels, image_size, num_classes)


def vgg16(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """Build VGG-16, configuration D, in the form of `vgg19`: 13 convolutions, one classifier.

    Raises:
        ConfigError: If `image_size` is not a multiple of 32.
    """
    _check_image_size("vgg16", image_size, multiple=32)
    return Vgg(3, in_channels, image_size, num_classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of the paper)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Set up `[B, in_channels, H, W] -> [B, channels, H / stride, W / stride]`."""
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map `x: [B, in_channels, H, W]` to `[B, channels, H / stride, W / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.added_channels == 0:
            return x
        before = self.added_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.added_channels - before))


class ResNet(nn.Module):
    """Three stages of basic blocks, then the mean over the map and a linear classifier."""

    def __init__(self, blocks: int, width: int, in_channels: int, num_classes: int) -> None:
        """Set up `6 * blocks + 1` convolutions, `width` channels in the first stage."""
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, stride=1)
        self.layer2 = _stage(blocks, width, 2 * width, stride=2)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class Cnn2(nn.Module):
    """Convolution, BatchNorm, ReLU, pooling, twice; then three linear layers."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        """Set up the layers; `image_size` fixes the inputs of the first linear one."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 5, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.fc1 = nn.Linear(64 * (image_size // 4) ** 2, 384)
        self.fc2 = nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = F.max_pool2d(F.relu(bn(conv(x))), 3, stride=2, padding=1)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


class Vgg(nn.Module):
    """`features` holds convolutions, BatchNorms, ReLUs and poolings in order; `fc` classifies."""

    def __init__(self, depth: int, in_channels: int, image_size: int, num_classes: int) -> None:
        """Set up two stages of two convolutions and three of `depth`."""
        super().__init__()
        layers: list[nn.Module] = []
        for channels, repeats in ((64, 2), (128, 2), (256, depth), (512, depth), (512, depth)):
            for _ in range(repeats):
                layers += [_conv3x3(in_channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(in_channels * (image_size // 32) ** 2, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        logits: Tensor = self.fc(torch.flatten(self.features(x), 1))
        return logits


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": alexnet,
    "cnn2": cnn2,
    "densenet121": densenet121,
    "mlp": mlp,
    "mnist-cnn": MnistCnn,
    "mnist-mlp": MnistMlp,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "vit": vit,
    "vit-s": vit_s,
}


def _conv3x3(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    # No bias: the BatchNorm behind every convolution would cancel it.
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _init_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _check_image_size(name: str, image_size: int, multiple: int) -> None:
    if image_size < multiple or image_size % multiple:
        raise ConfigError(
            f"{name} cannot take images of {image_size} pixels a side: "
            f"legal sizes are multiples of {multiple}"
        )
