"""What single channels select for, by branch: panels and figures.

`plot_selectivity()`   means per branch over the modules, tests marked
`plot_advantage()`     how far the third branch stands out, by kernel and layout of widths
`plot_effects()`       what kernel and width do, with intervals
`plot_counts()`        published counts of labelled units against chance
`selectivity_figure()`, `confound_figure()`, `counts_figure()`
`visualized_figure()`  images that excite channels most
"""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gnetlab.draw import style
from gnetlab.draw.figures import _figure, _outer_legend, _panels, _styled
from gnetlab.draw.plots import _axes, _short

LEVEL = 0.05  # of adjusted p, from which on a module is marked
LABELS = {
    "orientation": ("Orientation", "1 - circular variance"),
    "scale": ("Scale", "sparseness over frequencies"),
    "colour": ("Colour", "(colour - grey) / (colour + grey)"),
}
_LAYOUTS = {"paper": (style.SERIES[0], "o"), "equal": (style.SERIES[1], "s")}


def _properties(frame: pd.DataFrame) -> list[str]:
    return [name for name in LABELS if name in set(frame.property)]


def plot_selectivity(
    selectivity: pd.DataFrame, tests: pd.DataFrame, value: str, *, ax: Axes | None = None
) -> Axes:
    """Mean of every branch over the modules with its 95% interval, branches named at the right.

    Columns: `stage`, `branch`, and `value`, one row per channel; of `tests`: `stage`, `property`,
    `p_adjusted`. A dot above a module: adjusted p under 0.05; open where `p_adjusted_random`, if
    there is one, is so too: what the test finds in the same network with random weights.
    """
    ax = _axes(ax)
    stages = style.stage_order(list(selectivity.stage))
    branches = list(dict.fromkeys(selectivity.branch))
    ends, high = {}, -np.inf
    for i, (branch, rows) in enumerate(selectivity.groupby("branch", sort=False)):
        by_stage = rows.groupby("stage")[value]
        mean, reach = by_stage.mean().reindex(stages), 1.96 * by_stage.sem().reindex(stages)
        places = np.arange(len(stages)) + 0.15 * (i - (len(branches) - 1) / 2)
        ax.errorbar(places, mean, yerr=reach.fillna(0), color=style.BRANCH_COLORS[branch],
                    marker="o", markersize=2.8, linewidth=0.9, elinewidth=0.7,
                    label=branch)  # fmt: skip
        known = mean.dropna()
        if len(known):
            ends[branch] = known.iloc[-1]
            high = max(high, (mean + reach.fillna(0)).max())
    ax.set_xticks(range(len(stages)), stages)
    ax.set(xlabel="Inception module", xlim=(-0.5, len(stages) + 0.75))
    low, top = ax.get_ylim()
    ax.set_ylim(low, top + 0.09 * (top - low))
    _label_ends(ax, ends, len(stages) - 0.4)
    marked = tests[(tests.property == value) & (tests.p_adjusted < LEVEL)]
    anyway = _in_a_random_network(marked)
    ax.scatter([stages.index(stage) for stage in marked.stage], [0.965] * len(marked), s=9,
               facecolor=np.where(anyway, "white", "black"), edgecolor="black", linewidth=0.7,
               transform=ax.get_xaxis_transform())  # fmt: skip
    return ax


def _in_a_random_network(tests: pd.DataFrame) -> pd.Series:
    known = tests.get("p_adjusted_random", pd.Series(np.nan, tests.index))
    return known < LEVEL


