"""Synthetic sequences by DeepEcho."""

from __future__ import annotations

from benchmarks.models.job import Job, Model, Results, Swap, load, seed


def _par(swap: Swap) -> Job:
    rng = seed()
    sequences = [
        {"context": [], "data": [list(rng.standard_normal(40).cumsum()), [i % 3] * 40]}
        for i in range(20)
    ]
    par = load("deepecho").PARModel(epochs=8, cuda=False, verbose=False)
    par.fit_sequences(sequences, [], ["continuous", "categorical"])
    swap(par._model)

    def sample() -> Results:
        seed()
        first, second = par.sample_sequence([], 80)
        return {"continuous": first, "categorical": second}

    return sample


MODELS = (
    Model(
        "PAR",
        {"deepecho": "deepecho"},
        "synthetic sequences, one of 80 steps",
        "inference",
        _par,
    ),
)
