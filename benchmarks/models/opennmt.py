"""Translation by OpenNMT-py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.models.job import Job, Learnt, Model, Results, Swap, load, seed


def _translation(swap: Swap) -> Job:
    models, trainers = load("onmt.model_builder"), load("onmt.trainer")
    optimizers = load("onmt.utils.optimizers")
    parser = load("onmt.utils.parse").ArgumentParser()
    load("onmt.opts").train_opts(parser)
    # OpenNMT-py's command line options, without files for texts and vocabularies.
    chosen = "--data none --src_vocab none --encoder_type brnn --rnn_type GRU --input_feed 0"
    chosen += " --layers 2 --hidden_size 128 --word_vec_size 64 --dropout 0.2"
    chosen += " --optim adam --learning_rate 0.001"
    options, _ = parser.parse_known_args(chosen.split())
    options.data = {}
    parser.update_model_opts(options)
    parser.validate_model_opts(options)
    words = load("pyonmttok").build_vocab_from_tokens(
        [f"word {i}" for i in range(200)], special_tokens=["<unk>", "<blank>", "<s>", "</s>"]
    )
    vocabularies = {"src": words, "tgt": words, "decoder_start_token": "<s>"}
    seed()
    batches = []
    for _ in range(4):  # the translation is the reversed text
        text, lengths = torch.randint(4, 204, (16, 20, 1)), torch.randint(5, 21, (16,))
        target = F.pad(F.pad(text.flip(1), (0, 0, 1, 0), value=2), (0, 0, 0, 1), value=3)
        batch = {"src": text, "srclen": lengths, "tgt": target, "tgtlen": torch.full((16,), 22)}
        batches.append((batch, 0))

    def train() -> Results:
        seed()
        model = models.build_model(options, options, vocabularies, None, -1)
        swap(model)
        learnt = Learnt(model)
        optimizer = optimizers.Optimizer.from_opt(model, options)
        trainer = trainers.build_trainer(options, -1, model, vocabularies, optimizer)
        stats = trainer.train(batches, len(batches), valid_steps=100)
        return {"learnt": learnt(), "loss": stats.loss}

    return train


MODELS = (
    Model(
        "OpenNMT-py",
        {"onmt": "OpenNMT-py"},
        "translation, 4 batches by its Trainer; its StdRNNDecoder asks for an nn.GRU",
        "training",
        _translation,
        subclass=True,
    ),
)
