"""The two networks for MNIST of Adelman, Silberstein 2018, supplementary material.

"Faster Neural Network Training with Approximate Tensor Operations" (arXiv:1805.08079).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from graphpass.errors import ConfigError


class MnistMlp(nn.Module):
    """Three linear layers, 500 units in both hidden ones."""

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        """Set up the layers."""
        super().__init__()
        self.fc1 = nn.Linear(in_channels * image_size**2, 500)
        self.fc2 = nn.Linear(500, 500)
        self.fc3 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


class MnistCnn(nn.Module):
    """Two 5x5 convolutions with pooling, a hidden layer of 1024 units with dropout."""

    def __init__(self, in_channels: int = 1, image_size: int = 28, num_classes: int = 10) -> None:
        """Set up the layers.

        Raises:
            ConfigError: If `image_size` is not a multiple of 4.
        """
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ConfigError(
                f"mnist-cnn cannot take images of {image_size} pixels a side: "
                "legal sizes are multiples of 4"
            )
        self.conv1 = nn.Conv2d(in_channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * (image_size // 4) ** 2, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, num_classes]`."""
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc2(x)
        return logits
