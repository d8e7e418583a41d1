"""A recurrent language model whose products are those of linear layers.

Zaremba, Sutskever, Vinyals 2014, "Recurrent neural network regularization" (arXiv:1409.2329), the
medium model: two LSTM layers of 650 units, unrolled for 35 steps, dropout of 0.5 between layers.
Adelman, Silberstein 2018 (arXiv:1805.08079) train it with sampled products.
"""

import torch
from torch import Tensor, nn


class LstmLanguageModel(nn.Module):
    """Embedding, LSTM layers and a decoder; the state goes on from batch to batch.

    All steps of a layer share one product with the inputs; those with the state follow each other.
    """

    state: Tensor

    def __init__(
        self, words: int, batch_size: int, units: int = 650, layers: int = 2, dropout: float = 0.5
    ) -> None:
        """Set up the layers, and a state of zeros for a batch."""
        super().__init__()
        self.embedding = nn.Embedding(words, units)
        self.inputs = nn.ModuleList(nn.Linear(units, 4 * units) for _ in range(layers))
        self.recurrent = nn.ModuleList(
            nn.Linear(units, 4 * units, bias=False) for _ in range(layers)
        )
        self.decoder = nn.Linear(units, words)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("state", torch.zeros(layers, 2, batch_size, units))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.05, 0.05)

    def forward(self, words: Tensor) -> Tensor:
        """Map numbers of words `[B, T]` to logits of the words that follow, `[B, T, words]`."""
        x, states = self.dropout(self.embedding(words)), []
        # A copy: backward needs it after the state has gone on.
        pairs = zip(self.inputs, self.recurrent, self.state.clone().unbind(), strict=True)
        for from_input, from_state, before in pairs:
            hidden, cell = before.unbind()
            outputs = []
            for step in from_input(x).unbind(1):
                gates = step + from_state(hidden)
                take, keep, give, new = gates.chunk(4, dim=-1)
                cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
                hidden = give.sigmoid() * cell.tanh()
                outputs.append(hidden)
            states.append(torch.stack([hidden, cell]))
            x = self.dropout(torch.stack(outputs, dim=1))
        # Gradients end where the batch ends: backpropagation is truncated.
        self.state.copy_(torch.stack(states).detach())
        logits: Tensor = self.decoder(x)
        return logits
