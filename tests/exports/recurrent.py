"""Taggers of sequences: an embedding, recurrent layers, and a label per token."""

import torch
from torch import Tensor, nn

_VOCABULARY = 50
_LABELS = 7


class LstmTagger(nn.Module):
    """Two bidirectional LSTM layers; returns the labels' scores and the last state."""

    def __init__(self, *, width: int = 12, hidden: int = 10) -> None:
        super().__init__()
        self.words = nn.Embedding(_VOCABULARY, width, padding_idx=0)
        self.layers = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.labels = nn.Linear(2 * hidden, _LABELS)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, (_, cell) = self.layers(self.words(tokens))
        return self.labels(x), cell


class GruTagger(nn.Module):
    """A convolution over neighbours, a GRU that starts from a state that is given, log-probabilities."""

    def __init__(self, *, width: int = 12, hidden: int = 10) -> None:
        super().__init__()
        self.words = nn.Embedding(_VOCABULARY, width)
        self.neighbours = nn.Conv1d(width, width, 3, padding=1)
        self.layer = nn.GRU(width, hidden, batch_first=True)
        self.labels = nn.Linear(hidden, _LABELS)

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.neighbours(self.words(tokens).transpose(1, 2))).transpose(1, 2)
        x, last = self.layer(x, state.transpose(0, 1).contiguous())
        return torch.log_softmax(self.labels(x), dim=-1), last.transpose(0, 1)
