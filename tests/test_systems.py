"""The systems in helpers/systems.py: fused layers give torch's and the documented results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cells import CELLS, Pair, cell_named, pair_of
from helpers.systems import (
    ConvolutionalRegressor,
    DocumentClassifier,
    Layer,
    NextWord,
    SentenceClassifier,
    SequenceAutoencoder,
    State,
    StreamClassifier,
    Tagger,
    WordRegressor,
    hidden,
    zero_state,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

Step = Callable[..., tuple[Any, Tensor]]  # (model, *inputs) -> results, loss

LSTM = cell_named("lstm").layer
TRAINABLE = [cell for cell in CELLS if not cell.has_dead_units]
FORWARD = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
}
GRADIENT = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    torch.float64: {"rtol": 1e-11, "atol": 1e-13},
}
# Updates add to earlier updates' rounding.
TRAINED = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
}
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads waiting for each other at every op."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[cell.layer for cell in TRAINABLE], ids=map(str, TRAINABLE))
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


@pytest.fixture(params=[cell.layer.make_fused for cell in TRAINABLE], ids=map(str, TRAINABLE))
def fused(request: pytest.FixtureRequest) -> Layer:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def twins(
    pair: Pair, make: Callable[[Layer], nn.Module], dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """The model with torch's layer and with ours; one seed gives both the same weights."""
    theirs, ours = (seeded(lambda layer=layer: make(layer), dtype) for layer in pair.makers)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)
    return theirs, ours


def run(
    model: nn.Module, step: Step, inputs: Sequence[Tensor]
) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """One forward and backward pass: results, loss, and gradients for parameters and inputs."""
    dtype = next(model.parameters()).dtype
    leaves = [
        x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for x in inputs
    ]
    model.zero_grad()
    results, loss = step(model, *leaves)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(leaves) if x.requires_grad}
    return results, loss, gradients


def check(
    pair: Pair,
    make: Callable[[Layer], nn.Module],
    step: Step,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    lr: float = 0.1,
    **settings: float,
) -> None:
    """Results, loss and every gradient equal torch's, also after a few updates."""
    theirs, ours = models = twins(pair, make, dtype)
    expected, found = (run(model, step, inputs) for model in models)
    dead = [name for name, g in expected[2].items() if g is None or not g.any()]
    assert not dead, f"no gradient to compare: {dead}"
    assert_close(found[:2], expected[:2], **FORWARD[dtype])
    assert_close(found[2], expected[2], **GRADIENT[dtype])
    for model in models:
        rule = optimizer(model.parameters(), lr=lr, **settings)
        for _ in range(5):
            run(model, step, inputs)
            rule.step()
    assert_close(ours.state_dict(), theirs.state_dict(), **TRAINED[dtype])
    before = expected[1]
    expected, found = (run(model, step, inputs) for model in models)
    assert_close(found[:2], expected[:2], **TRAINED[dtype])
    assert found[1] < before, "the updates did not train"


# A sentence regressor.

SENTENCES = [
    (["the", "dog", "ate", "the", "apple"], 0.25),
    (["everybody", "read", "that", "book"], 0.78),
]


def indices(words: Sequence[Any], table: dict[Any, int] | None = None) -> Tensor:
    """Word indices in a table; by default, for all words in SENTENCES by first use."""
    if table is None:
        table = {w: i for i, w in enumerate(dict.fromkeys(w for s, _ in SENTENCES for w in s))}
    return torch.tensor([table[w] for w in words])


FIRST, SECOND = (indices(words) for words, _ in SENTENCES)
FORMS = [(1, False), (2, False), (1, True), (2, True)]
FORM_IDS = ["plain", "layers", "bidirectional", "layers-bidirectional"]


def regressor(layer: Layer, **settings: Any) -> WordRegressor:
    model = WordRegressor(layer, 8, **settings)
    nn.init.constant_(model.head.bias, 0.5)  # keeps scores off the ReLU's flat side
    return model