def _label_ends(ax: Axes, ends: dict[str, float], x: float) -> None:
    """Branch names at the right, in their order, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    gap, names = 0.075 * (high - low), sorted(ends, key=ends.__getitem__)
    places = np.array([ends[name] for name in names])
    for _ in range(50):
        for i in range(len(places) - 1):
            missing = gap - (places[i + 1] - places[i])
            if missing > 0:
                places[i] -= missing / 2
                places[i + 1] += missing / 2
    places += max(0, low + gap / 2 - places[0]) if len(places) else 0
    for name, y in zip(names, places, strict=True):
        ax.text(x, y, name, color=style.BRANCH_COLORS[name], va="center", fontsize=7,
                fontweight="bold")  # fmt: skip


def plot_advantage(confound: pd.DataFrame, name: str, *, ax: Axes | None = None) -> Axes:
    """The third branch against the others by its kernel: a point per seed, a bar for their mean.

    Columns: `kernel`, `layout`, `seed`, `trained`, `property`, `advantage`. Untrained networks
    are grey, in the same place.
    """
    ax = _axes(ax)
    frame = confound[confound.property == name]
    kernels, layouts = (list(dict.fromkeys(frame[key])) for key in ("kernel", "layout"))
    ax.axhline(0, color=style.QUIET, linewidth=0.6, zorder=0)
    for (kernel, layout, trained), rows in frame.groupby(["kernel", "layout", "trained"]):
        color, marker = _LAYOUTS[layout]
        x = kernels.index(kernel) + 0.4 * (layouts.index(layout) - (len(layouts) - 1) / 2)
        x += 0.07 if trained else -0.07
        color = color if trained else "#BBBBBB"
        ax.scatter([x] * len(rows), rows.advantage, s=14, color=color, marker=marker, alpha=0.7,
                   linewidth=0, zorder=2 + trained)  # fmt: skip
        if len(rows) > 1:
            ax.hlines(rows.advantage.mean(), x - 0.1, x + 0.1, color=color, linewidth=1.6)
    ax.set_xticks(range(len(kernels)), kernels)
    ax.set(xlabel="kernel of the third branch", xlim=(-0.5, len(kernels) - 0.5))
    return ax


def plot_effects(effects: pd.DataFrame, name: str, *, ax: Axes | None = None) -> Axes:
    """What kernel and width change, trained: mean over seeds and 95% interval, a row each.

    Columns: `factor`, `contrast`, `at`, `trained`, `property`, `effect`, `low`, `high`. An open
    marker has no interval: a single seed.
    """
    ax = _axes(ax)
    frame = effects[(effects.property == name) & effects.trained].reset_index(drop=True)
    ax.axvline(0, color=style.QUIET, linewidth=0.6, zorder=0)
    for y, row in frame.iterrows():
        color = style.SERIES[3] if row.factor == "width" else style.SERIES[2]
        alone = np.isnan(row.low)
        if not alone:
            ax.hlines(y, row.low, row.high, color=color, linewidth=1.4)
        ax.scatter(row.effect, y, s=20, edgecolor=color, facecolor="white" if alone else color,
                   zorder=3)  # fmt: skip
    ax.set_yticks(range(len(frame)), [f"{row.contrast}, {row.at}" for row in frame.itertuples()])
    ax.set(ylim=(len(frame) - 0.5, -0.5), xlabel="change of that difference")
    ax.margins(x=0.15)
    return ax


def plot_counts(counts: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of a label's units that lie in one branch, and that branch's share of the module.

    Columns: `stage`, `label`, `branch`, `inside`, `units`, `branch_width`, `width`, `p`.
    """
    ax = _axes(ax)
    places = np.arange(len(counts))
    colors = [style.BRANCH_COLORS[branch] for branch in counts.branch]
    ax.barh(places, 100 * counts.inside / counts.units, height=0.6, color=colors)
    chance = 100 * counts.branch_width / counts.width
    ax.scatter(chance, places, marker="|", s=160, color="white", linewidth=3.5, zorder=3)
    ax.scatter(chance, places, marker="|", s=160, color="black", linewidth=1.5, zorder=4)
    ax.annotate("chance: the branch's share of the module", (chance.iloc[0], -0.45), (4, 3),
                textcoords="offset points", fontsize=6.5, color=style.QUIET)  # fmt: skip
    for y, row in zip(places, counts.itertuples(), strict=True):
        ax.text(103, y, f"{row.inside} of {row.units} in {row.branch}, p = {row.p:.1e}",
                va="center", fontsize=6.5)  # fmt: skip
    ax.set_yticks(places, [f"{row.stage}: {row.label}" for row in counts.itertuples()])
    ax.set(xlim=(0, 150), ylim=(len(counts) - 0.4, -1.4))
    ax.set_xlabel("units in the branch (%)", x=1 / 3)
    ax.spines.bottom.set_bounds(0, 100)
    ax.set_xticks(range(0, 101, 25))
    return ax


@_styled
def selectivity_figure(selectivity: pd.DataFrame, tests: pd.DataFrame) -> Figure:
    """Orientation, scale and colour selectivity of the branches, module by module.

    Columns: those of `plot_selectivity` and the three properties.
    """
    figure = _figure("page", 2.8)
    axes = _panels(figure, 1, 3)[0]
    for ax, (name, (title, label)) in zip(axes, LABELS.items(), strict=True):
        plot_selectivity(selectivity, tests, name, ax=ax).set(title=title, ylabel=label)
    looks = {"s": 9, "edgecolor": "black", "linewidth": 0.7}
    handles = [ax.scatter([], [], facecolor="black", **looks)]
    texts = [f"branches of the module differ: permutation p < {LEVEL:g}, adjusted (Holm)"]
    if _in_a_random_network(tests).any():
        handles.append(ax.scatter([], [], facecolor="white", **looks))
        texts.append("with random weights too")
    _outer_legend(figure, handles, texts, "upper right", ncols=2)
    return figure


