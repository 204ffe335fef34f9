"""Figure-level drawing: `*_figure(frame, ...) -> Figure`, and `save()`, the only one that writes.

A figure function sets panels, titles, legends and shared scales; what is inside a panel is in
`plots`. `note` is the footer in small type: weights, device, seed.

Figures are designed for a page's width or for a column's. Within `style.width("column")`, panels
that stand side by side are stacked instead, and legends, names and footers are broken into lines.
"""

from __future__ import annotations

import contextlib
import copy
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gnetlab.draw import calls, plots, style

KINDS = ("png", "svg", "pdf")


def _styled(make: Callable[..., Figure]) -> Callable[..., Figure]:
    """Give a figure function gnetlab's look, the footer `note`, and its summary as alt text.

    The figure remembers what it was made of, so that `save()` can keep that beside it.
    """

    @wraps(make)
    def styled(*args, note: str = "", **options) -> Figure:
        with style.context():
            given = copy.deepcopy((args, options | ({"note": note} if note else {})))
            figure = make(*_plain(args), **_plain(options))
            figure.set_label(f"{(make.__doc__ or '').splitlines()[0]} {note}".strip())
            _finish(figure)
            if note:
                footer = textwrap.fill(style.plain(note), 76 if style.is_narrow(figure) else 160)
                figure.supxlabel(footer, fontsize=5.5, color=style.QUIET, x=0.995, ha="right")
            figure.call = calls.Call(styled, *given)
            if style.asked():  # for which the figure was not designed: one layout may not do
                figure.draw_without_rendering()
            return figure

    styled.is_figure_function = True
    return styled


def _plain(value: object) -> object:
    """What a figure is given with every name in it as `style.plain` has it; columns keep theirs."""
    if isinstance(value, str):
        return style.plain(value)
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, pd.Series):
        return value.rename(index=_plain)
    if isinstance(value, pd.DataFrame):
        odd = [
            name for name, column in value.select_dtypes(exclude="number").items()
            if any(isinstance(item, str) and style.plain(item) != item for item in column)
        ]  # fmt: skip
        return value.assign(**{name: value[name].map(_plain) for name in odd})
    return value


