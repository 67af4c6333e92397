"""Small systems around a recurrent layer. Each takes a class like nn.LSTM, or a function like it.

Shapes: T steps, B batch rows, V words, E embedding size, H hidden size, L layers, D directions.
`state` is the layer's hx: (h, c) for an LSTM and h for a GRU, each [L*D, B, H].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)

from helpers.cells import pair_of

Layer = Callable[..., nn.RNNBase]
State = Tensor | tuple[Tensor, Tensor]

# Ways to merge a row's last states [D, B, H], one a direction, into one vector.
MERGES: dict[str, Callable[[Tensor], Tensor]] = {
    "join": lambda states: torch.cat(states.unbind(), -1),  # [B, D*H]
    "sum": lambda states: states.sum(0),  # [B, H], as below
    "mean": lambda states: states.mean(0),
    "product": lambda states: states.prod(0),
}


def hidden(state: State) -> Tensor:
    """A state's h [L*D, B, H]."""
    return state if isinstance(state, Tensor) else state[0]


def detached(state: State) -> State:
    """The same values without their graph."""
    return state.detach() if isinstance(state, Tensor) else (state[0].detach(), state[1].detach())


def zero_state(layer: nn.RNNBase, rows: int) -> State:
    """A layer's zero initial state."""
    h = layer.weight_hh_l0.new_zeros(
        layer.num_layers * (2 if layer.bidirectional else 1), rows, layer.hidden_size
    )
    return pair_of(layer).cell.to_hx([h, torch.zeros_like(h)])


class WordRegressor(nn.Module):
    """A score for every word in a sentence, or one for the sentence.

    words [T] -> embedded [T, 1, E] -> output [T, 1, D*H], h_n [L*D, 1, H] -> scores [T, 1], or
    [1, 1] if one vector is read. The state is kept from call to call until `reset`.

    Output and h_n hold vectors h. Output has the last layer at every step; h_n has every layer and
    direction after its last step. To score each word, read output. To score the sentence, read the
    vectors computed from the whole sentence:

    - one layer, one direction: output[-1] and h_n[0] are the same vector; either will do.
    - more layers: output[-1] is h_n[-1]; the layers below are in h_n only.
    - two directions: in output[-1] the backward half has read only the last word, where the
      backward direction begins. Its last state, at the first word, is in output[0] and h_n[-1].
      Read h_n[-2:], which has both last states, joined or, to keep the size H, summed.
    - rows padded to one length: for a shorter row output[-1] is padding (zeros if the batch was
      packed). In a packed batch, h_n comes from each row's own last step.

    Args:
        layer: the recurrent layer's class.
        words: V.
        size: E and H.
        layers: L.
        bidirectional: whether D is 2.
        read: the head's input: "words" (the whole output), "output" (output[-1]) or "state" (h_n).
        merge: how the directions' states become one vector, if read is "state".
    """

    def __init__(
        self,
        layer: Layer,
        words: int,
        size: int = 6,
        layers: int = 1,
        bidirectional: bool = False,
        read: str = "words",
        merge: str = "join",
    ) -> None:
        super().__init__()
        self.directions = 2 if bidirectional else 1
        self.read = read
        self.merge = MERGES[merge]
        self.embedding = nn.Embedding(words, size)
        self.layer = layer(size, size, num_layers=layers, bidirectional=bidirectional)
        self.head = nn.Linear(size * (self.directions if merge == "join" else 1), 1)
        self.state: State | None = None

    def reset(self) -> None:
        """Forgets the state."""
        self.state = None

    def forward(self, words: Tensor) -> Tensor:
        state = zero_state(self.layer, 1) if self.state is None else self.state
        output, state = self.layer(self.embedding(words).unsqueeze(1), state)
        # The gradient ends at the sentence's first word: the earlier graph has been freed.
        self.state = detached(state)
        vectors = {
            "words": lambda: output.squeeze(1),
            "output": lambda: output[-1],
            "state": lambda: self.merge(hidden(state)[-self.directions :]),
        }[self.read]()
        return F.relu(self.head(vectors))


class SentenceClassifier(nn.Module):
    """A class for a sentence from both directions' last states.

    words [B, T], 0 for padding -> embedded [B, T, E] -> h_n [2, B, H] -> merged [B, 2*H] or [B, H]
    -> log-probabilities [B, classes].
    """

    def __init__(
        self, layer: Layer, words: int, size: int, width: int, classes: int, merge: str = "join"
    ) -> None:
        super().__init__()
        self.merge = MERGES[merge]
        self.embedding = nn.Embedding(words, size, padding_idx=0)
        self.layer = layer(size, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width if merge == "join" else width, classes)

    def forward(self, words: Tensor) -> Tensor:
        _, state = self.layer(self.embedding(words))
        return F.log_softmax(self.head(self.merge(hidden(state))), 1)


