"""Train a language model on the Penn Treebank, exactly or approximately.

    python -m examples.ptb --data DIR --epochs 5
    python -m examples.ptb --data DIR --methods-json '{"decoder": "crs_unscaled"}'

Run it from the root of the repository. The model is the LSTM of Zaremba, Sutskever, Vinyals 2014,
with their batch of 20 streams of 35 words, gradients clipped at a norm of 5, and a learning rate
that stays at 1 for 6 of 39 epochs and falls by 0.8 in every later one, scaled to `--epochs`.
"""

import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from examples import arguments, program, text_data
from examples.language_models import LstmLanguageModel
from examples.settings import Settings
from examples.training import Batch, Forward, Task

LENGTH = 35
MAX_GRADIENT_NORM = 5.0


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the arguments say.

    Args:
        argv: Arguments; those of the command line by default.

    Returns:
        The results, as `program.run` describes them.

    Raises:
        ConfigError: If an argument, the data or a checkpoint is not legal.
    """
    return program.run(parser().parse_args(argv), prepare)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    made = ArgumentParser(
        prog="python -m examples.ptb",
        description="Train a language model, exactly or approximately.",
    )
    group = made.add_argument_group("task")
    group.add_argument("--data", type=Path, metavar="DIR", required=True, help="ptb.train.txt, ...")
    group.add_argument("--units", type=int, default=650, help="of each of the two layers")
    arguments.add_arguments(made)
    made.set_defaults(batch_size=20, epochs=39, optimizer="sgd-plain", lr_schedule="late")
    return made


def prepare(given: Namespace) -> Callable[[Settings], Task]:
    """Read the text; return what makes a task of predicting its next word.

    Raises:
        ConfigError: If there is no text, or it does not fill a batch.
    """
    corpus = text_data.ptb(given.data)

    def fresh_task(settings: Settings) -> Task:
        train, test = (text.to(settings.device) for text in (corpus.train, corpus.test))
        model = LstmLanguageModel(len(corpus.words), settings.batch_size, given.units)
        return Task(
            name=f"lstm of {given.units} units on {len(corpus.train)} words of {corpus.name}",
            model=model.to(settings.device),
            batches=text_data.Segments(train, settings.batch_size, LENGTH),
            loss=summed_cross_entropy,
            score=lambda model: perplexity(model, test, settings.batch_size),
            score_name="test_perplexity",
            max_gradient_norm=MAX_GRADIENT_NORM,
        )

    return fresh_task


def summed_cross_entropy(forward: Forward, batch: Batch) -> Tensor:
    """Return the cross entropy summed over the steps, mean over the streams, in nats.

    The learning rate and the norm at which gradients are clipped are meant for it.
    """
    words, following = batch
    logits = forward(words)
    return F.cross_entropy(logits.flatten(0, 1), following.flatten()) * words.shape[1]


def perplexity(model: nn.Module, text: Tensor, batch_size: int) -> float:
    """Return exp of the mean cross entropy of the next word, the state at zero before and after.

    The training text begins anew after it.
    """
    assert isinstance(model, LstmLanguageModel)
    segments = text_data.Segments(text, batch_size, LENGTH)
    model.state.zero_()
    total = 0.0
    for _ in range(segments.per_epoch):
        words, following = segments.next()
        total += float(F.cross_entropy(model(words).flatten(0, 1), following.flatten()))
    model.state.zero_()
    return math.exp(total / segments.per_epoch)


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
