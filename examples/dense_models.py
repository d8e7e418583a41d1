"""Networks that papers of sparse training measure: DenseNet-121 and AlexNet, for small images.

Inputs are images `[B, C, H, W]` with `C = in_channels` and `H = W = image_size`, outputs logits
`[B, num_classes]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpass.errors import ConfigError


def densenet121(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """Build DenseNet-121 with the stem that small images take: a 3x3 convolution, no pooling.

    Huang, Liu, van der Maaten, Weinberger 2016, "Densely connected convolutional networks": growth
    32, blocks of 6, 12, 24 and 16 layers, half of the channels between them.

    Raises:
        ConfigError: If `image_size` is not a multiple of 8.
    """
    _check_multiple("densenet121", image_size, 8)
    return DenseNet(32, (6, 12, 24, 16), in_channels, num_classes)


def alexnet(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """Build AlexNet for small images: five 3x3 convolutions, no normalisation, one classifier.

    Krizhevsky, Sutskever, Hinton 2012, "ImageNet classification with deep convolutional neural
    networks", in the channels that Ye et al. 2020 prune on CIFAR-10.

    Raises:
        ConfigError: If `image_size` is not a multiple of 8.
    """
    _check_multiple("alexnet", image_size, 8)
    return AlexNet(in_channels, image_size, num_classes)


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and convolution, 1x1 then 3x3; the result joins the input's channels."""

    def __init__(self, channels: int, growth: int) -> None:
        """Set up `[B, channels, H, W] -> [B, channels + growth, H, W]`."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, channels, H, W]` to `[B, channels + growth, H, W]`."""
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([x, y], dim=1)


class DenseNet(nn.Module):
    """Blocks of dense layers, between them 1x1 convolutions and poolings; a linear classifier."""

    def __init__(
        self, growth: int, blocks: tuple[int, ...], in_channels: int, num_classes: int
    ) -> None:
        """Set up a stem of `2 * growth` channels and the blocks."""
        super().__init__()
        channels = 2 * growth
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for number, count in enumerate(blocks):
            for _ in range(count):
                layers.append(DenseLayer(channels, growth))
                channels += growth
            if number < len(blocks) - 1:
                halved = nn.Conv2d(channels, channels // 2, 1, bias=False)
                layers += [nn.BatchNorm2d(channels), nn.ReLU(), halved, nn.AvgPool2d(2)]
                channels //= 2
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class AlexNet(nn.Module):
    """Convolutions, ReLUs and poolings in order; `fc` classifies."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        """Set up five convolutions, of which the first, second and fifth are pooled."""
        super().__init__()
        layers: list[nn.Module] = []
        plan = ((64, True), (192, True), (384, False), (256, False), (256, True))
        for channels, pooled in plan:
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pooled else []
            in_channels = channels
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(in_channels * (image_size // 8) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        logits: Tensor = self.fc(torch.flatten(self.features(x), 1))
        return logits


def _check_multiple(name: str, image_size: int, multiple: int) -> None:
    if image_size < multiple or image_size % multiple:
        raise ConfigError(
            f"{name} cannot take images of {image_size} pixels a side: "
            f"legal sizes are multiples of {multiple}"
        )
