"""Gradient flow and the auxiliary heads: panels and figures.

`plot_gradient_flow()`   gradient by source over depth
`plot_shares()`          what the heads add at conv1, a row per configuration
`plot_relative()`        a quantity over the stages, relative to one of them
`plot_agreement()`       cosine between the losses' gradients over depth
`plot_over_training()`   the same, or shares, over training
`plot_training()`        loss or accuracy over training
`plot_escape()`          steps to leave the plateau, with intervals
`plot_pairs()`           values of variants, equal seeds joined
`plot_depth()`           a quantity over the number of modules
`gradient_figure()`, `shares_figure()`, `pitfall_figure()`, `agreement_figure()`,
`training_figure()`, `escape_figure()`, `gap_figure()`, `depth_figure()`
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from gnetlab.draw import style
from gnetlab.draw.figures import _figure, _labelled, _outer_legend, _panels, _styled
from gnetlab.draw.plots import _axes, _short, plain_number

_DASHED = (0, (4, 2))


def _floats(values: pd.Series) -> pd.Series:
    return pd.to_numeric(values).astype(float)


def _by_seed(rows: pd.DataFrame, index: str, value: str) -> pd.DataFrame:
    rows = rows.assign(**{value: _floats(rows[value])})
    return rows.pivot_table(index=index, columns="seed", values=value)


def _trunk(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[~frame.stage.isin(["aux1", "aux2"])]


def _or_all(known: pd.Series) -> pd.Series:
    """Where nothing is known, everything: its panels then say that there is nothing to see."""
    return known if known.any() else ~known


def _mean(table: pd.DataFrame) -> pd.Series:
    return table.mean(axis=1)


def _geometric_mean(table: pd.DataFrame) -> pd.Series:
    return np.exp(np.log(table.where(table > 0)).mean(axis=1))


def _draw_seeds(
    ax: Axes, x: Iterable, table: pd.DataFrame, color: str, *,
    mean: Callable[[pd.DataFrame], pd.Series] = _mean, **look,
) -> None:  # fmt: skip
    """Thin lines for the columns of `table`, where there are several, and one for their mean."""
    if table.shape[1] > 1:
        ax.plot(x, table, color=color, linewidth=0.5, alpha=0.5,
                linestyle=look.get("linestyle", "-"))  # fmt: skip
    if table.size:
        ax.plot(x, mean(table), **{"color": color, "linewidth": 1.6, **look})


def _looks(names: Iterable) -> dict[str, style.Look]:
    return {name: style.look(i) for i, name in enumerate(dict.fromkeys(names))}


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend above the panels for what is labelled in any of them."""
    handles, labels = _labelled(axes)
    _outer_legend(figure, handles, labels, ncols=max(1, len(labels)))


