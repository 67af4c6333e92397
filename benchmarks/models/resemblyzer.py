"""Speaker embeddings by Resemblyzer."""

from __future__ import annotations

from benchmarks.models.job import Job, Model, Results, Swap, load, seed


def _resemblyzer(swap: Swap) -> Job:
    encoder = load("resemblyzer").VoiceEncoder("cpu", verbose=False)
    swap(encoder)
    np = load("numpy")
    rng = seed()
    # A voice with a wandering pitch, harmonics and noise: 16 s at 16 kHz.
    t = np.arange(16 * 16_000) / 16_000
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * t) + 15 * np.sin(7 * t)) / 16_000
    wav = sum(np.sin(k * phase) / k for k in range(1, 20)) * (1 + np.sin(5 * t)) / 8
    wav = (wav + 0.01 * rng.standard_normal(len(t))).astype(np.float32)

    def embed() -> Results:
        embedding, partials, _ = encoder.embed_utterance(wav, return_partials=True)
        return {"embedding": embedding, "partials": partials}

    return embed


MODELS = (
    Model(
        "Resemblyzer",
        {"resemblyzer": "resemblyzer"},
        "speaker embedding of 16 s of sound, own weights",
        "inference",
        _resemblyzer,
    ),
)