@pytest.mark.parametrize(("layers", "bidirectional"), FORMS, ids=FORM_IDS)
@pytest.mark.parametrize(
    ("read", "merge"),
    [("words", "join"), ("output", "join"), ("state", "join"), ("state", "sum")],
)
def test_regressor(
    pair: Pair, dtype: torch.dtype, layers: int, bidirectional: bool, read: str, merge: str
) -> None:
    def step(model: WordRegressor, first: Tensor, second: Tensor) -> tuple[Any, Tensor]:
        model.reset()
        results, losses = [], []
        for words, (_, target) in zip((first, second), SENTENCES, strict=True):
            scores = model(words)  # the second starts from the first's state
            results += [scores, model.state]
            losses.append(F.mse_loss(scores, torch.full_like(scores, target)))
        return results, sum(losses)

    def make(layer: Layer) -> nn.Module:
        return regressor(layer, layers=layers, bidirectional=bidirectional, read=read, merge=merge)

    check(pair, make, step, [FIRST, SECOND], dtype, torch.optim.Adam, lr=0.01)


def test_regressor_as_published() -> None:
    """Initial scores are the published ones, and 100 epochs of Adam end as with torch's layer."""
    models = []
    for layer in LSTM.makers:
        torch.manual_seed(1)
        model = WordRegressor(layer, 8)
        before = model(FIRST).detach().squeeze()
        printed = torch.tensor([0.0000, 0.0752, 0.1033, 0.0088, 0.1178])
        assert_close(before.round(decimals=4), printed, rtol=0, atol=1e-6)
        rule = torch.optim.Adam(model.parameters())
        for _ in range(100):
            for words, (_, target) in zip((FIRST, SECOND), SENTENCES, strict=True):
                model.zero_grad()
                model.reset()
                scores = model(words)
                F.mse_loss(scores, torch.full_like(scores, target)).backward()
                rule.step()
        models.append(model)
    theirs, ours = models
    assert_close(ours.state_dict(), theirs.state_dict(), **TRAINED[torch.float32])


def test_regressor_carries_its_state_until_reset(fused: Layer) -> None:
    model = seeded(lambda: regressor(fused))
    whole = model(torch.cat((FIRST, SECOND)))
    model.reset()
    assert_close(torch.cat((model(FIRST), model(SECOND))), whole, **FORWARD[torch.float64])
    carried = model(SECOND)
    model.reset()
    assert (model(SECOND) - carried).abs().amin() > 1e-9
    model.reset()
    assert_close(model(FIRST), whole[: len(FIRST)], **FORWARD[torch.float64])


# The last output and the last state: the cases listed in WordRegressor.


def layer_and_input(fused: Layer, **settings: Any) -> tuple[nn.RNNBase, Tensor]:
    return seeded(lambda: fused(6, 6, **settings)), random(5, 3, 6)


def test_last_output_is_the_last_state(fused: Layer) -> None:
    layer, x = layer_and_input(fused)
    output, state = layer(x)
    assert torch.equal(output[-1], hidden(state)[0])


def test_last_backward_output_has_read_one_step(fused: Layer) -> None:
    layer, x = layer_and_input(fused, bidirectional=True)
    output, state = layer(x)
    forward, backward = output.split(6, -1)
    assert torch.equal(forward[-1], hidden(state)[0])
    assert torch.equal(backward[0], hidden(state)[1])
    # In output[-1], the backward half does not depend on words before the last; h_n does.
    other = torch.cat((random(4, 3, 6, seed=2), x[-1:]))
    other_output, other_state = layer(other)
    assert_close(other_output[-1, :, 6:], backward[-1], **FORWARD[torch.float64])
    assert (hidden(other_state)[1] - hidden(state)[1]).abs().amin() > 1e-6
    alone, _ = layer(x[-1:])
    assert_close(alone[-1, :, 6:], backward[-1], **FORWARD[torch.float64])


def test_state_has_every_layer(fused: Layer) -> None:
    layer, x = layer_and_input(fused, num_layers=2)
    output, state = layer(x)
    assert hidden(state).shape == (2, 3, 6)
    assert torch.equal(output[-1], hidden(state)[1])
    # The lower state is a single layer's last state, with the first layer's weights.
    lower = fused(6, 6, dtype=torch.float64)
    lower.load_state_dict({n: p for n, p in layer.state_dict().items() if n.endswith("l0")})
    assert_close(hidden(lower(x)[1])[0], hidden(state)[0], **FORWARD[torch.float64])


