"""Forecasting by GluonTS and PyTorch Forecasting."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

from torch import Tensor, nn

from benchmarks.models.job import Job, Learnt, Model, Results, Swap, load, seed


def _series(rng: Any, count: int, length: int) -> list[dict[str, Any]]:
    """Hourly series with a daily wave, in GluonTS's format."""
    np, pd = load("numpy"), load("pandas")
    t = np.arange(length)
    return [
        {
            "start": pd.Period("2020-01-01", freq="h"),
            "target": 10 + 3 * np.sin(t / 24 * 2 * np.pi + i) + rng.standard_normal(length),
        }
        for i in range(count)
    ]


def _train_deepar(swap: Swap, batches: int, data: Any, root: str) -> tuple[Any, Any, Tensor]:
    pl = load("lightning.pytorch")

    class Fuse(pl.Callback):  # type: ignore[name-defined,misc]
        """A callback for Lightning's Trainer."""

        def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
            swap(pl_module)
            learnt.append(Learnt(pl_module))

    learnt: list[Learnt] = []
    estimator = load("gluonts.torch").DeepAREstimator(
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
    seed()
    output = estimator.train_model(data)
    return output.trained_net, output.predictor, learnt[0]()


def _deepar_training(swap: Swap) -> Job:
    data = _series(seed(), 20, 400)

    def train() -> Results:
        with tempfile.TemporaryDirectory() as root:
            module, _, learnt = _train_deepar(swap, 15, data, root)
            loss = module.trainer.callback_metrics["train_loss"]
        return {"learnt": learnt, "loss": loss}

    return train


def _deepar_forecast(swap: Swap) -> Job:
    data = _series(seed(), 20, 400)
    with tempfile.TemporaryDirectory() as root:
        module, predictor, _ = _train_deepar(Swap("plain"), 5, data, root)
    swap(module)

    def forecast() -> Results:
        seed()
        return {"samples": load("numpy").stack([f.samples for f in predictor.predict(data)])}

    return forecast


def _forecasting(model: str, least_past: int, options: dict[str, Any], swap: Swap) -> Job:
    forecasting, pl = load("pytorch_forecasting"), load("lightning.pytorch")
    rows = [
        {"series": str(i), "step": step, "hour": float(step % 24), "value": value}
        for i, series in enumerate(_series(seed(), 12, 80))
        for step, value in enumerate(series["target"])
    ]
    frame = load("pandas").DataFrame(rows)
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
        seed()
        network = getattr(forecasting, model).from_dataset(data, **options)
        swap(network)
        learnt = Learnt(network)
        trainer = pl.Trainer(max_epochs=1, limit_train_batches=4, gradient_clip_val=0.1, **quietly)
        trainer.fit(network, data.to_dataloader(batch_size=64))
        forecast = network.predict(frame, "quantiles", trainer_kwargs=dict(quietly))
        return {"learnt": learnt(), "forecast": forecast}

    return train


MODELS = (
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
)
