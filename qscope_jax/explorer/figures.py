"""Pictures of results for a person to look at; the only place that knows matplotlib, drawn without a screen."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from qscope_jax.files.atomic import atomic_path

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#595959"  # Okabe & Ito: apart for every eye
_COLUMNS = 6
_WIDTH, _HEAD, _CURVES, _SMALL, _FOOT = 12.0, 1.5, 2.3, 1.35, 1.2  # inches

Metrics = Mapping[int, Mapping[str, Any]]


def draw_quality(path: Path, metrics: Metrics, *, title: str, note: str) -> None:
    """Draws SAEs' quality by layer: FVU, CE recovered, dead share, and a histogram of firing rates per layer.

    Args:
      path: the PNG to make.
      metrics: per layer, from `summarize_evaluation`.
      title: names the SAEs and the model.
      note: a line below the title.
    """
    rows = -(-len(metrics) // _COLUMNS)
    height = _HEAD + _CURVES + rows * _SMALL + _FOOT
    figure = Figure(figsize=(_WIDTH, height), dpi=110)
    FigureCanvasAgg(figure)
    at = lambda inches: 1 - inches / height  # noqa: E731  from the top
    figure.text(0.065, at(0.35), title, fontsize=15, fontweight="bold", va="center")
    figure.text(0.065, at(0.77), _caption(metrics, note), fontsize=9.5, color=_GREY, va="center", linespacing=1.5)
    sides = {"left": 0.065, "right": 0.985}
    _curves(
        figure,
        figure.add_gridspec(1, 3, top=at(_HEAD), bottom=at(_HEAD + _CURVES - 0.55), wspace=0.24, **sides),
        metrics,
    )
    small = figure.add_gridspec(
        rows, _COLUMNS, top=at(_HEAD + _CURVES + 0.45), bottom=0.6 / height, hspace=0.45, wspace=0.12, **sides
    )
    figure.text(
        0.065, at(_HEAD + _CURVES + 0.12), "How often latents fire", fontsize=11, fontweight="bold", va="center"
    )
    _histograms(figure, small, metrics)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_profile(
    path: Path, layers: Sequence[int], scores: Sequence[float], aurocs: Sequence[float], found: Sequence[int], *,
    title: str, note: str,
) -> None:  # fmt: skip
    """Draws how well each layer knows a concept: its best feature's score and held-out AUROC, and how many it has.

    Args:
      path: the PNG to make.
      layers: the layers' numbers, ascending.
      scores: of each layer's best feature.
      aurocs: the same features' on documents that did not choose them.
      found: features with q < 0.05, per layer.
      title: names the concept and the SAEs.
      note: a line below the title.
    """
    figure = Figure(figsize=(_WIDTH, 4.0), dpi=110)
    FigureCanvasAgg(figure)
    figure.text(0.065, 0.93, title, fontsize=15, fontweight="bold", va="center")
    figure.text(0.065, 0.85, note, fontsize=9.5, color=_GREY, va="center")
    grid = figure.add_gridspec(1, 3, top=0.7, bottom=0.14, left=0.065, right=0.985, wspace=0.24)
    score, judged, number = (figure.add_subplot(grid[0, column]) for column in range(3))
    rows = {n: {"v": v, "a": a, "f": f} for n, v, a, f in zip(layers, scores, aurocs, found, strict=True)}
    _curve(score, rows, "v", "score of the best feature", _BLUE)
    score.set_ylim(min(0, *scores), None)
    _curve(judged, rows, "a", "its AUROC on held-out documents", _GREEN)
    judged.set_ylim(min(0.5, *aurocs) - 0.02, 1.02)
    _curve(number, rows, "f", "features with q < 0.05", _ORANGE)
    number.set_ylim(0, max(1, 1.1 * max(found)))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _curves(figure: Figure, grid: GridSpec, metrics: Metrics) -> None:
    first, percent = next(iter(metrics.values())), lambda v, _: f"{100 * v:.4g} %"
    fvu, recovered, dead = (figure.add_subplot(grid[0, column]) for column in range(3))
    _curve(fvu, metrics, "fvu", "FVU (variance not explained)", _BLUE)
    fvu.set_ylim(0, None)
    if first["ce_recovered"] is None:
        recovered.set_axis_off()
        recovered.text(0.5, 0.5, "cross-entropy was not measured", ha="center", color=_GREY)
    else:
        _curve(recovered, metrics, "ce_recovered", "CE recovered (1 = as without the SAE)", _GREEN)
        recovered.axhline(1, color=_GREY, linewidth=0.8, linestyle=":")
    _curve(dead, metrics, "dead_fraction", f"dead: never fired on {first['tokens']:,.0f} tokens", _ORANGE, percent)
    dead.set_ylim(0, max(0.01, 1.15 * max(row["dead_fraction"] for row in metrics.values())))


def _curve(axes: Axes, metrics: Metrics, name: str, title: str, colour: str, shown: Callable | None = None) -> None:
    layers = list(metrics)
    values = [np.nan if row[name] is None else row[name] for row in metrics.values()]
    axes.plot(layers, values, color=colour, marker="o", markersize=4, linewidth=1.6, clip_on=False, zorder=3)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("layer", fontsize=9)
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axes.xaxis.set_major_locator(FixedLocator(layers) if len(layers) <= 12 else MaxNLocator(integer=True))
    if shown is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(shown))
    _tidy(axes)


def _histograms(figure: Figure, grid: GridSpec, metrics: Metrics) -> None:
    left = min(row["density"]["edges"][0] for row in metrics.values())
    shares = {layer: _shares(row["density"]) for layer, row in metrics.items()}
    top = max(0.01, 1.15 * max(float(share.max()) for share in shares.values()))
    for i, (layer, row) in enumerate(metrics.items()):
        axes = figure.add_subplot(grid[divmod(i, _COLUMNS)])
        edges, median = np.asarray(row["density"]["edges"]), row["density"]["median"]
        axes.bar(edges[:-1], shares[layer], np.diff(edges), align="edge", color=_BLUE, edgecolor="white", linewidth=0.3)
        if median is not None:
            axes.axvline(median, color=_ORANGE, linewidth=1.4)
        axes.set_title(f"layer {layer}", fontsize=9.5, loc="left", pad=3)
        axes.set_title(f"dead {row['dead_fraction']:.2%}", fontsize=8.5, loc="right", pad=3, color=_GREY)
        axes.set_xlim(left, 0)
        axes.set_ylim(0, top)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"$10^{{{v:.0f}}}$" if v else "1"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))
        if i % _COLUMNS:
            axes.tick_params(labelleft=False)
        _tidy(axes)
    legend = "share of tokens on which a latent fires (orange: median); height: share of all latents"
    figure.text(0.065, 0.18 / figure.get_figheight(), legend, fontsize=9)


def _shares(density: Mapping[str, Any]) -> np.ndarray:
    latents = np.asarray(density["latents"], float)
    return latents / (latents.sum() + density["never"])


def _caption(metrics: Metrics, note: str) -> str:
    rows = list(metrics.values())
    sinks = max(row["sink_fraction"] for row in rows)
    parts = [f"{rows[0]['tokens']:,.0f} tokens", f"masked as sinks: at most {sinks:.2%} of a layer's"]
    if rows[0]["ce_clean"] is not None:
        parts.append(f"model's own cross-entropy {rows[0]['ce_clean']:.3f} nats per token")
    return f"{note}\n" + "  ·  ".join(parts)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5)
