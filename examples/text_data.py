"""Text as numbers of words, and the stream of training batches made from it.

The Penn Treebank in the form that Mikolov published (10,000 words, others `<unk>`): three files,
`ptb.train.txt`, `ptb.valid.txt` and `ptb.test.txt`, a sentence a line, words separated by spaces.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphpass.errors import ConfigError

END, UNKNOWN = "<eos>", "<unk>"
_SPLITS = ("train", "valid", "test")
# Where the files stand in the published archive, and where else they are usually kept.
_FOLDERS = (".", "ptb", "data", "simple-examples/data")


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text in three splits.

    Attributes:
        name: For reports and checkpoints.
        train: Numbers of the words in order, `int64 [N]`; every sentence ends with `<eos>`.
        valid: Likewise.
        test: Likewise.
        words: The words, by number; those of the training split.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    words: tuple[str, ...]


def ptb(directory: Path) -> Corpus:
    """Read the Penn Treebank.

    Args:
        directory: The folder with the three files, or one that has it as `ptb`, `data` or
            `simple-examples/data`.

    Raises:
        ConfigError: If files are missing or are no text, or if a split has a word that the training
            split has not, and that has no `<unk>`.
    """
    train, valid, test = (_words(_find(directory, f"ptb.{split}.txt")) for split in _SPLITS)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(train))}
    return Corpus(
        "ptb",
        train=_numbered(train, numbers, directory),
        valid=_numbered(valid, numbers, directory),
        test=_numbered(test, numbers, directory),
        words=tuple(numbers),
    )


def _find(directory: Path, name: str) -> Path:
    for folder in _FOLDERS:
        if (path := directory / folder / name).is_file():
            return path
    raise ConfigError(
        f"cannot read the Penn Treebank from {directory}: no {name}. Give the folder that holds "
        "ptb.train.txt, ptb.valid.txt and ptb.test.txt"
    )


def _words(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    words = [word for line in text.splitlines() for word in (*line.split(), END)]
    if not words:
        raise ConfigError(f"{path} is empty")
    return words


def _numbered(words: list[str], numbers: dict[str, int], directory: Path) -> Tensor:
    unknown = numbers.get(UNKNOWN)
    found = [numbers.get(word, unknown) for word in words]
    if None in found:
        word = words[found.index(None)]
        raise ConfigError(f"{directory}: {word!r} is not in the training split, nor is {UNKNOWN}")
    return torch.tensor(found)


class Segments:
    """A text cut into as many streams as a batch has samples, read on in every batch.

    A batch holds the next `length` words of every stream, and those that follow each. After
    `per_epoch` batches it begins anew; words that do not fill a last batch are left out.
    """

    def __init__(self, text: Tensor, batch_size: int, length: int) -> None:
        """Cut the text.

        Args:
            text: Numbers of words, `int64 [N]`.
            batch_size: Streams, B.
            length: Words of a stream in a batch, T.

        Raises:
            ConfigError: If the text does not fill a batch.
        """
        words = len(text) // batch_size
        self.per_epoch = (words - 1) // length
        if self.per_epoch < 1:
            raise ConfigError(
                f"{len(text)} words do not fill a batch of {batch_size} streams of {length} words: "
                "give a smaller batch size"
            )
        self._streams = text[: words * batch_size].view(batch_size, words)
        self._length = length
        self._position = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the next words and those that follow them: `int64 [B, T]` both."""
        start = self._position * self._length
        self._position = (self._position + 1) % self.per_epoch
        end = start + self._length
        # Copies: every batch has the same strides.
        words, following = self._streams[:, start:end], self._streams[:, start + 1 : end + 1]
        return words.contiguous(), following.contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream that `state` was taken from."""
        self._position = state["position"]