@_styled
def confound_figure(confound: pd.DataFrame, effects: pd.DataFrame) -> Figure:
    """Kernel or width: how far the third branch stands out in small networks, and what changes it.

    Columns: those of `plot_advantage` and of `plot_effects`.
    """
    names = _properties(confound)
    rows = int((effects.trained & (effects.property == names[0])).sum())
    figure = _figure("page", 2.6 + 0.17 * rows)
    above, below = _panels(figure, 2, len(names), height_ratios=[2, 0.6 + 0.2 * rows])
    for top, bottom, name in zip(above, below, names, strict=True):
        plot_advantage(confound, name, ax=top).set_title(LABELS[name][0])
        plot_effects(effects, name, ax=bottom)
        bottom.tick_params(labelleft=bottom is below[0] or style.is_narrow(figure))
    above[0].set_ylabel("third branch minus others")
    if style.is_narrow(figure):
        for ax in above:
            ax.set_ylabel("third branch\nminus others")
    handles = [above[0].scatter([], [], s=14, color="#BBBBBB", label="before training")]
    for layout in dict.fromkeys(confound.layout):
        color, marker = _LAYOUTS[layout]
        handles.append(above[0].scatter([], [], s=14, color=color, marker=marker,
                                        label=f"trained, {layout} widths"))  # fmt: skip
    _outer_legend(figure, handles, [h.get_label() for h in handles], ncols=len(handles))
    return figure


@_styled
def counts_figure(counts: pd.DataFrame) -> Figure:
    """Labelled units of InceptionV1 that lie in one branch; the mark is what chance would give.

    Columns: those of `plot_counts`.
    """
    figure = _figure("page", 2.4)
    ax = plot_counts(counts, ax=figure.subplots())
    if style.is_narrow(figure):  # two lines for each row, and more room for what stands beside it
        figure.set_figheight(3.2)
        ax.set_yticks(
            ax.get_yticks(), [textwrap.fill(t.get_text(), 20) for t in ax.get_yticklabels()]
        )
        chance, *beside = ax.texts
        chance.set_text("chance: the branch's share")
        for text in beside:
            text.set_text(text.get_text().replace(", ", ",\n"))
        ax.set_xlim(0, 170)
        ax.xaxis.label.set_x(100 / 170 / 2)
    return figure


@_styled
def visualized_figure(images: np.ndarray, frame: pd.DataFrame, *, columns: int = 8) -> Figure:
    """Images that excite channels most: a block per branch, above each the channel's number.

    `images` is count x size x size x 3 uint8; columns of the frame, in the same order: `module`,
    `branch`, `channel`, and `start` and `reached` (excitations), which stand behind the number.
    Frames have the branch's colour.
    """
    figure, full = _figure("page", 1), 8  # as many as have the usual size
    if style.is_narrow(figure):
        columns, full = max(1, columns // 2), 4
    blocks = list(frame.groupby("module", sort=False).indices.items())
    most = max(len(rows) for _, rows in blocks)
    beside = max(1, min(len(blocks), columns // most))  # blocks in a row
    wide, height = columns // beside, -(-most // (columns // beside))
    lines = -(-len(blocks) // beside)
    figure.set_figheight(lines * (0.35 + 0.95 * height * full / columns) + 0.1)
    parts = figure.subfigures(lines, beside, squeeze=False).ravel()
    for part, (module, rows) in zip(parts, blocks, strict=False):
        part.suptitle(module, x=0.02, ha="left", fontsize=8)
        colour = style.BRANCH_COLORS.get(frame.branch.iloc[rows[0]], style.QUIET)
        axes = part.subplots(height, wide, squeeze=False).ravel()
        for ax in axes[len(rows) :]:
            ax.remove()
        for ax, row in zip(axes, rows, strict=False):
            ax.imshow(images[row], interpolation="nearest")
            one = frame.iloc[row]
            start, reached = (_short(value) for value in (one.start, one.reached))
            ax.set_title(f"{one.channel}: {start} → {reached}", pad=2, fontsize=5.5)
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(visible=True, color=colour)
    return figure