def test_last_output_of_a_padded_row_is_padding(fused: Layer) -> None:
    layer, x = layer_and_input(fused)
    lengths = torch.tensor([3, 5, 2])
    packed, state = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    output, _ = pad_packed_sequence(packed)
    h = hidden(state)[0]
    assert torch.equal(output[-1].any(1), lengths == 5)
    assert torch.equal(output[lengths - 1, torch.arange(3)], h)
    for row, length in enumerate(lengths):
        _, alone = layer(x[:length, row])
        assert_close(h[row], hidden(alone)[0], **FORWARD[torch.float64])
    # Without packing, output[-1] and h_n agree: both have read the padding as words.
    output, state = layer(x)
    assert torch.equal(output[-1], hidden(state)[0])
    assert (output[-1] - h).abs().amax(1).gt(1e-6).tolist() == [True, False, True]
    # `lengths` skips padding without packing.
    output, state = layer(x, lengths=lengths)
    assert_close(hidden(state)[0], h, **FORWARD[torch.float64])
    assert torch.equal(output[-1].any(1), lengths == 5)


# Two directions.


@pytest.mark.parametrize("rows", [1, 4])
def test_bidirectional_specification(pair: Pair, dtype: torch.dtype, rows: int) -> None:
    def step(model: nn.RNNBase, x: Tensor) -> tuple[Any, Tensor]:
        out, state = model(x)
        h_n = hidden(state)
        assert out.shape == (rows, 4, 12)
        assert h_n.shape == (2, rows, 6)
        assert torch.equal(out[:, -1, :6], h_n[0])
        assert torch.equal(out[:, 0, 6:], h_n[1])
        return (out, state), (out - 0.5).square().mean() + h_n.square().mean()

    check(
        pair,
        lambda layer: layer(5, 6, batch_first=True, bidirectional=True),
        step,
        [random(rows, 4, 5)],
        dtype,
    )


def test_two_directions_are_two_layers(fused: Layer) -> None:
    """The backward half equals a layer over the reversed sequence, reversed back."""
    both = seeded(lambda: fused(5, 6, batch_first=True, bidirectional=True))
    x = random(2, 4, 5)
    out, _ = both(x)
    for half, suffix, turned in (
        (out[..., :6], "_l0", lambda y: y),
        (out[..., 6:], "_l0_reverse", lambda y: y.flip(1)),
    ):
        one = fused(5, 6, batch_first=True, dtype=torch.float64)
        weights = both.state_dict().items()
        one.load_state_dict(
            {n.removesuffix("_reverse"): p for n, p in weights if n.endswith(suffix)}
        )
        assert_close(turned(one(turned(x))[0]), half, **FORWARD[torch.float64])


PADDED_SENTENCES = torch.tensor([[3, 5, 1, 4, 6], [2, 7, 1, 0, 0], [4, 2, 3, 5, 0]])


@pytest.mark.parametrize("merge", ["join", "mean", "product"])
def test_sentence_classifier(pair: Pair, dtype: torch.dtype, merge: str) -> None:
    def step(model: SentenceClassifier, words: Tensor) -> tuple[Any, Tensor]:
        scores = model(words)
        return scores, F.nll_loss(scores, torch.tensor([0, 2, 1]))

    check(
        pair,
        lambda layer: SentenceClassifier(layer, 8, 5, 6, 3, merge),
        step,
        [PADDED_SENTENCES],
        dtype,
    )


def test_sentence_classifier_reads_the_ends_of_both_directions(fused: Layer) -> None:
    model = seeded(lambda: SentenceClassifier(fused, 8, 5, 6, 3))
    scores = model(PADDED_SENTENCES)
    out, _ = model.layer(model.embedding(PADDED_SENTENCES))
    ends = torch.cat((out[:, -1, :6], out[:, 0, 6:]), 1)
    assert_close(scores, model.head(ends).log_softmax(1), **FORWARD[torch.float64])
    assert_close(scores.exp().sum(1), torch.ones(3, dtype=torch.float64))
    # Padding stays a zero vector, but it is a step and changes the score.
    F.nll_loss(scores, torch.tensor([0, 2, 1])).backward()
    assert model.embedding.weight.grad.any(1).tolist() == [False] + [True] * 7
    assert (model(PADDED_SENTENCES[1:2, :3]) - scores[1]).abs().amin() > 1e-6


# Documents in chunks.

CHUNKS = (3, 1, 4, 2)


def documents() -> list[Tensor]:
    return [random(n, 768, seed=i) for i, n in enumerate(CHUNKS)]


