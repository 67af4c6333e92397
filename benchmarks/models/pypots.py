"""Imputation and clustering by PyPOTS."""

from __future__ import annotations

from typing import Any

from benchmarks.models.job import Job, Learnt, Model, Results, Swap, load, seed, weights


def _with_gaps(samples: int, steps: int, features: int) -> dict[str, Any]:
    """Series with a fifth of the values missing, in PyPOTS's format."""
    np = load("numpy")
    rng = seed()
    x = np.cumsum(rng.standard_normal((samples, steps, features)), axis=1) / steps**0.5
    x[rng.random(x.shape) < 0.2] = np.nan
    return {"X": x.astype(np.float32)}


def _brits(swap: Swap) -> Job:
    data = _with_gaps(64, 48, 10)

    def fit() -> Results:
        seed()
        brits = load("pypots.imputation").BRITS(
            48, 10, rnn_hidden_size=64, batch_size=32, epochs=1, device="cpu", verbose=False
        )
        swap(brits.model)
        learnt = Learnt(brits.model)
        brits.fit(data)
        return {"learnt": learnt(), "imputed": brits.impute(data)}

    return fit


def _vader(swap: Swap) -> Job:
    data = _with_gaps(32, 12, 5)

    def fit() -> Results:
        seed()
        vader = load("pypots.clustering").VaDER(
            12, 5, n_clusters=2, rnn_hidden_size=32, d_mu_stddev=2, epochs=1, pretrain_epochs=1,
            device="cpu", verbose=False,
        )  # fmt: skip
        swap(vader.model)
        vader.fit(data)
        return {"weights": weights(vader.model)}  # some were uninitialized before fit

    return fit


MODELS = (
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
)