def _figure(width: str, height: float) -> Figure:
    figure = Figure((style.WIDTHS[style.asked() or width], height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    return figure


_TURNED = {"row": "col", "col": "row"}


def _panels(
    figure: Figure, rows: int, columns: int, *, across: int = 1, height_ratios=None, **options
) -> np.ndarray:
    """`rows` x `columns` axes; in a narrow figure they stand column by column, `across` in a line.

    What is given for rows and columns (which share, how high) is meant as in the wide figure.
    """
    if not style.is_narrow(figure) or columns == 1:
        return figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios, **options)
    options.pop("width_ratios", None)
    for which in ("sharex", "sharey"):
        options[which] = _TURNED.get(options.get(which), options.get(which, False))
    lines = -(-rows * columns // across)
    figure.set_figheight(0.85 * figure.get_figheight() * lines / rows)
    ratios = list(height_ratios) * columns if height_ratios and across == 1 else None
    placed = figure.subplots(lines, across, squeeze=False, height_ratios=ratios, **options)
    for ax in placed.flat[rows * columns :]:
        ax.remove()
    return placed.flat[: rows * columns].reshape(columns, rows).T


def _outer_legend(
    figure: Figure, handles: Iterable, labels: Iterable[str], side: str = "upper center", **options
) -> None:
    """A legend above the panels, with as many columns as fit."""
    narrow = style.is_narrow(figure)
    labels = [textwrap.fill(label, 50 if narrow else 100) for label in labels]
    if narrow:
        side = "upper center"
        longest = max((len(line) for label in labels for line in label.splitlines()), default=1)
        fitting = int(3.4 / (0.47 + 0.05 * longest))  # inches: the handle and its gaps, letters
        options["ncols"] = max(1, min(fitting, options.get("ncols", 1)))
    handles = list(handles)
    legend = figure.legend(handles, labels, loc=f"outside {side}", **options)
    # Columns are as wide as what stands in them: here there is room to measure instead of guess.
    while (
        not narrow
        and options.get("ncols", 1) > 1
        and legend.get_window_extent().width > (figure.bbox.width)
    ):
        legend.remove()
        options["ncols"] -= 1
        legend = figure.legend(handles, labels, loc=f"outside {side}", **options)


def _labelled(axes: Iterable[Axes], order: Iterable[str] = ()) -> tuple[list, list[str]]:
    """Handles and labels of whatever has one in any panel, each label once; `order` goes first."""
    found: dict = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = [*filter(found.__contains__, order), *(label for label in found if label not in order)]
    return [found[label] for label in labels], labels


def _finish(figure: Figure) -> None:
    """Say so where a panel has nothing to show; give stacked panels the label of a shared scale."""
    for ax in figure.axes:
        if ax.axison and not np.isfinite(ax.dataLim.get_points()).all():
            ax.text(0.5, 0.5, "no finite values", transform=ax.transAxes, ha="center",
                    va="center", color=style.QUIET,
                    bbox={"facecolor": "white", "linewidth": 0, "pad": 1})  # fmt: skip
        if not style.is_narrow(figure):
            continue
        if not ax.xaxis.get_tick_params().get("labelbottom", True):
            ax.set_xlabel("")
        if ax.yaxis.get_tick_params().get("labelleft", True) and not ax.get_ylabel():
            same = ax.get_shared_y_axes().get_siblings(ax)
            ax.set_ylabel(next(filter(None, (other.get_ylabel() for other in same)), ""))


@_styled
def cost_figure(costs: pd.DataFrame) -> Figure:
    """MACs and parameters: the networks on one scale, then each per stage on its own.

    Columns: `model`, `stage`, `branch`, `macs`, `parameters`. Bars are stacked by branch.
    """
    models = list(dict.fromkeys(costs.model))
    figure = _figure("page", 4.6)
    axes = _panels(figure, 2, len(models) + 1, across=2)
    for row, value in zip(axes, ("macs", "parameters"), strict=True):
        whole = costs.assign(stage=costs.model)
        plots.plot_stage_costs(whole, value, ax=row[0]).set_title("On one scale")
        for ax, model in zip(row[1:], models, strict=True):
            of_model = costs[costs.model == model]
            plots.plot_stage_costs(of_model, value, ax=ax).set_title(f"{model}, own scale")
    if style.is_narrow(figure):
        for ax in axes.flat:
            ax.set_title(ax.get_title("left").replace(", own scale", ""))
            ax.set_xlabel(ax.get_xlabel().replace(" (", "\n("))
    handles, labels = _labelled(axes.flat)
    labels = [f"{label} branch".replace("no branch branch", "outside the modules")
              for label in labels]  # fmt: skip
    _outer_legend(figure, handles, labels, ncols=5)
    return figure


@_styled
def reduction_figure(modules: pd.DataFrame) -> Figure:
    """MACs and output width per module, with and without 1x1 reductions.

    Columns: `variant`, `stage`, `macs`, `out_channels`, `pool_share` (fraction of output
    channels that come from the pool branch).
    """
    figure = _figure("page", 3.0)
    left, middle, right = _panels(figure, 1, 3, sharey=True)[0]
    plots.plot_grouped(modules, "macs", "variant", scale=1e6, ax=left,
                       label="multiply-adds (millions)")  # fmt: skip
    left.legend(loc="upper right")
    plots.plot_grouped(modules, "out_channels", "variant", ax=middle, label="output channels")
    plots.plot_grouped(modules, "pool_share", "variant", scale=0.01, ax=right,
                       label="output from the pool branch (%)")  # fmt: skip
    for ax, title in zip((left, middle, right), ("Cost", "Width", "Pool branch"), strict=True):
        ax.set_title(title)
    left.set_ylabel("Inception module")
    return figure


@_styled
def table_1_figure(table: pd.DataFrame) -> Figure:
    """Table 1 of the paper: computed over printed, row by row.

    Columns: those of `gnetlab.measure.costs.table_1`.
    """
    figure = _figure("page", 3.0)
    left, right = _panels(figure, 1, 2, sharey=True)[0]
    plots.plot_table_1(table, "ops", ax=left).set_title("Multiply-adds")
    plots.plot_table_1(table, "params", ax=right).set_title("Parameters")
    left.set_ylabel("row of Table 1")
    left.legend(loc="lower right")
    return figure


@_styled
def counters_figure(explained: pd.DataFrame, macs: int) -> Figure:
    """What other tools print for the network, and what they count besides multiply-adds.

    Columns: `tool`, `term`, `operations`; `macs` is the network's own count.
    """
    figure = _figure("page", 2.4)
    ax = plots.plot_counters(explained, macs, ax=figure.subplots())
    if style.is_narrow(figure):
        _outer_legend(figure, *ax.get_legend_handles_labels(), ncols=4)
    else:
        ax.legend(loc="center right", title="terms", title_fontsize=7)
    return figure


@_styled
def scaling_figure(widths: pd.DataFrame, resolutions: pd.DataFrame) -> Figure:
    """How multiply-adds grow with the network's width and with the image.

    Columns: those of `plots.plot_width` and of `plots.plot_resolution`.
    """
    figure = _figure("page", 3.0)
    left, right = _panels(figure, 1, 2, width_ratios=[1, 1.1])[0]
    plots.plot_width(widths, ax=left).set_title("Wider, at 224 x 224")
    plots.plot_resolution(resolutions, ax=right).set_title("Other image sizes")
    return figure


@_styled
def implementations_figure(table: pd.DataFrame) -> Figure:
    """Known implementations of GoogLeNet: multiply-adds and parameters of each.

    Columns: `implementation`, `side` (pixels), `macs`, `parameters`.
    """
    figure = _figure("page", 2.6)
    names = [f"{row.implementation} ({row.side} px)" for row in table.itertuples()]
    if style.is_narrow(figure):
        names = [textwrap.fill(name.replace(" px", "\N{NO-BREAK SPACE}px"), 26) for name in names]
        figure.set_figheight(3.4)
    left, right = _panels(figure, 1, 2, sharey=True)[0]
    for ax, value in ((left, "macs"), (right, "parameters")):
        scale, label = plots.AXIS_UNITS[value]
        # Dots: a log axis has no zero at which bars could start.
        ax.scatter(table[value] / scale, names, color=style.SERIES[0], zorder=3, s=22)
        for name, v in zip(names, table[value], strict=True):
            ax.annotate(f"{v / scale:,.2f}", (v / scale, name), (6, 0), fontsize=6.5,
                        textcoords="offset points", va="center",
                        bbox={"facecolor": "white", "linewidth": 0, "pad": 1})  # fmt: skip
        ax.grid(axis="y", color=style.QUIET, linewidth=0.4, alpha=0.5)
        ax.set(xscale="log", xlabel=label, xlim=(table[value].min() / scale / 2,
                                                 table[value].max() / scale * 4))  # fmt: skip
        ax.xaxis.set_major_formatter(plots.FuncFormatter(plots.plain_number))
        ax.xaxis.set_minor_formatter(plots.NullFormatter())
    left.set_ylim(len(table) - 0.4, -0.6)
    return figure


@_styled
def time_figure(shares: pd.DataFrame, variants: pd.DataFrame) -> Figure:
    """Where a pass spends multiply-adds, bytes and time, and what faster variants win.

    Both have `operation`; `shares` has `quantity` and `amount`, each quantity drawn as 100%;
    `variants` has `variant` and `seconds`.
    """
    figure = _figure("page", 2.4)
    left, right = _panels(figure, 1, 2)[0]
    plots.plot_operations(shares, "amount", "quantity", percent=True, ax=left)
    left.set(title="Shares of one pass", xlabel="percent", xlim=(0, 100))
    milliseconds = variants.assign(milliseconds=1000 * variants.seconds)
    plots.plot_operations(milliseconds, "milliseconds", "variant", ax=right)
    right.set(title="Time of one pass", xlabel="sum of the layers (ms)")
    handles, labels = _labelled((left, right), style.OPERATION_COLORS)
    _outer_legend(figure, handles, labels, ncols=len(labels))
    return figure


@_styled
def predictors_figure(times: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """Predicted against measured time of every layer, by multiply-adds, roofline and calibration.

    Columns: those of `plots.plot_prediction`; `agreement` has `predictor`, `spearman`. Titles have
    the rank correlation over the layers, and the sum of what is predicted over that measured.
    """
    figure = _figure("page", 2.7)
    axes = _panels(figure, 1, len(agreement), sharex=True, sharey=True)[0]
    titles = {"macs": "Multiply-adds only", "roofline": "Roofline", "calibrated": "Calibrated"}
    for ax, row in zip(axes, agreement.itertuples(), strict=True):
        plots.plot_prediction(times, row.predictor, ax=ax)
        total = times[f"{row.predictor}_seconds"].sum() / times.seconds.sum()
        ax.set_title(f"{titles[row.predictor]}: rank corr. {row.spearman:.2f}\n"
                     f"predicted / measured in total: {total:.2f}")  # fmt: skip
    axes[0].set_ylabel("predicted (ms)")
    axes[0].legend(loc="upper left")
    return figure


@_styled
def early_figure(ratios: pd.Series) -> Figure:
    """What Inception modules in place of conv1 and conv2 cost, over the plain stem's cost."""
    figure = _figure("column", 2.0)
    ax = plots.plot_ratios(ratios, ax=figure.subplots())
    ax.set_xlabel("Inception from the first layer / plain stem")
    return figure


@_styled
def accuracy_figure(models: pd.DataFrame, highlight: Mapping[str, str]) -> Figure:
    """Published accuracy against multiply-adds and against parameters.

    Columns: `model`, `top1`, `macs`, `parameters`; `highlight` maps model to its label.
    """
    figure = _figure("page", 3.0)
    left, right = _panels(figure, 1, 2, sharey=True)[0]
    plots.plot_accuracy(models, dict(highlight), x="macs", ax=left)
    plots.plot_accuracy(models, dict(highlight), x="parameters", ax=right).set_ylabel("")
    return figure


@_styled
def latency_figure(latency: pd.DataFrame, ratios: pd.Series, title: str) -> Figure:
    """Measured time per image, and the networks' ratio in every currency side by side."""
    figure = _figure("page", 2.6)
    left, right = _panels(figure, 1, 2)[0]
    plots.plot_latency(latency, ax=left).set_title("Measured time")
    left.legend(loc="best")
    plots.plot_ratios(ratios, ax=right).set_title(title)
    right.set_xlabel("ratio")
    return figure


@_styled
def maps_figure(
    image: np.ndarray,
    maps: Mapping[str, Mapping[str, np.ndarray]],
    *,
    columns: int = 6,
    caption: str = "",
) -> Figure:
    """Feature maps of the branches: one row per module, one column per branch.

    `image` H x W x 3 uint8; `maps` stage -> branch -> channels x height x width, already chosen;
    `caption` stands beside the image.
    """
    branches = list(next(iter(maps.values())))
    figure = _figure("page", 0.72 * len(maps) + 1.2)
    if narrow := style.is_narrow(figure):
        figure.set_figheight(0.36 * len(maps) + 1.2)
        caption = textwrap.fill(caption, 44)
    axes = figure.subplots(
        len(maps) + 1, len(branches) + 1, squeeze=False,
        width_ratios=[0.7 if narrow else 0.36, *[1] * len(branches)],
        height_ratios=[2.2 if narrow else 1.1, *[1] * len(maps)],
    )  # fmt: skip
    for ax in axes[:, 0]:
        ax.set_axis_off()
    for ax, branch in zip(axes[0, 1:], branches, strict=True):
        ax.set_axis_off()
        ax.text(0, 0, branch if narrow else f"{branch} branch", transform=ax.transAxes,
                fontweight="bold", fontsize=8.5)  # fmt: skip
    axes[0, 0].imshow(image)
    beside = axes[0, 1].text(0, 0.9, caption, transform=axes[0, 1].transAxes, va="top")
    beside.set_in_layout(False)  # it runs on over the empty cells to its right
    for row, (stage, by_branch) in zip(axes[1:], maps.items(), strict=True):
        height, width = next(iter(by_branch.values())).shape[1:]
        row[0].text(0.9, 0.5, f"{stage}\n{height} x {width}", transform=row[0].transAxes,
                    ha="right", va="center")  # fmt: skip
        for ax, branch in zip(row[1:], branches, strict=True):
            plots.plot_montage(by_branch[branch], columns, ax=ax)
    return figure


@_styled
def branch_statistics_figure(branches: pd.DataFrame) -> Figure:
    """Energy, silence and effective rank over depth, one line per branch; dashed: the control.

    Columns: `stage`, `branch`, `energy_share`, `energy_ratio`, `zero_fraction`, `rank_share`, and
    `network` where there are controls: what comes first is drawn in full.
    """
    figure = _figure("page", 4.6)
    axes = _panels(figure, 2, 2, sharex=True)
    panels = {
        "energy_share": ("Share of the energy", "fraction of the module"),
        "energy_ratio": ("Energy per channel", "energy share / channel share"),
        "zero_fraction": ("Silent values", "fraction exactly zero"),
        "rank_share": ("Effective rank", "fraction of the channels"),
    }
    if "network" not in branches:
        branches = branches.assign(network="")
    networks = dict(tuple(branches.groupby("network", sort=False)))
    for ax, (value, (title, label)) in zip(axes.flat, panels.items(), strict=True):
        for i, rows in enumerate(networks.values()):
            plots.plot_by_depth(rows, value, ax=ax, control=i)
        ax.set(title=title, ylabel=label, ylim=(0, None))
    for ax in axes[0]:
        ax.set_xlabel("")
    axes[0, 1].axhline(1, color=style.QUIET, linewidth=0.6, zorder=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    labels = [f"{label} branch" for label in labels]
    for i, network in list(enumerate(networks))[1:]:
        line = {"linewidth": 0.9, "linestyle": plots.dashes(i)}
        handles.append(Line2D([], [], color=style.QUIET, **line))
        labels.append(network)
    _outer_legend(figure, handles, labels, ncols=len(labels))
    return figure


@_styled
def receptive_figure(fields: pd.DataFrame, side: int) -> Figure:
    """How much of the image each branch can see, and how much of that its gradient uses.

    Columns: `stage`, `branch`, `theoretical` (pixels), `ratio` (effective over theoretical); `side`
    of the image in pixels is drawn across.
    """
    figure = _figure("page", 2.6)
    left, right = _panels(figure, 1, 2)[0]
    plots.plot_by_depth(fields, "theoretical", ax=left)
    left.lines[-1].set_linestyle((0, (3, 3)))  # the pool's field is the 3x3's, which shows through
    left.axhline(side, color=style.QUIET, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
    left.annotate(f"image, {side}", (0, side), (2, 2), textcoords="offset points", fontsize=6.5,
                  color=style.QUIET)  # fmt: skip
    left.set(title="Can see", ylabel="receptive field (pixels)")
    left.set_ylim(bottom=0)
    left.legend(title="branch", title_fontsize=7, loc="lower right")
    plots.plot_by_depth(fields, "ratio", ax=right)
    right.set(title="Uses", ylabel="effective / theoretical size", ylim=(0, 1.05))
    return figure


@_styled
def ablation_figure(ablation: pd.DataFrame) -> Figure:
    """What the network loses without each branch, once as zeros and once as its mean.

    Columns: `kind`, and those of `plots.plot_ablation`.
    """
    kinds = list(dict.fromkeys(ablation.kind))
    figure = _figure("page", 2.7)
    axes = _panels(figure, 1, len(kinds), sharey=True)[0]
    titles = {"zero": "Branch puts out zeros", "mean": "Branch puts out its mean"}
    for ax, kind in zip(axes, kinds, strict=True):
        plots.plot_ablation(ablation[ablation.kind == kind], ax=ax).set_title(titles[kind])
    axes[0].set_ylabel("change of accuracy (points)")
    handles, labels = axes[0].get_legend_handles_labels()
    _outer_legend(figure, handles, [f"{label} branch" for label in labels], ncols=len(labels))
    return figure


@_styled
def correlation_figure(correlations: pd.DataFrame) -> Figure:
    """Correlation of channels within and between branches over depth, and how far from chance.

    Columns: `network` (the first is drawn in colour), `stage`, `within`, `between`, `z`.
    """
    figure = _figure("page", 2.6)
    left, right = _panels(figure, 1, 2)[0]
    for i, (network, rows) in enumerate(correlations.groupby("network", sort=False)):
        color = (style.EMPHASIS, style.QUIET)[min(i, 1)]
        for value, line in (("within", "-"), ("between", (0, (3, 2)))):
            left.plot(rows.stage, rows[value], color=color, linestyle=line, marker="o",
                      label=f"{network}, {value}")  # fmt: skip
        right.plot(rows.stage, rows.z, color=color, marker="o", label=network)
    right.axhline(0, color=style.QUIET, linewidth=0.6, zorder=0)
    left.set(title="Channels of one branch, of two", ylabel="mean |correlation|",
             xlabel="Inception module")  # fmt: skip
    right.set(title="Against permuted branches", ylabel="difference (standard deviations)",
              xlabel="Inception module")  # fmt: skip
    left.set_ylim(bottom=0)
    if style.is_narrow(figure):
        _outer_legend(figure, *left.get_legend_handles_labels(), ncols=2)
    else:
        left.legend(loc="best", ncols=2)
    right.legend(loc="best")
    return figure


@_styled
def attribution_figure(
    image: np.ndarray, maps: Mapping[str, Mapping[str, np.ndarray]], shares: pd.DataFrame
) -> Figure:
    """Where each branch looks: rows are modules, columns branches, one colour range per module.

    `image` H x W x 3 uint8; `maps` stage -> branch -> h x w; `shares` has `stage`, `branch` and
    `share` (signed fraction of the module), printed above each panel.
    """
    branches = list(next(iter(maps.values())))
    figure = _figure("page", 1.55 * len(maps) + 0.5)
    if narrow := style.is_narrow(figure):
        figure.set_figheight(0.95 * len(maps) + 0.3)
    axes = figure.subplots(len(maps), len(branches) + 1, squeeze=False)
    share = shares.set_index(["stage", "branch"]).share
    for row, (stage, by_branch) in zip(axes, maps.items(), strict=True):
        row[0].imshow(image)
        row[0].set_axis_off()
        row[0].set_title(f"module {stage}", fontsize=7 if narrow else 8.5)
        limit = max(map(plots.largest, by_branch.values()))
        for ax, branch in zip(row[1:], branches, strict=True):
            plots.plot_overlay(image, by_branch[branch], limit=limit, ax=ax)
            ax.set_title(f"{branch}: {100 * share[stage, branch]:+.0f}%",
                         fontsize=7 if narrow else 8.5)  # fmt: skip
    return figure


@_styled
def conductance_figure(shares: pd.DataFrame) -> Figure:
    """How much of the decision each branch passes on, over depth, and what the sum leaves out.

    Columns: `stage`, `branch`, `share` (signed fraction of the module), `completeness`.
    """
    figure = _figure("page", 2.5)
    left, right = _panels(figure, 1, 2, width_ratios=(2, 1))[0]
    plots.plot_by_depth(shares, "share", ax=left)
    left.axhline(0, color=style.QUIET, linewidth=0.6, zorder=0)
    gap = "\n" if style.is_narrow(figure) else " "
    left.set(title="Passed on", ylabel=f"conductance{gap}(signed share)")
    left.legend(title="branch", title_fontsize=7, ncols=4, loc="upper center",
                bbox_to_anchor=(0.5, -0.24))  # fmt: skip
    whole = shares.groupby("stage", sort=False).completeness.first().astype(float)
    right.axvline(1, color=style.QUIET, linewidth=0.6, zorder=0)
    right.plot(whole, whole.index, marker="o", linestyle="", color=style.EMPHASIS)
    right.invert_yaxis()
    reach = max(0.1, 1.15 * (whole[np.isfinite(whole)] - 1).abs().max())
    right.set(title="Completeness", xlabel="sum of branches / change of the logit",
              xlim=(1 - reach, 1 + reach), ylabel="Inception module")  # fmt: skip
    return figure


@_styled
def image_attribution_figure(image: np.ndarray, maps: Mapping[str, np.ndarray]) -> Figure:
    """Which pixels the decision rests on: the image, and a signed map over it for each method.

    `image` H x W x 3 uint8; `maps` name of the method -> H x W.
    """
    figure = _figure("page", 2.5)
    if narrow := style.is_narrow(figure):
        figure.set_figheight(1.5)
    first, *others = figure.subplots(1, len(maps) + 1)
    first.imshow(image)
    first.set_axis_off()
    first.set_title("image")
    for ax, (method, values) in zip(others, maps.items(), strict=True):
        limit = plots.largest(values, 99.5)  # single pixels would set the scale
        plots.plot_overlay(image, values, limit=limit, ax=ax)
        ax.set_title(textwrap.fill(method, 36 // (len(maps) + 1)) if narrow else method)
    return figure


@_styled
def sparsity_figure(structure: pd.DataFrame, speed: pd.DataFrame) -> Figure:
    """A module as one 5x5 convolution: what it consists of, and its time in sparse and dense forms.

    Columns: those of `plots.plot_zero_share` and of `plots.plot_sparse_speed`, and `batch_size`,
    of which each has a panel.
    """
    batches = list(dict.fromkeys(speed.batch_size))
    figure = _figure("page", 3.6)
    grid = (1, len(batches) + 1)
    if narrow := style.is_narrow(figure):
        grid = grid[::-1]
        figure.set_figheight(2.2 * grid[0] + 1.4)
    left = figure.add_subplot(*grid, 1)
    plots.plot_zero_share(structure, ax=left).set(title="Zeros", ylabel="Inception module")
    first = None
    for i, batch in enumerate(batches):
        ax = first = figure.add_subplot(*grid, i + 2, sharey=first)
        plots.plot_sparse_speed(speed[speed.batch_size == batch], ax=ax)
        ax.set_title(f"Time, batch {batch}")
    for panel, side, columns in ((left, "left", 2), (ax, "right", 3)):
        if narrow and panel is ax:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25))
        else:
            _outer_legend(figure, *panel.get_legend_handles_labels(), f"upper {side}",
                          ncols=columns, columnspacing=1.2, handlelength=1.8)  # fmt: skip
    return figure


class SavedFigure:
    """The files of a saved figure; in a notebook it shows the PNG."""

    def __init__(self, paths: dict[str, Path], alt: str, width: int) -> None:
        self.paths, self.alt, self._width = paths, alt, width

    def __repr__(self) -> str:
        return f"figure {self.paths['png'].stem}: {self.alt}"

    def _repr_mimebundle_(self, **_options) -> tuple[dict, dict]:
        bundle = {"image/png": self.paths["png"].read_bytes(), "text/plain": repr(self)}
        return bundle, {"image/png": {"width": self._width}}


def save(
    figure: Figure,
    name: str,
    frame: pd.DataFrame,
    *,
    directory: str | Path = ".",
    latex: bool = False,
    timing: bool = False,
) -> SavedFigure:
    """Write a figure as PNG, SVG and PDF, with the data behind it as CSV (and a LaTeX table).

    figure     of a function here, whose label (a sentence) becomes its description for readers
               who cannot see it; or any other of matplotlib's
    name       the files' stem (letters, digits, - and _)
    frame      the data that it shows
    directory  where the files go; made if needed
    latex      write the frame as a LaTeX table too
    timing     mark, in the PNG's metadata, numbers that were measured in seconds: they differ from
               run to run

    What a function here was given is kept as NAME.call.zip, from which `gnetlab figures` draws the
    figure again. The same figure and frame give the same bytes. Returns the `SavedFigure`, with
    `paths` by kind; in a notebook it shows the PNG. Raises ValueError for a name of other
    characters.

    >>> import gnetlab as gl
    >>> from gnetlab.draw import figures
    >>> costs = gl.layer_costs(gl.googlenet("cifar"), (3, 32, 32)).assign(model="CIFAR variant")
    >>> figure = figures.cost_figure(costs, note="one image of 32 x 32")
    >>> saved = figures.save(figure, "costs", costs, directory="results")
    >>> [path.name for path in saved.paths.values()]
    ['costs.png', 'costs.svg', 'costs.pdf', 'costs.csv', 'costs.call.zip']
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f"figure name {name!r}: use letters, digits, '-' and '_' only, and give a folder as "
            "directory="
        )
    directory = Path(directory)
    paths = write(figure, name, directory, timing=timing)
    paths["csv"] = directory / f"{name}.csv"
    frame.to_csv(paths["csv"], index=False)
    if latex:
        paths["tex"] = directory / f"{name}.tex"
        write_latex(frame, paths["tex"])
    if call := getattr(figure, "call", None):
        paths["call.zip"] = directory / f"{name}{calls.SUFFIX}"
        calls.store(call._replace(timing=timing), paths["call.zip"])
    return SavedFigure(paths, figure.get_label(), round(figure.get_figwidth() * 100))


def write(
    figure: Figure,
    name: str,
    directory: Path,
    *,
    kinds: Iterable[str] = KINDS,
    timing: bool = False,
) -> dict[str, Path]:
    """The pictures of `save()` alone: a path for each of `kinds`."""
    directory.mkdir(parents=True, exist_ok=True)
    alt = figure.get_label()
    metadata = {"svg": {"Date": None, "Description": alt}, "pdf": {"CreationDate": None},
                "png": {"Description": alt, "Data": data_summary(figure)}}  # fmt: skip
    metadata["png"] |= {"Timing": "yes"} if timing else {}
    paths = {kind: directory / f"{name}.{kind}" for kind in KINDS if kind in kinds}
    with style.context():
        for kind, path in paths.items():
            figure.savefig(path, metadata=metadata[kind])
    if "svg" in paths:
        paths["svg"].write_text(_numbered(paths["svg"].read_text("utf-8")), "utf-8")
    return paths


def _numbered(svg: str) -> str:
    """Clip paths numbered as they come: their ids are of places, whose last bits vary."""
    order: dict[str, str] = {}
    return re.sub(
        r'(?<=id="|rl\(#)p[0-9a-f]{10}\b',
        lambda found: order.setdefault(found[0], f"clip{len(order)}"),
        svg,
    )


def write_latex(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame without its index as a LaTeX table, for the package booktabs."""
    rows = frame.to_latex(index=False, escape=True, float_format="%.4g", na_rep="--")
    path.write_text(f"% needs \\usepackage{{booktabs}}\n{rows}", encoding="utf-8")


def data_summary(figure: Figure, longest: int = 600) -> str:
    """What the panels show, in words and numbers, for who cannot see them.

    Of each panel its title and axes, of each labelled line its first and last value, of each group
    of bars its values, or else the panel's texts; cut after `longest` characters.
    """
    panels = []
    for ax in figure.axes:
        found = [_line_summary(line, line.get_label()) for line in ax.lines]
        found += [_line_summary(errors.lines[0], errors.get_label()) for errors in ax.containers
                  if isinstance(errors, ErrorbarContainer) and errors.lines[0]]  # fmt: skip
        found += [_bars_summary(bars) for bars in ax.containers if isinstance(bars, BarContainer)]
        found = list(filter(None, found)) or [text.get_text() for text in ax.texts]
        if any(found):
            axes = " by ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))
            head = ", ".join(filter(None, (ax.get_title(loc="left"), axes)))
            values = "; ".join(filter(None, found))
            panels.append(f"{head}: {values}" if head else values)
    told = style.as_given(". ".join(panels))
    return textwrap.shorten(told, longest, placeholder=" …")


def _line_summary(line: Line2D, label: object) -> str:
    for data in (line.get_ydata(), line.get_xdata()):  # along x where y has categories
        with contextlib.suppress(TypeError, ValueError):
            values = np.asarray(data, dtype=float)
            values = values[np.isfinite(values)]
            if str(label).startswith("_") or len(values) < 2:
                return ""
            return f"{label} from {values[0]:.3g} to {values[-1]:.3g}"
    return ""


def _bars_summary(bars: BarContainer) -> str:
    finite = [value for value in map(float, bars.datavalues) if np.isfinite(value)]
    values = [f"{value:.3g}" for value in finite]
    label = str(bars.get_label())
    return f"{'' if label.startswith('_') else label} {', '.join(values)}".strip()
