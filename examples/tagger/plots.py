"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

from tagger.batches import chunks
from tagger.side import Side


def draw(path: Path, sides: tuple[Side, Side], title: str) -> None:
    """A PNG: training loss, accuracy after each epoch, and bars of the speeds."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    of_loss, of_accuracy, of_speed = figure.subplots(1, 3)
    # The curves coincide: a wide pale one below a thin dashed one.
    styles = (
        {"color": "#f4a259", "linewidth": 6, "alpha": 0.7},
        {"color": "#1d3557", "linewidth": 1.6, "linestyle": "--"},
    )
    for side, style in zip(sides, styles, strict=True):
        epochs = len(side.history)
        size = max(1, len(side.losses) // 200)  # a mean of some steps is easier to read
        means = [sum(part) / len(part) for part in chunks(side.losses, size)]
        ends = [min((i + 1) * size, len(side.losses)) for i in range(len(means))]
        of_loss.plot(
            [epochs * end / len(side.losses) for end in ends], means, label=side.name, **style
        )
        of_accuracy.plot(
            range(1, epochs + 1),
            [row["dev_accuracy"] for row in side.history],
            marker="o",
            label=side.name,
            **style,
        )
    of_loss.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy")
    of_accuracy.set(title="Accuracy on the dev part", xlabel="epoch", ylabel="right labels")
    of_accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    for axes in (of_loss, of_accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()

    kinds = ("train", "eval")
    for i, (side, style) in enumerate(zip(sides, styles, strict=True)):
        speeds = [side.speed(kind) for kind in kinds]
        bars = of_speed.bar(
            [k + 0.4 * i - 0.2 for k in range(2)],
            speeds,
            0.38,
            color=style["color"],
            label=side.name,
        )
        ratios = [side.speed(kind) / sides[0].speed(kind) for kind in kinds]
        texts = [
            f"{s:,.0f}" + (f"\n{r:.2f}x" if i else "") for s, r in zip(speeds, ratios, strict=True)
        ]
        of_speed.bar_label(bars, texts, padding=2, fontsize=9)
    of_speed.set(title="Tokens per second", xticks=range(2), xticklabels=("training", "inference"))
    of_speed.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    of_speed.margins(y=0.2)
    of_speed.legend(loc="upper left")
    figure.savefig(path, format="png", dpi=120)