@pytest.mark.parametrize("layers", [1, 2])
def test_document_classifier(pair: Pair, dtype: torch.dtype, layers: int) -> None:
    def step(model: DocumentClassifier, *documents: Tensor) -> tuple[Any, Tensor]:
        logits = model(documents)
        assert logits.shape == (len(CHUNKS), 2)
        return logits, F.cross_entropy(logits, torch.tensor([1, 0, 0, 1]))

    def make(layer: Layer) -> nn.Module:
        return DocumentClassifier(layer, layers=layers)

    # Not Adam: its first step divides each gradient by its own size. A few of the 300,000 gradients
    # are mostly rounding.
    check(pair, make, step, documents(), dtype)


@pytest.mark.parametrize("layers", [1, 2])
def test_documents_on_two_threads(fused: Layer, dtype: torch.dtype, layers: int) -> None:
    """Layers wide enough for threads to share a step."""

    def step(model: DocumentClassifier, *documents: Tensor) -> tuple[Any, Tensor]:
        logits = model(documents)
        return logits, logits.square().sum()

    model = seeded(lambda: DocumentClassifier(fused, layers=layers), dtype)
    logits, _, gradients = run(model, step, documents())
    torch.set_num_threads(2)
    found, _, of_found = run(model, step, documents())
    assert_close(found, logits, **FORWARD[dtype])
    assert_close(of_found, gradients, **GRADIENT[dtype])


@pytest.mark.parametrize("layers", [1, 2])
def test_documents_padding_is_not_read(fused: Layer, layers: int) -> None:
    def step(model: DocumentClassifier, *documents: Tensor) -> tuple[Any, Tensor]:
        logits = model(documents)
        return logits, logits.square().sum()

    model = seeded(lambda: DocumentClassifier(fused, layers=layers))
    logits, _, gradients = run(model, step, documents())
    for padding in (0.0, 1e30, float("nan")):
        model.padding = padding
        found, _, of_found = run(model, step, documents())
        assert_close(found, logits, **EXACT)
        assert_close(of_found, gradients, **EXACT)


@pytest.mark.parametrize("layers", [1, 2])
def test_documents_keep_the_order_of_the_caller(fused: Layer, layers: int) -> None:
    model = seeded(lambda: DocumentClassifier(fused, layers=layers))
    logits = model(documents())
    assert (logits[:, None] - logits).abs().amax(2).add(torch.eye(4)).amin() > 1e-6
    for order in ([3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]):  # the last two: descending, ascending
        found = model([documents()[i] for i in order])
        assert_close(found, logits[order], **FORWARD[torch.float64])
    for document, expected in zip(documents(), logits, strict=True):
        assert_close(model([document])[0], expected, **FORWARD[torch.float64])


# Time-frequency images.


def given_state(layer: nn.RNNBase, *parts: Tensor) -> State:
    return pair_of(layer).cell.to_hx(parts)


@pytest.mark.parametrize("layers", [1, 2])
def test_convolutional_regressor(pair: Pair, dtype: torch.dtype, layers: int) -> None:
    def step(model: ConvolutionalRegressor, images: Tensor, *parts: Tensor) -> tuple[Any, Tensor]:
        found, state = model(images, given_state(model.layer, *parts))
        assert found.shape == (4, 1)
        return (found, state), F.mse_loss(found, torch.linspace(-1, 1, 4).to(found)[:, None])

    states = [random(layers, 4, 5, seed=i) for i in (2, 3)]
    check(
        pair,
        lambda layer: ConvolutionalRegressor(layer, 12, layers=layers),
        step,
        [random(4, 1, 7, 12), *states[: len(pair.cell.states)]],
        dtype,
    )


def test_convolution_keeps_steps_and_rows_apart(fused: Layer) -> None:
    # In eval mode, because the normalization mixes them in training.
    model = seeded(lambda: ConvolutionalRegressor(fused, 12)).eval()
    images = random(4, 1, 7, 12)
    zeros = zero_state(model.layer, 4)
    features, (found, _) = model.features(images), model(images, zeros)
    assert features.shape == (4, 7, 12)
    changed = images.clone()
    changed[2, 0, 3] += 1
    moved = (model.features(changed) != features).any(2)
    assert moved.nonzero().tolist() == [[2, 3]]
    of_changed, _ = model(changed, zeros)
    differences = (of_changed - found).abs().squeeze(1)
    assert differences.gt(1e-9).tolist() == [False, False, True, False]


