"""Larger networks for small images: ResNet-18 to 152, wide ResNets, a vision transformer, an MLP.

Inputs are images `[B, C, H, W]` with `C = in_channels` and `H = W = image_size`, outputs logits
`[B, num_classes]`.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpass.errors import ConfigError

# Blocks of each stage, and whether they are bottlenecks: He, Zhang, Ren, Sun 2015, table 1.
_STAGES = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
DEPTHS = tuple(_STAGES)


def deep_resnet(
    depth: int, in_channels: int = 3, image_size: int = 32, num_classes: int = 10
) -> nn.Module:
    """Build a ResNet of the ImageNet family with the stem that small images take.

    The first convolution is 3x3 with stride 1, and nothing is pooled before the first stage.

    Raises:
        ConfigError: If there is no such depth, or `image_size` is not a multiple of 8.
    """
    if depth not in _STAGES:
        raise ConfigError(f"no ResNet has depth {depth}: legal are {', '.join(map(str, DEPTHS))}")
    _check_multiple("resnet", image_size, 8)
    blocks, bottleneck = _STAGES[depth]
    return DeepResNet(blocks, bottleneck, in_channels, num_classes)


def wide_resnet(
    depth: int, widening: int, in_channels: int = 3, image_size: int = 32, num_classes: int = 10
) -> nn.Module:
    """Build a wide ResNet: Zagoruyko, Komodakis 2016, "Wide residual networks".

    Args:
        depth: `6n + 4`, such as 16 and 28.
        widening: factor on the channels 16, 32, 64 of the three stages.
        in_channels: Channels of the images.
        image_size: Pixels along one side; a multiple of 4.
        num_classes: Columns of the logits.

    Raises:
        ConfigError: If `depth` is not `6n + 4` or `image_size` is not a multiple of 4.
    """
    blocks, remainder = divmod(depth - 4, 6)
    if blocks < 1 or remainder or widening < 1:
        raise ConfigError(f"no wide ResNet is {depth}-{widening}: legal depths are 6n + 4")
    _check_multiple("wrn", image_size, 4)
    return WideResNet(blocks, widening, in_channels, num_classes)


def vit(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """Build a small vision transformer: patches of 4, 6 layers of 256 channels and 4 heads.

    Dosovitskiy et al. 2020, "An image is worth 16x16 words"; sized for 32-pixel images.

    Raises:
        ConfigError: If `image_size` is not a multiple of 4.
    """
    _check_multiple("vit", image_size, 4)
    return VisionTransformer(in_channels, image_size, num_classes)


def vit_s(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """Build ViT-S: patches of 4, 12 layers of 384 channels and 6 heads.

    Touvron et al. 2020, "Training data-efficient image transformers", table 1; patches are sized
    for 32-pixel images.

    Raises:
        ConfigError: If `image_size` is not a multiple of 4.
    """
    _check_multiple("vit-s", image_size, 4)
    return VisionTransformer(in_channels, image_size, num_classes, 384, 12, 6)


def mlp(in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """Build a perceptron with three hidden layers of 1024 units."""
    sizes = (in_channels * image_size**2, 1024, 1024, 1024)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


class ResidualBlock(nn.Module):
    """Convolutions with BatchNorm, and a shortcut that is projected where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, bottleneck: bool) -> None:
        """Set up two 3x3 convolutions, or a 3x3 one between two of 1x1."""
        super().__init__()
        out_channels = 4 * channels if bottleneck else channels
        plan = [(in_channels, channels, 3, stride), (channels, channels, 3, 1)]
        if bottleneck:
            plan = [(in_channels, channels, 1, 1), (channels, channels, 3, stride)]
            plan.append((channels, out_channels, 1, 1))
        self.convs = nn.ModuleList(_conv(*sizes) for sizes in plan)
        self.bns = nn.ModuleList(nn.BatchNorm2d(sizes[1]) for sizes in plan)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            projection = _conv(in_channels, out_channels, 1, stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H / stride, W / stride]`."""
        y = x
        for number, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True), start=1):
            y = bn(conv(y))
            if number < len(self.convs):
                y = F.relu(y)
        return F.relu(y + self.shortcut(x))


class DeepResNet(nn.Module):
    """Four stages of residual blocks, the mean over the map, a linear classifier."""

    def __init__(
        self, blocks: tuple[int, ...], bottleneck: bool, in_channels: int, num_classes: int
    ) -> None:
        """Set up stages of 64, 128, 256 and 512 channels (four times that behind bottlenecks)."""
        super().__init__()
        self.stem = nn.Sequential(_conv(in_channels, 64, 3, 1), nn.BatchNorm2d(64), nn.ReLU())
        expansion, channels, layers = (4 if bottleneck else 1), 64, []
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(ResidualBlock(channels, width, stride, bottleneck))
                channels = width * expansion
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        logits: Tensor = self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return logits


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice; BatchNorm and ReLU come before the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Set up `[B, in_channels, H, W] -> [B, channels, H / stride, W / stride]`."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, 1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = _conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, channels, H / stride, W / stride]`."""
        active = F.relu(self.bn1(x))
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Three stages of wide blocks, then the mean over the map and a linear classifier."""

    def __init__(self, blocks: int, widening: int, in_channels: int, num_classes: int) -> None:
        """Set up `6 * blocks + 1` convolutions of 3x3."""
        super().__init__()
        self.conv1 = _conv(in_channels, 16, 3, 1)
        channels, layers = 16, []
        for stage in range(3):
            width = 16 * widening * 2**stage
            for number in range(blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(WideBlock(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class TransformerLayer(nn.Module):
    """Self-attention and a perceptron, each behind a LayerNorm, each added to its input."""

    def __init__(self, channels: int, heads: int) -> None:
        """Set up `[B, tokens, channels] -> [B, tokens, channels]`."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x: [B, tokens, channels]` to the same shape."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return y


class VisionTransformer(nn.Module):
    """Patches of 4x4 pixels as tokens, transformer layers, the mean token, a classifier."""

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        channels: int = 256,
        layers: int = 6,
        heads: int = 4,
    ) -> None:
        """Set up `layers` layers of `channels` channels."""
        super().__init__()
        tokens = (image_size // 4) ** 2
        self.patches = nn.Conv2d(in_channels, channels, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, channels))
        self.layers = nn.Sequential(*(TransformerLayer(channels, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.fc(self.norm(self.layers(tokens)).mean(1))
        return logits


def _conv(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Conv2d:
    # No bias: the BatchNorm behind every convolution would cancel it.
    padding = kernel // 2
    return nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=padding, bias=False)


def _check_multiple(name: str, image_size: int, multiple: int) -> None:
    if image_size < multiple or image_size % multiple:
        raise ConfigError(
            f"{name} cannot take images of {image_size} pixels a side: "
            f"legal sizes are multiples of {multiple}"
        )
