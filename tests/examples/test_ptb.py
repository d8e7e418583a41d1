"""Text is read as published and cut into streams; the LSTM is torch's, of linear layers."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from examples import ptb, text_data
from examples.language_models import LstmLanguageModel
from graphpass import ConfigError

LINES = ["the cat sat", "<unk> cat ran on", "on the mat"]
BATCH, UNITS, LENGTH = 2, 6, 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, repeats in (("train", 12), ("valid", 1), ("test", 3)):
        text = "".join(f" {line} \n" for line in LINES * repeats)
        (tmp_path / f"ptb.{split}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptb, "LENGTH", LENGTH)


def test_words_are_numbered_and_sentences_end(folder: Path) -> None:
    corpus = text_data.ptb(folder)
    text = " ".join(corpus.words[number] for number in corpus.valid)
    assert text == "the cat sat <eos> <unk> cat ran on <eos> on the mat <eos>"
    assert len(corpus.train) == 12 * len(corpus.valid)


def test_words_that_training_lacks_are_unknown(folder: Path) -> None:
    (folder / "ptb.test.txt").write_text("the dog\n")
    corpus = text_data.ptb(folder)
    assert [corpus.words[number] for number in corpus.test] == ["the", "<unk>", "<eos>"]


def test_text_that_cannot_be_used_is_refused(folder: Path) -> None:
    corpus = text_data.ptb(folder)
    with pytest.raises(ConfigError, match="13 words do not fill a batch of 20 streams"):
        text_data.Segments(corpus.valid, 20, LENGTH)
    (folder / "ptb.test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        text_data.ptb(folder)
    (folder / "ptb.test.txt").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        text_data.ptb(folder)
    (folder / "ptb.test.txt").unlink()
    with pytest.raises(ConfigError, match=r"no ptb\.test\.txt\. Give the folder"):
        text_data.ptb(folder)
    for split in ("train", "valid", "test"):
        (folder / f"ptb.{split}.txt").write_text("the cat\n" if split == "train" else "the dog\n")
    with pytest.raises(ConfigError, match="'dog' is not in the training split"):
        text_data.ptb(folder)


def test_streams_are_read_on_and_begin_anew() -> None:
    segments = text_data.Segments(torch.arange(17), BATCH, LENGTH)
    assert segments.per_epoch == 2
    first, second = segments.next(), segments.next()
    assert first[0].tolist() == [[0, 1, 2], [8, 9, 10]]
    assert first[1].tolist() == [[1, 2, 3], [9, 10, 11]]
    assert second[0].tolist() == [[3, 4, 5], [11, 12, 13]]
    resumed = text_data.Segments(torch.arange(17), BATCH, LENGTH)
    resumed.load_state_dict({"position": 1})
    assert torch.equal(resumed.next()[0], second[0])
    assert torch.equal(segments.next()[0], first[0])


def test_the_model_is_torchs_lstm() -> None:
    """Logits, gradients, and the state that the next batch begins with; in float64."""
    model = LstmLanguageModel(11, BATCH, UNITS, dropout=0.0).double()
    lstm = nn.LSTM(UNITS, UNITS, 2, batch_first=True).double()
    with torch.no_grad():
        for layer in range(2):
            # torch has the gates as input, forget, cell, output.
            order = torch.tensor([0, 1, 3, 2])

            def rows(value: torch.Tensor, order: torch.Tensor = order) -> torch.Tensor:
                return value.unflatten(0, (4, UNITS))[order].flatten(0, 1)

            getattr(lstm, f"weight_ih_l{layer}").copy_(rows(model.inputs[layer].weight))
            getattr(lstm, f"bias_ih_l{layer}").copy_(rows(model.inputs[layer].bias))
            getattr(lstm, f"weight_hh_l{layer}").copy_(rows(model.recurrent[layer].weight))
            getattr(lstm, f"bias_hh_l{layer}").zero_()
    state = None
    for _ in range(2):
        words = torch.randint(11, (BATCH, LENGTH))
        before = model.state.clone()
        hidden, state = lstm(model.embedding(words), state)
        expected = model.decoder(hidden)
        logits = model(words)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(model.state, torch.stack(state, dim=1))
        assert not torch.equal(model.state, before)
        cotangent = torch.randn_like(logits)
        weights = [model.embedding.weight, model.decoder.weight]
        mine = torch.autograd.grad(logits, weights, cotangent)
        torch.testing.assert_close(mine, torch.autograd.grad(expected, weights, cotangent))
        state = tuple(part.detach() for part in state)


@pytest.mark.usefixtures("_short")
def test_perplexity_of_a_model_that_knows_nothing(folder: Path) -> None:
    corpus = text_data.ptb(folder)
    model = LstmLanguageModel(len(corpus.words), BATCH, UNITS).eval()
    nn.init.zeros_(model.decoder.weight)
    nn.init.zeros_(model.decoder.bias)
    model.state.fill_(1.0)
    with torch.no_grad():
        found = ptb.perplexity(model, corpus.test, BATCH)
    assert math.isclose(found, len(corpus.words), rel_tol=1e-5)
    assert not model.state.any()


def arguments(folder: Path, *more: str) -> list[str]:
    common = f"--units {UNITS} --batch-size {BATCH} --threads 1 --epochs 2".split()
    return ["--data", str(folder), *common, *more]


@pytest.mark.usefixtures("_short")
def test_training_lowers_the_perplexity_and_resumes_exactly(folder: Path) -> None:
    whole, half = folder / "whole.pt", folder / "half.pt"
    eager = arguments(folder, "--backend", "eager")
    result = ptb.main([*eager, "--checkpoint", str(whole)])
    [run] = result["runs"]
    assert run["epochs"][1]["test_perplexity"] < run["epochs"][0]["test_perplexity"] < 10
    ptb.main([*eager, "--checkpoint", str(half), "--max-steps", str(run["steps"] // 2 + 1)])
    again = ptb.main([*eager, "--resume", str(half)])
    assert again["runs"][0]["epochs"][1]["train_loss"] == run["epochs"][1]["train_loss"]


@pytest.mark.usefixtures("_short", "interpreted")
def test_products_of_every_layer_are_sites(folder: Path) -> None:
    methods = '{"decoder": "zero"}'
    result = ptb.main(arguments(folder, "--methods-json", methods, "--max-steps", "3"))
    [report] = result["reports"]
    rows = {(row["where"], row["gradient"]): row["method"] for row in report["rows"]}
    assert {"inputs.0", "inputs.1", "recurrent.0#3", "recurrent.1#3", "decoder"} <= {
        where for where, _ in rows
    }
    assert rows["decoder", "weight"] == "zero"