class DocumentClassifier(nn.Module):
    """A class for a document of any number of chunks, each a feature vector.

    B documents [chunks of each, features] -> padded [T, B, features], packed in the caller's order
    -> h_n [L, B, H] -> h_n[-1], the last layer's -> logits [B, classes].
    """

    def __init__(
        self,
        layer: Layer,
        features: int = 768,
        width: int = 100,
        layers: int = 1,
        classes: int = 2,
        padding: float = -91,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.layer = layer(features, width, num_layers=layers)
        self.head = nn.Linear(width, classes)

    def forward(self, documents: Sequence[Tensor]) -> Tensor:
        lengths = [len(d) for d in documents]
        padded = pad_sequence(list(documents), padding_value=self.padding)
        packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
        _, state = self.layer(packed)
        # Not view(-1, H): two layers would give two rows a document.
        return self.head(hidden(state)[-1])


class ConvolutionalRegressor(nn.Module):
    """A number for a time-frequency image: a convolution over frequency, then over time.

    images [B, 1, T, F] -> [B, C, T, G], where convolution and pooling leave G frequencies
    -> [B, T, C*G] -> output [B, T, H] -> output[:, -1] -> [B, 1].
    """

    def __init__(
        self,
        layer: Layer,
        frequencies: int,
        channels: int = 3,
        kernel: int = 4,
        width: int = 5,
        layers: int = 1,
    ) -> None:
        super().__init__()
        # One step wide, so steps do not mix. No bias: the normalization would remove it, and its
        # gradient would be only rounding.
        self.convolution = nn.Sequential(
            nn.Conv2d(1, channels, (1, kernel), bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d((1, 2)),
        )
        features = channels * ((frequencies - kernel + 1) // 2)
        self.layer = layer(features, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, 1)

    def features(self, images: Tensor) -> Tensor:
        # Time moves next to the batch before the rest is flattened. A bare reshape would give the
        # same shape and mix steps.
        return self.convolution(images).transpose(1, 2).flatten(2)

    def forward(self, images: Tensor, state: State) -> tuple[Tensor, State]:
        output, state = self.layer(self.features(images), state)
        return self.head(output[:, -1]), state


class SequenceAutoencoder(nn.Module):
    """An autoencoder: a sequence through one vector and back.

    sequences [T, B, *sample], S numbers in a sample -> [T, B, S] -> encoder's h_n[-1] [B, H], the
    code -> the same at every step [T, B, H] -> decoder's output [T, B, S] -> [T, B, *sample].
    Or a list of B sequences [T of each, *sample] -> the same list, packed in between.
    """

    def __init__(self, layer: Layer, sample: Sequence[int], width: int, layers: int = 1) -> None:
        super().__init__()
        size = math.prod(sample)
        self.encoder = layer(size, width, num_layers=layers)
        self.decoder = layer(width, size, num_layers=layers)

    def forward(self, sequences: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(sequences, Tensor):
            _, state = self.encoder(sequences.flatten(2))
            decoded, _ = self.decoder(hidden(state)[-1].expand(len(sequences), -1, -1))
            return decoded.reshape(sequences.shape)
        packed = pack_sequence([s.flatten(1) for s in sequences], enforce_sorted=False)
        _, state = self.encoder(packed)
        lengths = [len(s) for s in sequences]
        repeated = hidden(state)[-1].expand(max(lengths), -1, -1)
        packed = pack_padded_sequence(repeated, lengths, enforce_sorted=False)
        decoded, _ = pad_packed_sequence(self.decoder(packed)[0])
        return [decoded[: len(s), b].reshape(s.shape) for b, s in enumerate(sequences)]


class StreamClassifier(nn.Module):
    """A class for the words read so far; sentences come in parts.

    words [T, B], or [B, T] if batch_first -> output [T, B, H] or [B, T, H] -> its last step
    [B, H] -> log-probabilities [B, classes], and the state, detached, for the next call.
    """

    def __init__(
        self,
        layer: Layer,
        words: int,
        size: int,
        width: int,
        classes: int,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(words, size)
        self.layer = layer(size, width, batch_first=batch_first)
        self.head = nn.Linear(width, classes)

    def forward(self, words: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        output, state = self.layer(self.embedding(words), state)
        last = output[:, -1] if self.batch_first else output[-1]
        return F.log_softmax(self.head(last), 1), detached(state)


class Tagger(nn.Module):
    """A tag for every word.

    words [T] -> embedded [T, 1, E] -> output [T, 1, H] -> log-probabilities [T, tags].
    """

    def __init__(self, layer: Layer, words: int, tags: int, size: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.layer = layer(size, size)
        self.head = nn.Linear(size, tags)

    def forward(self, words: Tensor) -> Tensor:
        output, _ = self.layer(self.embedding(words).unsqueeze(1))
        return F.log_softmax(self.head(output.squeeze(1)), 1)


class ForwardPass(NamedTuple):
    """The results of one forward pass of NextWord, in order."""

    embedded: Tensor  # [B, T, E]
    output: Tensor  # [B, T, H]: the last layer after each word
    state: State  # h and c [L, B, H]: each layer after the last word; batch_first or not
    weights: Tensor  # [B, T, V]
    probabilities: Tensor  # [B, T, V]: [b, t] is for the word after words[b, : t + 1]


class NextWord(nn.Module):
    """A left-to-right language model that shows its parts: words [B, T] -> ForwardPass."""

    def __init__(
        self, layer: Layer, words: int = 8, size: int = 3, width: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.layer = layer(size, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, words: Tensor) -> ForwardPass:
        embedded = self.embedding(words)
        output, state = self.layer(embedded)
        weights = self.head(output)
        return ForwardPass(embedded, output, state, weights, weights.softmax(2))
