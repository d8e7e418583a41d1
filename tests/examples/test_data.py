"""Both published layouts are read, nothing else is; batches are reproducible and resumable."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples import data
from graphpass import ConfigError

ROWS = 6
NAMES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


class _AsPython2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is what the published files hold."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def _save_bytes(self, value: bytes) -> None:
        self.write(b"T" + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = _save_bytes


def content(index: int) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(index)
    rows = random.integers(0, 256, (ROWS, 3072), dtype=np.uint8)
    return rows, [int(label) for label in random.integers(0, 10, ROWS)]


def write_like_python2(folder: Path) -> None:
    for index, name in enumerate(NAMES):
        rows, labels = content(index)
        with (folder / name).open("wb") as file:
            _AsPython2(file, protocol=2).dump({b"data": rows, b"labels": labels})


def write_like_python3(folder: Path) -> None:
    for index, name in enumerate(NAMES):
        rows, labels = content(index)
        with (folder / name).open("wb") as file:
            pickle.dump({b"data": rows, "labels": labels}, file, protocol=2)


def write_binary(folder: Path) -> None:
    for index, name in enumerate(NAMES):
        rows, labels = content(index)
        columns = np.array(labels, dtype=np.uint8)[:, None]
        np.hstack([columns, rows]).tofile(folder / f"{name}.bin")


def make_folder(parent: Path, name: str = "cifar-10-batches-py") -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


def small_data(pad: int = 4, flip: bool = True, images: int = 20) -> data.ImageData:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (images, 3, 8, 8), generator=random).to(torch.uint8)
    split = data.Split(pixels, torch.arange(images))
    zero, one = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    return data.ImageData("small", split, split, zero, one, pad=pad, flip=flip)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_like_python2, "cifar-10-batches-py"),
        (write_like_python3, "cifar-10-batches-py"),
        (write_binary, "cifar-10-batches-bin"),
    ],
)
@pytest.mark.parametrize("name_the_parent", [True, False])
def test_published_layouts(
    tmp_path: Path, write: Callable[[Path], None], name: str, name_the_parent: bool
) -> None:
    folder = make_folder(tmp_path, name)
    write(folder)
    loaded = data.load(tmp_path if name_the_parent else folder)
    assert loaded.name == "cifar10"
    assert loaded.flip
    rows = np.concatenate([content(k)[0] for k in range(5)]).reshape(-1, 3, 32, 32)
    labels = [label for k in range(5) for label in content(k)[1]]
    assert torch.equal(loaded.train.images, torch.from_numpy(rows))
    assert loaded.train.labels.tolist() == labels
    assert loaded.test.labels.tolist() == content(5)[1]


def test_a_folder_of_any_name_may_be_named_itself(tmp_path: Path) -> None:
    write_binary(tmp_path)
    assert len(data.load(tmp_path).test) == ROWS


class _Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def _break(kind: str, folder: Path) -> None:
    rows, labels = content(0)
    victim = folder / "data_batch_3"
    match kind:
        case "lost":
            victim.unlink()
        case "cut":
            victim.write_bytes(victim.read_bytes()[:500])
        case "malice":
            victim.write_bytes(pickle.dumps({"data": _Malice(), "labels": labels}))
        case "list":
            victim.write_bytes(pickle.dumps([1, 2]))
        case "keys":
            victim.write_bytes(pickle.dumps({"fine_labels": labels}))
        case "shape":
            victim.write_bytes(pickle.dumps({"data": rows[:, :100], "labels": labels}, protocol=2))
        case "count":
            victim.write_bytes(pickle.dumps({"data": rows, "labels": labels[1:]}, protocol=2))
        case "range":
            record = {"data": rows, "labels": [100] * ROWS}
            victim.write_bytes(pickle.dumps(record, protocol=2))
        case "text":
            record = {"data": rows, "labels": ["cat"] * ROWS}
            victim.write_bytes(pickle.dumps(record, protocol=2))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lost", "cifar-10-batches-py lacks data_batch_3. Legal is the folder"),
        ("cut", "cannot read .*data_batch_3: .*damaged or not a CIFAR-10 batch"),
        ("malice", "it asks for .*, but only numpy arrays are allowed"),
        ("list", "data_batch_3 is not CIFAR-10: it holds a list, not a dict"),
        ("keys", "must hold `data` .* but holds fine_labels \\(list\\)"),
        ("shape", "data is uint8 \\[6, 100\\], legal is uint8 \\[N, 3072\\]"),
        ("count", "6 images, 5 labels"),
        ("range", "labels from 100 to 100, legal are 0 to 9"),
        ("text", "labels are not integers"),
    ],
)
def test_what_is_not_cifar10_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path)
    write_like_python2(folder)
    _break(kind, folder)
    with pytest.raises(ConfigError, match=message):
        data.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_binary_files_of_a_wrong_size_are_refused(tmp_path: Path) -> None:
    write_binary(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="it has 100 bytes, legal are multiples of 3073"):
        data.load(tmp_path)


def test_other_folders_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it holds nothing\. Legal is"):
        data.load(tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(ConfigError, match=r"it holds cifar-10-python\.tar\.gz\. Legal .* Unpack"):
        data.load(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        data.load(tmp_path / "absent")


def test_digits() -> None:
    digits = data.load(None)
    assert digits.train.images.shape == (1408, 1, 32, 32)
    assert digits.test.images.shape == (389, 1, 32, 32)
    assert digits.train.images.dtype == torch.uint8
    assert not digits.flip
    assert set(digits.test.labels.tolist()) == set(range(10))
    again = data.load(None)
    assert torch.equal(digits.train.images, again.train.images)
    assert torch.equal(digits.test.labels, again.test.labels)


def test_limit_keeps_the_first_images_and_the_statistics() -> None:
    whole, few = data.load(None), data.load(None, limit_train=10)
    assert torch.equal(few.train.images, whole.train.images[:10])
    assert len(few.test) == len(whole.test)
    assert torch.equal(few.mean, whole.mean)
    with pytest.raises(ConfigError, match="cannot keep 0 training images"):
        data.load(None, limit_train=0)


def test_normalised_images_have_mean_0_and_variance_1(tmp_path: Path) -> None:
    write_binary(tmp_path)
    loaded = data.load(tmp_path)
    x = loaded.normalise(loaded.train.images).double()
    # Sums of float32 roundings: each value is good to a few eps, and so is their mean.
    tolerance = 8 * torch.finfo(torch.float32).eps
    assert x.mean(dim=(0, 2, 3)).abs().max() < tolerance
    assert (x.var(dim=(0, 2, 3), correction=0) - 1).abs().max() < 4 * tolerance


def reference_batch(small: data.ImageData, chosen: Tensor, random: torch.Generator) -> Tensor:
    """Crop and mirror one image after the other, with the draws that `Batches` makes."""
    batch, size, pad = len(chosen), small.train.images.shape[-1], small.pad
    offsets = torch.randint(2 * pad + 1, (2, batch, 1), generator=random)
    mirrored = torch.rand(batch, 1, generator=random) < 0.5 if small.flip else [False] * batch
    images = []
    for k, i in enumerate(chosen.tolist()):
        row, column = offsets[0, k].item(), offsets[1, k].item()
        padded = F.pad(small.train.images[i], (pad, pad, pad, pad))
        crop = padded[:, row : row + size, column : column + size]
        images.append(crop.flip(-1) if mirrored[k] else crop)
    return torch.stack(images).float()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("pad", "flip"), [(4, True), (4, False), (0, True), (0, False), (2, True)])
def test_augmentation_equals_reference(pad: int, flip: bool, channels_last: bool) -> None:
    small = small_data(pad, flip)
    batches = data.Batches(small, 10, seed=3, channels_last=channels_last)
    random = torch.Generator().manual_seed(3)
    order = torch.randperm(20, generator=random)
    for chosen in order.split(10):
        images, labels = batches.next()
        assert torch.equal(images, reference_batch(small, chosen, random))
        assert torch.equal(labels, chosen)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert images.is_contiguous(memory_format=layout)


def test_an_epoch_shows_no_image_twice_and_drops_the_rest() -> None:
    batches = data.Batches(small_data(), 6, seed=0)
    assert batches.per_epoch == 3
    epochs = [torch.cat([batches.next()[1] for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_stream_resumes_exactly(taken: int) -> None:
    first = data.Batches(small_data(), 6, seed=5)
    for _ in range(taken):
        first.next()
    second = data.Batches(small_data(), 6, seed=99)
    second.load_state_dict(first.state_dict())
    for _ in range(5):
        for a, b in zip(first.next(), second.next(), strict=True):
            assert torch.equal(a, b)


def test_streams_differ_by_seed_alone() -> None:
    def labels(seed: int) -> list[int]:
        torch.rand(seed)
        return data.Batches(small_data(), 20, seed=seed).next()[1].tolist()

    assert labels(1) == labels(1)
    assert labels(1) != labels(2)


@pytest.mark.parametrize("batch_size", [0, 21])
def test_batch_sizes_that_do_not_suit_are_refused(batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"batch size {batch_size} does not suit 20 .*1 to 20"):
        data.Batches(small_data(), batch_size, seed=0)


def test_evaluation_shows_every_image_once_and_unchanged() -> None:
    small = small_data()
    parts = list(data.evaluation_batches(small, batch_size=8))
    assert [len(labels) for _, labels in parts] == [8, 8, 4]
    assert torch.equal(torch.cat([images for images, _ in parts]), small.test.images.float())
    assert torch.equal(torch.cat([labels for _, labels in parts]), small.test.labels)
