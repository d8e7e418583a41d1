"""MNIST's files are read, plain or zipped, and nothing else is; its networks train by a recipe."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples import data, images, mnist, models
from graphpass import ConfigError

SIDE = 28
COUNTS = {"train": 40, "t10k": 10}


def write(path: Path, values: np.ndarray, kind: int = 0x08) -> None:
    header = struct.pack(f">{1 + values.ndim}I", (kind << 8) + values.ndim, *values.shape)
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def content(split: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(COUNTS[split])
    images = random.integers(0, 256, (COUNTS[split], SIDE, SIDE), dtype=np.uint8)
    return images, random.integers(0, 10, COUNTS[split], dtype=np.uint8)


def write_all(folder: Path, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        images, labels = content(split)
        write(folder / f"{split}-images-idx3-ubyte{suffix}", images)
        write(folder / f"{split}-labels-idx1-ubyte{suffix}", labels)
    return folder


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
def test_images_and_labels_are_those_of_the_files(tmp_path: Path, suffix: str, folder: str) -> None:
    write_all(tmp_path / folder, suffix)
    found = data.mnist(tmp_path)
    for split, name in ((found.train, "train"), (found.test, "t10k")):
        images, labels = content(name)
        assert torch.equal(split.images[:, 0], torch.from_numpy(images))
        assert split.labels.tolist() == labels.tolist()
    assert not found.flip and found.pad == 0


def test_images_are_trained_on_as_they_are(tmp_path: Path) -> None:
    found = data.mnist(write_all(tmp_path))
    images, labels = data.Batches(found, COUNTS["train"], seed=3).next()
    order = torch.randperm(COUNTS["train"], generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(images, found.normalise(found.train.images[order]))
    assert torch.equal(labels, found.train.labels[order])


def test_files_that_are_not_mnist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no train-images-idx3-ubyte.*Give the folder"):
        data.mnist(tmp_path)
    write_all(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    for broken, message in (
        (np.full(COUNTS["train"], 10, np.uint8), "label 10, legal are 0 to 9"),
        (np.zeros(3, np.uint8), "3 labels of 40 images"),
    ):
        write(labels, broken)
        with pytest.raises(ConfigError, match=message):
            data.mnist(tmp_path)
    write(labels, np.zeros(COUNTS["train"], np.uint8), kind=0x0D)
    with pytest.raises(ConfigError, match="header 0xd01"):
        data.mnist(tmp_path)
    for rubbish in (b"", b"\0\0\x08\x01\0\0\0\x28cut"):
        labels.write_bytes(rubbish)
        with pytest.raises(ConfigError, match=r"cannot be read|is not MNIST"):
            data.mnist(tmp_path)
    labels.unlink()
    (tmp_path / f"{labels.name}.gz").write_bytes(b"\x1f\x8b not zipped")
    with pytest.raises(ConfigError, match="cannot be read"):
        data.mnist(tmp_path)


@pytest.mark.parametrize("name", ["mnist-mlp", "mnist-cnn"])
def test_networks_map_digits_to_logits(name: str) -> None:
    model = models.build(name, in_channels=1, image_size=SIDE)
    assert model(torch.zeros(3, 1, SIDE, SIDE)).shape == (3, 10)
    with pytest.raises(ConfigError, match="multiples of 4"):
        models.build("mnist-cnn", in_channels=1, image_size=30)


@pytest.mark.usefixtures("interpreted")
def test_training_by_a_recipe(tmp_path: Path) -> None:
    write_all(tmp_path)
    arguments = ["--data", str(tmp_path), "--batch-size", "20", "--epochs", "2", "--threads", "1"]
    result = mnist.main([*arguments, "--recipe", "crs-backward", "keep=0.4", "backward=0.05"])
    assert result["runs"][0]["steps"] == 4
    [report] = result["reports"]
    rows = {(row["where"], row["gradient"]): row for row in report["rows"]}
    assert rows["fc1", "forward"]["method"] == "exact"
    assert rows["fc2", "forward"]["params"]["keep"] == 0.4
    assert rows["fc2", "input"]["params"]["again"] == 0.05


@pytest.mark.usefixtures("interpreted")
def test_sparse_training_is_scored_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path)
    scored: list[tuple[nn.Module, float]] = []

    def zeros(model: nn.Module, *_: object) -> float:
        scored.append((model, _zeros(model)))
        return 50.0

    monkeypatch.setattr(images, "accuracy_percent", zeros)
    arguments = ["--data", str(tmp_path), "--batch-size", "20", "--epochs", "1", "--threads", "1"]
    mnist.main([*arguments, "--recipe", "swat-u", "sparsity=0.9"])
    [(model, share)] = scored
    assert share == pytest.approx(0.9, abs=0.01)
    # All of them are trained on.
    assert _zeros(model) < 0.01


def _zeros(model: nn.Module) -> float:
    weight = model.get_parameter("fc2.weight")
    return float((weight == 0).float().mean())


def test_recipes_are_checked(tmp_path: Path) -> None:
    arguments = ["--data", str(write_all(tmp_path)), "--batch-size", "20", "--recipe"]
    for recipe, message in (
        (["crs-topk", "keep"], "'keep' sets nothing: give a parameter as keep=0.5"),
        (["crs-topk", "no=1"], "no parameter 'no'"),
        (["no-such"], "unknown recipe 'no-such'"),
        (["agp", "--method", "zero"], "--method and --recipe were both given"),
    ):
        with pytest.raises(ConfigError, match=message):
            mnist.main([*arguments, *recipe])
