"""Small networks of every kind that users train, and batches to feed them.

B batch, H W space, T tokens, C channels. Sizes are the smallest at which every layer has something
to sum over; no convolution sees a map of one pixel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples import models

Batch = tuple[Tensor, ...]

WORDS = 11
TOKENS = 5


@dataclass(frozen=True, slots=True)
class Net:
    """A model, and what it is fed.

    Attributes:
        build: makes the model, in training mode.
        batch: makes inputs for so many samples.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]


def images(channels: int, size: int) -> Callable[[int], Batch]:
    """Return what makes batches of normal images, `[B, channels, size, size]`."""
    return lambda count: (torch.randn(count, channels, size, size),)


def vectors(*shape: int) -> Callable[[int], Batch]:
    """Return what makes batches of normal vectors, `[B, *shape]`."""
    return lambda count: (torch.randn(count, *shape),)


def sentences(count: int) -> Batch:
    """Return random words, `[B, T]`."""
    return (torch.randint(WORDS, (count, TOKENS)),)


class UNet(nn.Module):
    """Two scales: down by a strided convolution, up by a transposed one, a skip in between."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.leave = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.enter(x))
        y = F.relu(self.middle(F.relu(self.down(skip))))
        result: Tensor = self.leave(torch.cat([skip, self.up(y)], dim=1))
        return result


class Separable(nn.Module):
    """A depthwise, a pointwise and a grouped convolution, each normalised; then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.pointwise = nn.Conv2d(4, 8, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.depthwise(x)))
        x = F.relu(self.norm2(self.pointwise(x)))
        result: Tensor = self.fc(self.grouped(x).mean((2, 3)))
        return result


class ConvOnly(nn.Module):
    """Three convolutions, and nothing that behaves differently in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return result


class LstmCell(nn.Module):
    """One step of an LSTM: two linear layers compute the four gates."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(inputs, 4 * hidden)
        self.from_hidden = nn.Linear(hidden, 4 * hidden, bias=False)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.from_input(x) + self.from_hidden(hidden)
        enter, forget, update, leave = gates.chunk(4, dim=1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * update.tanh()
        return leave.sigmoid() * cell.tanh(), cell


class Lstm(nn.Module):
    """An LSTM over `[B, T, 6]`, unrolled; the last hidden state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = LstmCell(6, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], 8)
        for step in range(x.shape[1]):
            hidden, cell = self.cell(x[:, step], hidden, cell)
        result: Tensor = self.fc(hidden)
        return result


class Attention(nn.Module):
    """Self-attention with two heads over `[B, T, 8]`."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        dropped = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network, each behind a norm and beside a shortcut."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.attention = Attention(dropout)
        self.norm2 = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        result: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return result


class Transformer(nn.Module):
    """An encoder of one layer over words, `[B, T] -> [B, 3]`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.layers = nn.ModuleList([EncoderLayer(dropout)])
        self.head = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x.mean(1))
        return result


class Tied(nn.Module):
    """A language model: one matrix embeds the words and scores them; one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        x = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        result: Tensor = self.head(x)
        return result


class Broken(nn.Module):
    """A block whose forward Dynamo cannot trace in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(4, 4, 3, padding=1)
        self.after = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.before(x))
        torch._dynamo.graph_break()
        result: Tensor = F.relu(self.after(x))
        return result


class GraphBreak(nn.Module):
    """A convolution, a broken block below a container, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleDict({"broken": Broken()})
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks["broken"](F.relu(self.first(x)))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


class Checkpointed(nn.Module):
    """Convolutions, the middle ones computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=False)
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def mlp() -> nn.Module:
    """Return three linear layers, `[B, 6] -> [B, 3]`."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)
    )


def vgg() -> nn.Module:
    """Return the first two scales of VGG-19; images of 8 pixels leave what its classifier takes."""
    model = models.vgg19(image_size=32)
    model.features = model.features[:14]
    return model


def noisy() -> nn.Module:
    """Return a convolution, a norm, a dropout and a classifier of images of 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def frozen() -> nn.Module:
    """Return convolutions, of which the second keeps its weights."""
    model = ConvOnly()
    model.conv2.requires_grad_(False)
    return model


NETS: Mapping[str, Net] = {
    "cnn2": Net(lambda: models.cnn2(image_size=8), images(3, 8)),
    "resnet8": Net(lambda: models.resnet(8, width=4, image_size=8), images(3, 8)),
    "vgg": Net(vgg, images(3, 8)),
    "unet": Net(UNet, images(3, 8)),
    "separable": Net(Separable, images(4, 8)),
    "noisy": Net(noisy, images(3, 8)),
    "conv_only": Net(ConvOnly, images(3, 8)),
    "mlp": Net(mlp, vectors(6)),
    "lstm": Net(Lstm, vectors(3, 6)),
    "transformer": Net(Transformer, sentences),
    "transformer_dropout": Net(lambda: Transformer(dropout=0.1), sentences),
    "tied": Net(Tied, sentences),
    "graph_break": Net(GraphBreak, images(3, 8)),
    "checkpointed": Net(Checkpointed, images(3, 8)),
    "frozen": Net(frozen, images(3, 8)),
}