def test_convolutional_regressor_goes_on_from_its_state(fused: Layer) -> None:
    model = seeded(lambda: ConvolutionalRegressor(fused, 12)).eval()
    images = random(4, 1, 7, 12)
    zeros = zero_state(model.layer, 4)
    whole, _ = model(images, zeros)
    _, state = model(images[:, :, :3], zeros)
    found, _ = model(images[:, :, 3:], state)
    assert_close(found, whole, **FORWARD[torch.float64])
    afresh, _ = model(images[:, :, 3:], zeros)
    assert (afresh - whole).abs().amin() > 1e-6


# Autoencoders.


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("sample", [(2,), (3, 2), (2, 3, 2)], ids=["1d", "2d", "3d"])
def test_autoencoder(pair: Pair, dtype: torch.dtype, sample: tuple[int, ...], layers: int) -> None:
    def step(model: SequenceAutoencoder, x: Tensor) -> tuple[Any, Tensor]:
        found = model(x)
        assert found.shape == x.shape
        return found, F.mse_loss(found, x)

    def make(layer: Layer) -> nn.Module:
        return SequenceAutoencoder(layer, sample, 7, layers)

    check(pair, make, step, [random(5, 3, *sample).sigmoid()], dtype)


LENGTHS = (3, 5, 1, 5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("sample", [(2,), (3, 2)], ids=["1d", "2d"])
def test_autoencoder_of_lengths(
    pair: Pair, dtype: torch.dtype, sample: tuple[int, ...], layers: int
) -> None:
    def step(model: SequenceAutoencoder, *sequences: Tensor) -> tuple[Any, Tensor]:
        found = model(list(sequences))
        assert [f.shape for f in found] == [s.shape for s in sequences]
        return found, F.mse_loss(torch.cat(found), torch.cat(sequences))

    def make(layer: Layer) -> nn.Module:
        return SequenceAutoencoder(layer, sample, 7, layers)

    sequences = [random(n, *sample, seed=i).sigmoid() for i, n in enumerate(LENGTHS)]
    check(pair, make, step, sequences, dtype)


def test_autoencoder_of_lengths_is_that_of_each(fused: Layer) -> None:
    model = seeded(lambda: SequenceAutoencoder(fused, (3, 2), 7))
    sequences = [random(n, 3, 2, seed=i) for i, n in enumerate(LENGTHS)]
    for found, sequence in zip(model(sequences), sequences, strict=True):
        alone = model(sequence.unsqueeze(1)).squeeze(1)
        assert_close(found, alone, **FORWARD[torch.float64])


def test_autoencoder_flattens_samples_only(fused: Layer) -> None:
    """A [3, 2] sample gives the same results as its six numbers in order."""
    model = seeded(lambda: SequenceAutoencoder(fused, (3, 2), 7))
    flat = seeded(lambda: SequenceAutoencoder(fused, (6,), 7))
    x = random(5, 3, 3, 2)
    assert_close(model(x).reshape(5, 3, 6), flat(x.reshape(5, 3, 6)), **EXACT)


def test_autoencoder_learns_a_ramp(pair: Pair) -> None:
    """Two sequences, each of five points in two dimensions, in one batch."""
    ramp = torch.arange(10, dtype=torch.float64).div(10).reshape(2, 5).t()
    x = ramp[..., None].expand(5, 2, 2).contiguous()
    theirs, ours = twins(pair, lambda layer: SequenceAutoencoder(layer, (2,), 20), torch.float64)
    for model in (theirs, ours):
        rule = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(150):
            rule.zero_grad()
            F.mse_loss(model(x), x).backward()
            rule.step()
    # A constant output has a loss of 0.0825, a constant for each sequence 0.02.
    assert F.mse_loss(ours(x), x) < 0.005
    assert_close(ours(x), theirs(x), **TRAINED[torch.float64])


# Sentences in parts.

PARTS = torch.tensor([[[1, 2], [3, 4], [5, 1]], [[6, 7], [8, 9], [7, 6]]])  # [parts, T, B]


@pytest.mark.parametrize("batch_first", [False, True], ids=["steps-first", "batch-first"])
def test_stream_classifier(pair: Pair, dtype: torch.dtype, batch_first: bool) -> None:
    def step(model: StreamClassifier, parts: Tensor) -> tuple[Any, Tensor]:
        state, results, loss = None, [], 0
        for words in parts:
            scores, state = model(words, state)
            loss = loss + F.nll_loss(scores, torch.tensor([1, 0]))
            results += [scores, state]
        return results, loss

    check(
        pair,
        lambda layer: StreamClassifier(layer, 10, 4, 5, 2, batch_first),
        step,
        [PARTS.transpose(1, 2) if batch_first else PARTS],
        dtype,
        momentum=0.9,
    )


def test_stream_classifier_in_both_layouts(fused: Layer) -> None:
    steps, rows = (
        seeded(lambda first=first: StreamClassifier(fused, 10, 4, 5, 2, first))
        for first in (False, True)
    )
    scores, state = steps(PARTS[0])
    of_rows, state_of_rows = rows(PARTS[0].t())
    assert scores.shape == (2, 2)
    assert hidden(state).shape == hidden(state_of_rows).shape == (1, 2, 5)
    assert_close((of_rows, state_of_rows), (scores, state), **FORWARD[torch.float64])


def test_stream_classifier_goes_on_without_the_past_of_its_state(fused: Layer) -> None:
    model = seeded(lambda: StreamClassifier(fused, 10, 4, 5, 2))
    whole, _ = model(PARTS.flatten(0, 1))
    first, state = model(PARTS[0])
    assert not hidden(state).requires_grad
    second, _ = model(PARTS[1], state)
    assert_close(second, whole, **FORWARD[torch.float64])
    first[:, 0].sum().backward()
    model.zero_grad()
    # Words in the first part get no gradient through the detached state; in one piece they do.
    second[:, 0].sum().backward()
    of_second = [False] * 6 + [True] * 4
    assert model.embedding.weight.grad.any(1).tolist() == of_second
    model.zero_grad()
    whole[:, 0].sum().backward()
    assert model.embedding.weight.grad.any(1).tolist() == [False] + [True] * 9


# The tutorial on sequence models.


@pytest.mark.parametrize("layer", LSTM.makers, ids=["torch", "fused"])
def test_tutorial(layer: Layer) -> None:
    torch.manual_seed(1)
    # The published numbers depend on these draws in this order.
    lstm = layer(3, 3)
    inputs = [torch.randn(1, 3) for _ in range(5)]
    start = (torch.randn(1, 1, 3), torch.randn(1, 1, 3))
    outputs, state = [], start
    for x in inputs:
        out, state = lstm(x.view(1, 1, -1), state)
        outputs.append(out)
    sequence = torch.cat(inputs).view(5, 1, 3)
    at_once = lstm(sequence, start)
    assert_close(at_once, (torch.cat(outputs), state), **FORWARD[torch.float32])

    start = (torch.randn(1, 1, 3), torch.randn(1, 1, 3))
    out, (h, c) = lstm(sequence, start)
    printed = [
        [-0.0187, 0.1713, -0.2944],
        [-0.3521, 0.1026, -0.2971],
        [-0.3191, 0.0781, -0.1957],
        [-0.1634, 0.0941, -0.1637],
        [-0.3368, 0.0959, -0.0538],
    ]
    as_printed = {"rtol": 0, "atol": 1e-6}
    assert_close(out.squeeze(1).round(decimals=4), torch.tensor(printed), **as_printed)
    assert_close(
        c.flatten().round(decimals=4), torch.tensor([-0.9825, 0.4715, -0.0633]), **as_printed
    )
    assert torch.equal(h[0], out[-1])


TAGS = {"DET": 0, "NN": 1, "V": 2}
TAGGED = [
    (["The", "dog", "ate", "the", "apple"], ["DET", "NN", "V", "DET", "NN"]),
    (["Everybody", "read", "that", "book"], ["NN", "V", "DET", "NN"]),
]


def test_tagger(pair: Pair) -> None:
    table = {w: i for i, w in enumerate(dict.fromkeys(w for s, _ in TAGGED for w in s))}
    assert len(table) == 9  # "The" and "the" are two words
    data = [(indices(words, table), indices(tags, TAGS)) for words, tags in TAGGED]

    def step(model: Tagger, *sentences: Tensor) -> tuple[Any, Tensor]:
        scores = [model(words) for words in sentences]
        return scores, sum(F.nll_loss(s, tags) for s, (_, tags) in zip(scores, data, strict=True))

    def make(layer: Layer) -> nn.Module:
        return Tagger(layer, 9, 3)

    check(pair, make, step, [w for w, _ in data], torch.float32)

    theirs, ours = twins(pair, make, torch.float32)
    for model in (theirs, ours):
        rule = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(300):
            for words, tags in data:
                model.zero_grad()
                F.nll_loss(model(words), tags).backward()
                rule.step()
    for words, tags in data:
        assert torch.equal(ours(words).argmax(1), tags)
        assert_close(ours(words), theirs(words), **TRAINED[torch.float32])
    assert_close(ours.state_dict(), theirs.state_dict(), **TRAINED[torch.float32])


# The parts of a forward pass.

VOCABULARY = ["Colin", "was", "here", "went", "away", "[UNK]", "[EOS]", "[PAD]"]
PAD = VOCABULARY.index("[PAD]")
BATCH = torch.tensor(
    [
        [VOCABULARY.index(word) for word in text.split()]
        for text in ("Colin was here [EOS] [PAD]", "Colin went away [UNK] [EOS]")
    ]
)


def test_next_word(pair: Pair, dtype: torch.dtype) -> None:
    def step(model: NextWord, words: Tensor) -> tuple[Any, Tensor]:
        found = model(words)
        following = words[:, 1:].flatten()
        loss = F.cross_entropy(found.weights[:, :-1].flatten(0, 1), following, ignore_index=PAD)
        return tuple(found), loss

    check(pair, NextWord, step, [BATCH], dtype)


def test_next_word_shapes(fused: Layer) -> None:
    model = seeded(lambda: NextWord(fused))
    found = model(BATCH)
    assert found.embedded.shape == (2, 5, 3)
    assert found.output.shape == (2, 5, 4)
    parts = pair_of(model.layer).cell.from_hx(found.state)
    assert [p.shape for p in parts] == [(2, 2, 4)] * len(parts)  # [L, B, H], not batch first
    assert found.weights.shape == found.probabilities.shape == (2, 5, 8)
    assert torch.equal(found.embedded[1, 1], model.embedding.weight[VOCABULARY.index("went")])


def test_next_word_vectors_in_output_and_state(fused: Layer) -> None:
    """Only two: for each sentence, the last layer's h after the last word."""
    model = seeded(lambda: NextWord(fused))
    found = model(BATCH)
    h, *others = pair_of(model.layer).cell.from_hx(found.state)
    in_output = [
        [(sentence, layer, t) for t in range(5) if torch.equal(found.output[sentence, t], vector)]
        for layer, states in enumerate(h)
        for sentence, vector in enumerate(states)
    ]
    assert in_output == [[], [], [(0, 1, 4)], [(1, 1, 4)]]
    for c in others:
        assert not any(torch.equal(v, w) for v in c.flatten(0, 1) for w in h.flatten(0, 1))


def test_next_word_state_is_after_the_padding(fused: Layer) -> None:
    """With `lengths`, the state is after [EOS], step 3 of the first row."""
    model = seeded(lambda: NextWord(fused))
    found = model(BATCH)
    assert not torch.equal(hidden(found.state)[1, 0], found.output[0, 3])
    output, state = model.layer(found.embedded, lengths=[4, 5])
    assert_close(output[0, :4], found.output[0, :4], **FORWARD[torch.float64])
    assert torch.equal(hidden(state)[1, 0], output[0, 3])
    assert torch.equal(hidden(state)[1, 1], output[1, 4])


def test_next_word_probabilities(fused: Layer) -> None:
    model = seeded(lambda: NextWord(fused))
    probabilities = model(BATCH).probabilities
    assert probabilities.min() > 0
    assert_close(probabilities.sum(2), torch.ones(2, 5, dtype=torch.float64))
    # Entry [b, t] depends only on the prefix words[b, : t + 1]. "Colin was" is [0, 1].
    for b in range(2):
        for t in range(5):
            prefix = model(BATCH[b : b + 1, : t + 1]).probabilities
            assert_close(prefix[0, -1], probabilities[b, t], **FORWARD[torch.float64])
    # Both sentences begin with "Colin" and then differ.
    assert_close(probabilities[0, 0], probabilities[1, 0], **FORWARD[torch.float64])
    assert (probabilities[0, 1] - probabilities[1, 1]).abs().amin() > 1e-6


def test_next_word_after_nothing(pair: Pair) -> None:
    """The empty prefix has no index, and a layer refuses empty input: models add a start token."""
    messages = []
    for layer in pair.makers:
        with pytest.raises(RuntimeError, match="sequence length to be larger than 0") as caught:
            seeded(lambda layer=layer: NextWord(layer))(BATCH[:, :0])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