def plot_gradient_flow(flow: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Gradient RMS over depth, one line per source: geometric mean over layers and seeds.

    Columns: `stage`, `source`, `gradient_rms`, and `seed` (the band is its range, stage by stage).
    Heads' own layers are left out: the trunk is what the losses share.
    """
    ax = _axes(ax)
    trunk = _trunk(flow)
    stages, rms = style.stage_order(list(trunk.stage)), _floats(trunk.gradient_rms)
    logs = trunk.assign(log=np.log10(rms.where((rms > 0) & np.isfinite(rms))))
    per_seed = logs.dropna(subset="log").groupby(["source", "stage", "seed"]).log.mean()
    for source, color in style.SOURCE_COLORS.items():
        if source not in per_seed.index.get_level_values("source"):
            continue
        groups = per_seed[source].groupby("stage")
        low, mid, high = (
            10 ** getattr(groups, f)().reindex(stages) for f in ("min", "mean", "max")
        )
        wide = source == "total"  # below the others, which it covers where they agree
        ax.plot(range(len(stages)), mid, color=color, label=style.SOURCE_LABELS[source],
                linewidth=4 if wide else 1.3, zorder=1 if wide else 2,
                marker="" if wide else "o", markersize=2.5)  # fmt: skip
        ax.fill_between(range(len(stages)), low, high, color=color, alpha=0.2, linewidth=0)
    ax.set_xticks(range(len(stages)), stages)
    ax.set(yscale="log")
    return ax


def plot_shares(shares: pd.DataFrame, value: str = "ratio", *, ax: Axes | None = None) -> Axes:
    """What the heads add, a row per configuration: a point per seed, a bar and a number for all.

    Columns: `configuration`, `seed`, and `value`: "ratio" stands on a log axis with its geometric
    mean, "energy_share" (a fraction) in percent with its mean.
    """
    ax = _axes(ax)
    is_ratio = value == "ratio"
    values = _floats(shares[value]) * (1 if is_ratio else 100)
    values = values.where(np.isfinite(values) & ((values > 0) | (not is_ratio)))
    ax.axvline(1 if is_ratio else 0, color=style.QUIET, linewidth=0.6, zorder=0)
    names = list(dict.fromkeys(shares.configuration))
    for y, name in enumerate(names):
        known = values[shares.configuration == name].dropna()
        if known.empty:
            continue
        mean = np.exp(np.log(known).mean()) if is_ratio else known.mean()
        number = _short(mean) if mean < 1e6 else f"{mean:.2g}"
        ax.scatter(known, [y] * len(known), s=14, color=style.SERIES[2], zorder=2)
        ax.scatter([mean], [y], marker="|", s=90, color=style.SERIES[0], zorder=3)
        ax.annotate(f"{number}x" if is_ratio else f"{mean:.0f}%", (known.max(), y), (7, 0),
                    textcoords="offset points", va="center")  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    if not is_ratio:
        ax.set(xticks=range(0, 101, 25), xlim=(-3, 120))
        return ax
    low, high = min(0.8, values.min() / 1.2), max(2, values.max())
    ax.set(xscale="log", xlim=(low, high * max(1.6, (high / low) ** 0.3)))
    if high / low < 200:  # too few powers of ten to read values by
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    if high < 1e4:
        ax.xaxis.set_major_formatter(FuncFormatter(plain_number))
    return ax


def plot_relative(
    frame: pd.DataFrame, value: str, reference: str, *, log: bool = False, ax: Axes | None = None
) -> Axes:
    """`value` over the stages, as a multiple of that at stage `reference`, one colour per init.

    Columns: `init`, `seed`, `stage` (in order), and `value`. Thin lines are seeds, with the mean
    over them; `log` makes it the geometric mean on a log axis.
    """
    ax = _axes(ax)
    stages, looks = list(dict.fromkeys(frame.stage)), _looks(frame.init)
    ax.axhline(1, color=style.QUIET, linewidth=0.6, zorder=0)
    for i, (init, rows) in enumerate(frame.groupby("init", sort=False)):
        table = _by_seed(rows, "stage", value).reindex(stages)
        shift = 0 if log else 0.12 * (i - (len(looks) - 1) / 2)  # on a line, all would coincide
        places = np.arange(len(stages)) + shift
        _draw_seeds(ax, places, table / table.loc[reference], looks[init].color, linewidth=1.1,
                    mean=_geometric_mean if log else _mean, linestyle=looks[init].line,
                    marker=looks[init].marker, markersize=2.8, label=str(init))  # fmt: skip
    ax.set_xticks(range(len(stages)), [stage.replace("_", " ") for stage in stages], rotation=45,
                  ha="right", rotation_mode="anchor")  # fmt: skip
    ax.set_yscale("log" if log else "linear")
    low, high = ax.get_ylim()  # where nothing changes, rounding errors would fill the panel
    ax.set_ylim(min(low, 0.1 if log else 0), max(high, 2 if log else 1.2))
    if not log:  # where nothing is conserved, a sum near zero makes a ratio of any size
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -1.5), min(high, 2.5))
    return ax


def plot_agreement(noise: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Cosine of a head's gradient to the main loss's over depth: mean, and bars from the 10th to
    the 90th percentile of layers and seeds.

    Columns: `stage`, `source`, `cosine_to_main`; heads' own layers are left out.
    """
    ax = _axes(ax)
    known = _trunk(noise[noise.source.isin(["aux1", "aux2"])])
    known = known.assign(cosine_to_main=_floats(known.cosine_to_main))
    known = known.dropna(subset="cosine_to_main")
    stages = style.stage_order(list(known.stage))
    ax.axhline(0, color=style.QUIET, linewidth=0.6, zorder=0)
    for shift, (source, rows) in zip((-0.14, 0.14), known.groupby("source"), strict=False):
        groups = rows.groupby("stage").cosine_to_main
        mean = groups.mean().reindex(stages)
        reach = [mean - groups.quantile(0.1).reindex(stages),
                 groups.quantile(0.9).reindex(stages) - mean]  # fmt: skip
        ax.errorbar(np.arange(len(stages)) + shift, mean, yerr=np.clip(reach, 0, None), marker="o",
                    linestyle="", color=style.SOURCE_COLORS[source], elinewidth=0.9,
                    label=style.SOURCE_LABELS[source])  # fmt: skip
    ax.set_xticks(range(len(stages)), stages)
    return ax


def plot_over_training(frame: pd.DataFrame, value: str, *, ax: Axes | None = None) -> Axes:
    """`value` by source over training, averaged over layers: thin lines per seed and their mean.

    Columns: `step`, `seed`, `source`, and `value`.
    """
    ax = _axes(ax)
    ax.axhline(0, color=style.QUIET, linewidth=0.6, zorder=0)
    for source, rows in frame.groupby("source", sort=False):
        table = _by_seed(rows, "step", value)
        _draw_seeds(
            ax, table.index, table, style.SOURCE_COLORS[source], label=style.SOURCE_LABELS[source],
            marker="o" if len(table) < 12 else "", markersize=2.5,
        )  # fmt: skip
    ax.set(xlabel="training step")
    return ax


def plot_training(
    metrics: pd.DataFrame, value: str = "loss", *, by: str = "variant", smooth: int = 10,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Training curves: one colour per `by`, thin lines per seed, thick their mean, band the range.

    Columns: `step`, `seed`, `by`, and `value`; each seed is smoothed over `smooth` steps.
    """
    ax = _axes(ax)
    looks = _looks(metrics[by])
    for variant, rows in metrics.groupby(by, sort=False):
        table = _by_seed(rows, "step", value).rolling(smooth, min_periods=1).mean()
        look = looks[variant]
        _draw_seeds(ax, table.index, table, look.color, label=str(variant), linestyle=look.line,
                    marker=look.marker if len(table) == 1 else "")  # fmt: skip
        ax.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=look.color,
                        alpha=0.15, linewidth=0)  # fmt: skip
    ax.set(xlabel="training step")
    return ax


def plot_escape(summary: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Mean steps to leave the plateau and the interval, a row per variant under its setting.

    Columns: `setting`, `variant`, `seeds`, `escaped` (counts), `mean_steps`, `low`, `high` and
    `steps`, which runs that never left count as (dashed): where there are any, the marker is open.
    """
    ax = _axes(ax)
    numbers = ["seeds", "escaped", "mean_steps", "low", "high", "steps"]
    summary = summary.assign(**{name: _floats(summary[name]) for name in numbers})
    looks, places, names, headings = _looks(summary.variant), [], [], []
    if len(looks) > len(style.SERIES):  # two variants of one colour would look related
        looks = dict.fromkeys(looks, style.look(0))
    beside = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
    longest = summary.steps.max()
    ax.annotate("never", (longest, 1), (0, 2), xycoords=ax.get_xaxis_transform(), ha="right",
                textcoords="offset points", fontsize=6.5, color=style.QUIET)  # fmt: skip
    for setting, rows in summary.groupby("setting", sort=False):
        places.append(places[-1] + 1.3 if places else 0)
        headings.append(len(names))
        names.append(str(setting))
        for row in rows.itertuples():
            places.append(y := places[-1] + 1)
            names.append(f"{row.variant}")
            color = looks[row.variant].color
            ax.vlines(row.steps, y - 0.5, y + 0.5, color=style.QUIET, linewidth=0.6, zorder=0,
                      linestyle=_DASHED)  # fmt: skip
            if row.low < row.high:
                ax.hlines(y, row.low, row.high, color=color, linewidth=1.4)
            ax.scatter(row.mean_steps, y, s=20, edgecolor=color, zorder=3,
                       facecolor=color if row.escaped == row.seeds else "white")  # fmt: skip
            ax.annotate(f"{row.escaped:.0f} of {row.seeds:.0f}", (1, y), (6, 0), **beside)
    ax.annotate("escaped", (1, 0), (6, 0), fontweight="bold", **beside)
    ax.set_yticks(places, names)
    for i in headings:
        ax.get_yticklabels()[i].set_fontweight("bold")
    ax.tick_params(axis="y", length=0)
    ax.set(xlim=(0, 1.04 * longest), ylim=(places[-1] + 0.6, -0.6))
    return ax


def plot_pairs(
    frame: pd.DataFrame, value: str, *, start: float = 0, ax: Axes | None = None
) -> Axes:
    """A point per seed for each variant, equal seeds joined, with the mean as a bar and a number.

    Columns: `variant`, `seed`, and `value`. The variants stand at `start`, `start + 1`, ...
    """
    ax = _axes(ax)
    ax.margins(y=0.1)
    looks = _looks(frame.variant)
    table = _by_seed(frame, "variant", value).reindex(list(looks))
    places = start + np.arange(len(table))
    ax.plot(places, table, color=style.QUIET, linewidth=0.6, alpha=0.7, zorder=1)
    for x, (variant, values) in zip(places, table.iterrows(), strict=True):
        known = values[np.isfinite(values)]
        if known.empty:
            continue
        look = looks[variant]
        ax.scatter([x] * len(known), known, s=14, color=look.color, marker=look.marker, zorder=2)
        ax.scatter([x], [known.mean()], marker="_", s=160, color=look.color, zorder=3)
        side = -1 if x == start else 1
        ax.annotate(f"{known.mean():.1f}", (x, known.mean()), (9 * side, 0), va="center",
                    textcoords="offset points", ha="left" if side > 0 else "right",
                    color=look.color)  # fmt: skip
    return ax


def plot_depth(
    depth: pd.DataFrame, value: str, labels: Mapping[str, str], *, ax: Axes | None = None
) -> Axes:
    """`value` over the number of modules, log axis: thin lines per seed, geometric mean.

    Columns: `modules`, `seed`, `source`, and `value`. `labels` chooses the sources and says what is
    written at the end of their lines.
    """
    ax = _axes(ax)
    ends = {}
    for source, text in labels.items():
        table = _by_seed(depth[depth.source == source], "modules", value)
        wide = source == "total"
        _draw_seeds(ax, table.index, table, style.SOURCE_COLORS[source], mean=_geometric_mean,
                    marker="o", linewidth=3 if wide else 1.6, zorder=1 if wide else 2)  # fmt: skip
        known = _geometric_mean(table)
        known = known[np.isfinite(known)]
        if text and len(known):
            ends[source] = (known.index[-1], known.iloc[-1])
    ax.set(yscale="log", xlabel="Inception modules", ymargin=0.12)
    low, high = ax.get_ylim()
    logs = np.log([y for _, y in ends.values()])
    near = len(logs) > 1 and np.ptp(logs) < 0.2 * np.log(high / low)
    for i, source in enumerate(sorted(ends, key=lambda source: ends[source][1])):
        side = ("top", "bottom")[i] if near else "center"
        color = style.QUIET if source == "total" else style.SOURCE_COLORS[source]
        ax.annotate(labels[source], ends[source], (6, 0), textcoords="offset points", va=side,
                    color=color, annotation_clip=False)  # fmt: skip
    ax.set_xticks(sorted(depth.modules.unique()))
    return ax


@_styled
def gradient_figure(flow: pd.DataFrame) -> Figure:
    """Gradient RMS over depth by source, one panel per (norm, init), one log scale for all.

    Columns: `norm`, `init`, and those of `plot_gradient_flow`.
    """
    flow = flow[_or_all(flow.gradient_rms.notna())]
    norms, inits = list(dict.fromkeys(flow.norm)), list(dict.fromkeys(flow.init))
    stages = style.stage_order(list(_trunk(flow).stage))
    many, room = len(inits) > 2, 100 // len(inits)  # characters across a panel
    figure = _figure("page", (1.75 if many else 2.1) * len(norms) + 0.5)
    axes = _panels(figure, len(norms), len(inits), across=len(norms), sharex=True, sharey=True)
    lines, few = axes, len(inits) <= 4  # as they stand; room for the name of every stage
    if style.is_narrow(figure) and len(inits) > 1:
        lines, many, few, room = axes.T, True, len(norms) == 1, 46 // len(norms)
    for row, norm in zip(axes, norms, strict=True):
        for ax, init in zip(row, inits, strict=True):
            chosen = (flow.norm == norm) & (flow.init == init)
            if not chosen.any():
                ax.remove()
                continue
            plot_gradient_flow(flow.assign(gradient_rms=flow.gradient_rms.where(chosen)), ax=ax)
            title = textwrap.wrap(f"{norm},", room) + textwrap.wrap(str(init), room)
            ax.set_title(("\n" if many else " ").join(title), fontsize=7.5 if many else None)
    for column in lines.T:
        last = [ax for ax in column if ax.figure][-1]
        last.tick_params(axis="x", labelbottom=True, labelrotation=90 if many else 0)
        last.set_xlabel("stage")
    if not few:
        figure.axes[0].set_xticks(range(0, len(stages), 2), stages[::2])
    for row in lines:
        next(ax for ax in row if ax.figure).set_ylabel("gradient RMS\n(loss / weight)")
    _legend(figure, figure.axes)
    return figure


@_styled
def shares_figure(shares: pd.DataFrame) -> Figure:
    """What the heads add to the first convolution's gradient, per configuration and seed.

    Columns: `configuration`, `seed`, `ratio` (total over main gradient RMS; 1: they add nothing),
    `energy_share` (the heads' fraction of the gradient's energy).
    """
    figure = _figure("page", 0.95 + 0.18 * shares.configuration.nunique())
    left, right = _panels(figure, 1, 2, sharey=True)[0]
    plot_shares(shares, "ratio", ax=left).set(
        title="Gradient at conv1", xlabel="RMS: total / main alone"
    )
    gap = "\n" if style.is_narrow(figure) else " "
    plot_shares(shares, "energy_share", ax=right).set(
        title=f"The heads' share{gap}of its energy", xlabel="percent of the gradient's energy"
    )
    return figure


@_styled
def pitfall_figure(cuts: pd.DataFrame, outputs: pd.DataFrame) -> Figure:
    """Weight gradients times weights are conserved over depth, while the gradient flow is not.

    Columns of `cuts`: `init`, `seed`, `stage`, `weight_dot_gradient` (sum over a cut of
    <W, dL/dW>; fc is the reference); of `outputs`: `init`, `seed`, `stage`, `flow` (norm of dL/dx
    at that output; 5b is the reference). Stages in order of appearance.
    """
    figure = _figure("page", 3.1)
    left, right = _panels(figure, 1, 2)[0]
    plot_relative(cuts, "weight_dot_gradient", "fc", ax=left).set(
        title="Weights times their gradients", ylabel="sum of w dL/dw / that of fc"
    )
    plot_relative(outputs, "flow", "5b", log=True, ax=right).set(
        title="Gradient at the outputs", ylabel="norm of dL/dx / that at 5b"
    )
    for ax in (left, right):
        ax.set_xlabel("stage")
    _legend(figure, (left, right))
    return figure


@_styled
def agreement_figure(
    noise: pd.DataFrame, over_training: pd.DataFrame, module: str = "conv1.conv"
) -> Figure:
    """Do the losses agree? Cosines of the heads' gradients to main's, and their shares, over time.

    `noise` has the columns of `plot_agreement`; `over_training` has `step`, `seed`, `module`,
    `stage`, `source`, `cosine_to_main` (drawn as the mean over the trunk's layers) and
    `projection_share` (fraction of the total gradient, drawn for `module`).
    """
    figure = _figure("page", 2.9)
    left, middle, right = _panels(figure, 1, 3)[0]
    label = "cosine to the main loss's gradient"
    plot_agreement(noise, ax=left).set(title="Before training", xlabel="stage", ylabel=label)
    heads = _trunk(over_training[over_training.source.isin(["aux1", "aux2"])])
    heads = heads.dropna(subset="cosine_to_main")
    plot_over_training(heads, "cosine_to_main", ax=middle).set(
        title="Over training, all layers", ylabel=label
    )
    shares = over_training[(over_training.module == module) & (over_training.source != "total")]
    shares = shares.assign(projection_share=100 * _floats(shares.projection_share))
    plot_over_training(shares, "projection_share", ax=right).set(
        title=f"Shares at {module.partition('.')[0]}", ylabel="part of the total gradient (%)"
    )
    _legend(figure, [right])
    return figure


@_styled
def training_figure(metrics: pd.DataFrame, classes: int) -> Figure:
    """Loss and accuracy of the main classifier over training, with a band over seeds.

    Columns: `setting` (one column of panels each), `step`, `seed`, `variant`, `loss` (nats),
    `accuracy`. Chance is drawn for `classes`.
    """
    metrics = metrics[_or_all(metrics[["loss", "accuracy"]].notna().any(axis=1))]
    settings = list(dict.fromkeys(metrics.setting))
    figure = _figure("page", 4.2)
    axes = _panels(figure, 2, len(settings), across=2, sharex="col", sharey="row")
    for (above, below), setting in zip(axes.T, settings, strict=True):
        chosen = metrics[metrics.setting == setting]
        plot_training(chosen, "loss", ax=above).set(title=setting)
        above.set_xlabel("training step" if style.is_narrow(figure) else "")
        plot_training(chosen, "accuracy", ax=below)
    for row, level in zip(axes, (np.log(classes), 1 / classes), strict=True):
        for ax in row:
            ax.axhline(level, color=style.QUIET, linewidth=0.6, linestyle=(0, (4, 3)))
        row[-1].annotate("chance", (1, level), (2, 0), xycoords=("axes fraction", "data"),
                         textcoords="offset points", va="center", fontsize=6.5,
                         color=style.QUIET, annotation_clip=False)  # fmt: skip
    axes[0, 0].set_ylabel("cross-entropy of main (nats)")
    low, high = axes[0, 0].get_ylim()  # one run that goes astray must not flatten the others
    axes[0, 0].set_ylim(low, min(high, 2 * np.log(classes)))
    axes[1, 0].set(ylabel="fraction correct, main", ylim=(0, None))
    if style.is_narrow(figure):  # or they would stand higher than their panels
        axes[0, 0].set_ylabel("cross-entropy\nof main (nats)")
        axes[1, 0].set_ylabel("fraction\ncorrect, main")
    _legend(figure, axes.flat)
    return figure


@_styled
def escape_figure(summary: pd.DataFrame) -> Figure:
    """Steps to leave the plateau: mean and interval; open where some runs never left it.

    Columns: those of `plot_escape`.
    """
    names = summary.variant.astype(str).str.len().max()
    rows = len(summary) + 1.3 * summary.setting.nunique()
    figure = _figure("page" if names > 22 else "column", 0.8 + 0.17 * rows)
    ax = plot_escape(summary, ax=figure.subplots())
    some_never = bool((_floats(summary.escaped) < _floats(summary.seeds)).any())
    ax.set_xlabel("mean steps to leave the plateau"
                  + "\n(open: some runs never did)" * some_never)  # fmt: skip
    return figure


@_styled
def gap_figure(gaps: pd.DataFrame) -> Figure:
    """Accuracy on training and test images and the gap between them; lines join equal seeds.

    Columns: `variant`, `seed`, `train_accuracy`, `test_accuracy` (fractions).
    """
    figure = _figure("page", 2.7)
    left, right = _panels(figure, 1, 2, width_ratios=[1.7, 1])[0]
    names = [str(name).replace(" ", "\n", 1) for name in dict.fromkeys(gaps.variant)]
    train, test = 100 * _floats(gaps.train_accuracy), 100 * _floats(gaps.test_accuracy)
    gaps = gaps.assign(train=train, test=test, gap=train - test)
    second = len(names) + 0.5
    plot_pairs(gaps, "train", ax=left)
    plot_pairs(gaps, "test", start=second, ax=left)
    for start, text in ((0, "training images"), (second, "test images")):
        left.text(start + (len(names) - 1) / 2, 1.0, text, transform=left.get_xaxis_transform(),
                  ha="center", va="bottom")  # fmt: skip
    plot_pairs(gaps, "gap", ax=right)
    right.axhline(0, color=style.QUIET, linewidth=0.6, zorder=0)
    left.set_ylabel("accuracy (%)")
    right.set(title="Gap", ylabel="training - test (percentage points)")
    for ax, starts in ((left, (0, second)), (right, (0,))):
        places = [start + i for start in starts for i in range(len(names))]
        ax.set_xticks(places, names * len(starts))
        ax.set_xlim(-0.6, places[-1] + 0.6)
    return figure


@_styled
def depth_figure(depth: pd.DataFrame) -> Figure:
    """Deeper networks: conv1's gradient, its ratio to the last layer's, and the propagation.

    Columns: `modules`, `seed`, `source`, `conv1_rms`, `first_to_last` (conv1's RMS over fc's),
    `propagation` (flow at conv1 over that at 5b).
    """
    figure = _figure("page", 2.5)
    left, middle, right = _panels(figure, 1, 3)[0]
    right.sharey(middle)
    labels = {"main": "main loss\nalone", "total": "with\nheads"}
    plot_depth(depth, "conv1_rms", labels, ax=left).set(
        title="Gradient at conv1", ylabel="RMS (loss / weight)"
    )
    plot_depth(depth, "first_to_last", {"main": ""}, ax=middle).set(
        title="First to last layer", ylabel="weight gradient, conv1 / fc"
    )
    plot_depth(depth, "propagation", {"main": ""}, ax=right).set(
        title="Propagation", ylabel="flow, conv1 / 5b"
    )
    return figure
