"""Axes-level drawing: `plot_*(frame, *, ax=None) -> Axes`.

Each takes a tidy frame (its columns are in the docstring), draws on `ax` or on new axes, and
returns the axes. None titles, shows, saves, or touches global state.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from gnetlab.draw import style

AXIS_UNITS = {
    "macs": (1e6, "multiply-adds (millions)"),
    "parameters": (1e6, "parameters (millions)"),
    "activations": (1e6, "activations (millions)"),
}


def _axes(ax: Axes | None) -> Axes:
    return Figure(layout="constrained").subplots() if ax is None else ax


def plot_stage_costs(costs: pd.DataFrame, value: str = "macs", *, ax: Axes | None = None) -> Axes:
    """Horizontal bars per stage, stacked by branch. Columns: `stage`, `branch`, and `value`."""
    ax = _axes(ax)
    scale, label = AXIS_UNITS[value]
    stages = style.stage_order(list(costs.stage))
    sums = costs.groupby(["stage", "branch"])[value].sum().unstack(fill_value=0).astype(float)
    left = np.zeros(len(stages))
    for branch, color in style.BRANCH_COLORS.items():
        if branch in sums and sums[branch].any():
            width = sums[branch].reindex(stages, fill_value=0).to_numpy() / scale
            ax.barh(stages, width, left=left, color=color, label=branch or "no branch",
                    edgecolor="white", linewidth=0.4, height=0.78)  # fmt: skip
            left += width
    for y, total in enumerate(left):
        ax.annotate(_short(total), (total, y), (2, 0), textcoords="offset points",
                    va="center", fontsize=6, color=style.QUIET)  # fmt: skip
    ax.set(xlabel=label, ylim=(len(stages) - 0.4, -0.6), xlim=(0, left.max() * 1.17))
    return ax


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def largest(values: np.ndarray, percentile: float = 100) -> float:
    """The largest magnitude of the finite values, or a percentile; 0 where there are none."""
    sizes = np.abs(values[np.isfinite(values)])
    return float(np.percentile(sizes, percentile)) if sizes.size else 0.0


def plot_grouped(
    frame: pd.DataFrame,
    value: str,
    by: str,
    *,
    scale: float = 1.0,
    label: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Bars side by side per stage, one per group. Columns: `stage`, `by`, and `value`."""
    ax = _axes(ax)
    stages = style.stage_order(list(frame.stage))
    groups = list(dict.fromkeys(frame[by]))
    height = 0.8 / len(groups)
    for i, group in enumerate(groups):
        of_group = frame[frame[by] == group]
        values = of_group.groupby("stage")[value].sum().reindex(stages).astype(float) / scale
        look = style.look(i)
        ax.barh(np.arange(len(stages)) + (i - (len(groups) - 1) / 2) * height, values, height,
                color=look.color, label=str(group),
                **{"hatch": look.hatch, "edgecolor": "white"} if look.hatch else {})  # fmt: skip
    ax.set_yticks(range(len(stages)), stages)
    ax.set(xlabel=label or value, ylim=(len(stages) - 0.4, -0.6))
    return ax


def plot_table_1(table: pd.DataFrame, quantity: str, *, ax: Axes | None = None) -> Axes:
    """Computed over printed, row by row of Table 1; filled where they agree as printed.

    Columns: `stage`, `macs`, `printed_ops`, `ops_agree`, `parameters`, `printed_params`,
    `params_agree`. `quantity` is "ops" or "params".
    """
    ax = _axes(ax)
    ops = quantity == "ops"
    computed = table.macs / 1e6 if ops else table.parameters / 1024
    printed, agree = table[f"printed_{quantity}"], table[f"{quantity}_agree"]
    ratio = computed / printed
    positions = np.arange(len(table))
    ax.axvline(1, color=style.QUIET, linewidth=0.6)
    ax.hlines(positions, 1, ratio, color=style.QUIET, linewidth=0.8)
    ax.scatter(ratio[agree], positions[agree], color=style.SERIES[0], zorder=3, s=18,
               label="agrees as printed")  # fmt: skip
    ax.scatter(ratio[~agree], positions[~agree], facecolor="white", edgecolor=style.EMPHASIS,
               zorder=3, s=18, label="does not")  # fmt: skip
    for position, is_equal, c, p, r in zip(positions, agree, computed, printed, ratio, strict=True):
        if not is_equal:
            ax.annotate(f"{c:.4g} for {p:g}", (max(r, 1), position), (6, 0), fontsize=6,
                        textcoords="offset points", va="center", color=style.EMPHASIS)  # fmt: skip
    ax.set_yticks(positions, table.stage)
    unit = "millions of MACs" if ops else "weights in units of 1024"
    ax.set(xlabel=f"computed / printed ({unit})", ylim=(len(table) - 0.4, -0.6))
    ax.margins(x=0.3)
    ax.set_xlim(left=min(0.85, ratio.min() - 0.1))
    return ax


def plot_accuracy(
    models: pd.DataFrame, highlight: dict[str, str], *, x: str = "macs", ax: Axes | None = None
) -> Axes:
    """Published top-1 accuracy against cost, log axis; chosen networks in colour with names.

    The line is the Pareto front: the best accuracy at or below each cost.

    Columns: `model`, `top1` (percent), and `x` (count). `highlight` maps model to its label.
    """
    ax = _axes(ax)
    scale, label = AXIS_UNITS[x]
    quiet = models[~models.model.isin(list(highlight))]
    ax.scatter(quiet[x] / scale, quiet.top1, s=9, color=style.QUIET, alpha=0.45, linewidth=0)
    for i, (model, name) in enumerate(highlight.items()):
        point = models[models.model == model].iloc[0]
        color = style.EMPHASIS if i == 0 else style.SERIES[0]
        ax.scatter(point[x] / scale, point.top1, s=24, color=color, zorder=3)
        ax.annotate(name, (point[x] / scale, point.top1), (5, -3), textcoords="offset points",
                    va="top", color=color, fontsize=7)  # fmt: skip
    # The front: what no other network beats in both.
    front = models.sort_values([x, "top1"], ascending=[True, False])
    front = front[front.top1 > front.top1.cummax().shift(fill_value=-1)]
    ax.step(front[x] / scale, front.top1, where="post", color=style.QUIET, linewidth=0.8, zorder=0)
    ax.set(xscale="log", xlabel=label, ylabel="published top-1 accuracy (%)")
    ax.margins(y=0.1)
    ax.xaxis.set_major_formatter(FuncFormatter(plain_number))
    return ax


_TERMS = {
    "biases": style.SERIES[0], "batch norm": style.OPERATION_COLORS["normalization"],
    "LRN": style.SERIES[3], "ReLU": style.OPERATION_COLORS["ReLU"],
    "pool": style.OPERATION_COLORS["max pooling"],
}  # fmt: skip


def plot_counters(explained: pd.DataFrame, macs: int, *, ax: Axes | None = None) -> Axes:
    """What tools count besides multiply-adds, stacked by what it is, and what they print.

    Columns: `tool`, `term`, `operations`. `macs` is the network's own count.
    """
    ax = _axes(ax)
    tools = list(dict.fromkeys(explained.tool))
    extra = explained[~explained.term.str.startswith("multipl")]
    kinds = extra.term.map(lambda term: next((k for k in _TERMS if k in term), "ReLU"))
    sums = (extra.operations / 1e6).groupby([extra.tool, kinds]).sum().unstack(fill_value=0)
    left = np.zeros(len(tools))
    for kind, color in _TERMS.items():
        if kind in sums:
            length = sums[kind].reindex(tools, fill_value=0).to_numpy()
            ax.barh(tools, length, left=left, color=color, height=0.7,
                    label={"pool": "pooling"}.get(kind, kind))  # fmt: skip
            left += length
    printed = explained.groupby("tool").operations.sum()
    for y, tool in enumerate(tools):
        twice = printed[tool] >= 2 * macs
        text = f"prints {printed[tool] / 1e6:,.1f} M{' (2 x MACs)' if twice else ''}"
        ax.annotate(text, (left[y], y), (3, 0), textcoords="offset points", va="center", fontsize=6)
    ax.set(xlabel="counted besides the multiply-adds (millions)", ylim=(len(tools) - 0.4, -0.6),
           xlim=(0, left.max() * 1.45))  # fmt: skip
    return ax


def plot_width(widths: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Multiply-adds over width, log axes, beside lines of slope 1 and 2 through width 1.

    Where width 1 was not measured the lines go through what lies on the line between its
    neighbours, or through the nearest width.

    Columns: `width`, `macs` (count), `exponent` (since the row before; written between points).
    """
    ax = _axes(ax)
    giga = widths.macs / 1e9
    known = widths[["width", "macs"]].astype(float).sort_values("width")
    ends = np.array([widths.width.min(), widths.width.max()])
    anchor = np.clip(1, *ends)
    level = np.exp(np.interp(np.log(anchor), np.log(known.width), np.log(known.macs / 1e9)))
    for power in (1, 2):
        heights = level * (ends / anchor) ** power
        ax.plot(ends, heights, color=style.QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.annotate(f"exponent {power}", (ends[-1], heights[-1]), (6, 0),
                    textcoords="offset points", va="center", fontsize=6.5, color=style.QUIET,
                    annotation_clip=False)  # fmt: skip
    ax.plot(known.width, known.macs / 1e9, color=style.SERIES[0], marker="o")
    middles = zip(widths.width, widths.width[1:], giga, giga[1:], widths.exponent[1:], strict=False)
    for x1, x2, y1, y2, exponent in middles:
        ax.annotate(f"{exponent:.2f}", ((x1 * x2) ** 0.5, (y1 * y2) ** 0.5), (-4, 4), ha="right",
                    textcoords="offset points", fontsize=6.5)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="width (multiple of the paper's channels)",
           ylabel="multiply-adds (billions)")  # fmt: skip
    ax.set_xticks(widths.width)
    ax.set_xticks([], minor=True)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(plain_number))
    return ax


def plot_resolution(costs: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Multiply-adds over image size, log axes, one line per network with its name at the end.

    Columns: `network`, `side` (pixels), `macs` (count). VGG's lines are broken; those of one
    colour differ.
    """
    ax = _axes(ax)
    ends = costs.groupby("network", sort=False).macs.last().sort_values()
    low, high = np.log(costs.macs.min() / 1e9), np.log(costs.macs.max() / 1e9)
    heights = np.log(ends.to_numpy() / 1e9)
    for i in range(1, len(heights)):  # names of lines that end together must not overlap
        heights[i] = max(heights[i], heights[i - 1] + 0.065 * (high - low))
    whole, dashed, dotted, dash_dotted = style.LINES
    lines = {color: itertools.cycle([whole, dash_dotted, dotted]) for color in style.SERIES}
    lines[style.SERIES[1]] = itertools.cycle([dashed, dotted, dash_dotted])
    for i, name in enumerate(ends.index):
        rows = costs[costs.network == name]
        color = style.SERIES[1 if name.startswith("VGG") else 0 if i < 2 else 2]
        ax.plot(rows.side, rows.macs / 1e9, color=color, marker="o", markersize=2.5,
                linestyle=next(lines[color]))  # fmt: skip
        ax.annotate(name, (rows.side.iloc[-1] * 1.08, np.exp(heights[i])), fontsize=6.5,
                    color=color, va="center", annotation_clip=False)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="side of the image (pixels)",
           ylabel="multiply-adds (billions)")  # fmt: skip
    ax.set_xticks(sorted(costs.side.unique()))
    ax.set_xticks([], minor=True)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(plain_number))
    return ax


def operation_kind(operation: str) -> str:
    """The key of `style.OPERATION_COLORS` for an operation of `layer_costs`.

    >>> operation_kind("conv2d"), operation_kind("local_response_norm"), operation_kind("add")
    ('convolution', 'normalization', 'other')
    """
    kinds = {
        "conv": "convolution", "max_pool": "max pooling", "relu": "ReLU", "cat": "concatenation",
        "linear": "linear",
    }  # fmt: skip
    if "norm" in operation:
        return "normalization"
    return next((kind for start, kind in kinds.items() if operation.startswith(start)), "other")


def plot_operations(
    frame: pd.DataFrame, value: str, by: str, *, percent: bool = False, ax: Axes | None = None
) -> Axes:
    """Horizontal bars, one per `by`, stacked by what the layers do.

    Columns: `operation`, `by`, and `value`. `percent` makes each bar 100 long.
    """
    ax = _axes(ax)
    kinds = frame.operation.map(operation_kind)
    sums = frame.groupby([frame[by], kinds], sort=False)[value].sum().unstack(fill_value=0)
    sums = sums.astype(float).reindex(list(dict.fromkeys(frame[by])))
    if percent:
        sums = 100 * sums.div(sums.sum(axis=1), axis=0)
    left = np.zeros(len(sums))
    for kind, color in style.OPERATION_COLORS.items():
        if kind in sums:
            bars = ax.barh([str(name) for name in sums.index], sums[kind], left=left, color=color,
                           height=0.68, label=kind, edgecolor="white", linewidth=0.4)  # fmt: skip
            if percent:
                texts = [f"{v:.0f}" if v >= 7 else "" for v in sums[kind]]
                dark = kind in ("convolution", "normalization", "linear")
                ax.bar_label(bars, texts, label_type="center", fontsize=6.5,
                             color="white" if dark else "black")  # fmt: skip
            left += sums[kind].to_numpy()
    ax.set_ylim(len(sums) - 0.45, -0.55)
    return ax


def plot_prediction(times: pd.DataFrame, predictor: str, *, ax: Axes | None = None) -> Axes:
    """Predicted against measured time per layer, log axes, with the line where they are equal.

    Columns: `network`, `seconds`, `{predictor}_seconds`. Layers predicted to take no time stand at
    the lower edge, which says so.
    """
    ax = _axes(ax)
    worked = times[times.seconds > 0]
    floor = 1e3 * worked.seconds.min() / 2
    for i, (network, rows) in enumerate(worked.groupby("network", sort=False)):
        predicted = (1e3 * rows[f"{predictor}_seconds"]).clip(lower=floor)
        look = style.look(i)
        ax.scatter(1e3 * rows.seconds, predicted, s=9, color=look.color, marker=look.marker,
                   alpha=0.6, linewidth=0, label=network)  # fmt: skip
    if (1e3 * worked[f"{predictor}_seconds"] < floor).any():
        ax.annotate("predicted to take (almost) no time", (0.03, floor), (0, -4), fontsize=6.5,
                    xycoords=ax.get_yaxis_transform(), textcoords="offset points", va="top",
                    color=style.QUIET)  # fmt: skip
        # Room for it. Panels may share the scale, which has yet to follow the others' points.
        ax.update_datalim([(floor, floor * (floor / (2e3 * worked.seconds.max())) ** 0.09)])
    ends = [floor, 2e3 * worked.seconds.max()]
    ax.plot(ends, ends, color=style.QUIET, linewidth=0.7, zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="measured (ms)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(plain_number))
        axis.set_minor_formatter(NullFormatter())
    return ax


def plot_latency(latency: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Milliseconds per image over batch size, one line per model, bars for the quartile range.

    Columns: `model`, `batch_size`, `seconds` (median per batch), `iqr`.
    """
    ax = _axes(ax)
    for i, (model, rows) in enumerate(latency.groupby("model", sort=False)):
        per_image, look = 1000 * rows.seconds / rows.batch_size, style.look(i)
        ax.errorbar(rows.batch_size, per_image, yerr=500 * rows.iqr / rows.batch_size,
                    marker=look.marker, linestyle=look.line, color=look.color, capsize=2,
                    label=model)  # fmt: skip
    ax.set(xscale="log", xlabel="images per batch", ylabel="time per image (ms)")
    ax.set_xticks(sorted(latency.batch_size.unique()))
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter(FuncFormatter(plain_number))
    ax.margins(x=0.1, y=0.15)
    ax.set_ylim(bottom=0)
    return ax


def plot_ratios(ratios: pd.Series, *, ax: Axes | None = None) -> Axes:
    """A lollipop per ratio (index: what is compared), on a log axis with 1 marked.

    A ratio of 0 or without end has no place on that axis: it is written beside the mark.
    """
    ax = _axes(ax)
    ratios = ratios.astype(float)
    drawn = ratios.where(np.isfinite(ratios) & (ratios > 0))
    ax.axvline(1, color=style.QUIET, linewidth=0.6)
    ax.hlines(list(ratios.index), 1, drawn, color=style.QUIET, linewidth=1)
    ax.scatter(drawn, list(ratios.index), color=style.SERIES[0], zorder=3, s=22)
    for name, ratio in ratios.items():
        place, below = (drawn[name], ratio < 1) if drawn[name] > 0 else (1, False)
        text = "not known" if np.isnan(ratio) else f"{_short(ratio)}x"
        ax.annotate(text, (place, name), (-6 if below else 6, 0), fontsize=7,
                    textcoords="offset points", va="center", ha="right" if below else "left",
                    )  # fmt: skip
    ax.set_ylim(len(ratios) - 0.5, -0.5)
    low, high = drawn.fillna(1).min(), drawn.fillna(1).max()
    if high < 4 and low > 0.5:  # a log axis would have no tick but 1
        ax.set_xlim(min(1, low) - 0.2, max(1.5, high) * 1.2)
        return ax
    ax.set(xscale="log")
    ax.set_xlim(min(1, low * 0.6) * 0.85, max(2, high) * 1.8)
    ax.xaxis.set_major_formatter(FuncFormatter(plain_number))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def plain_number(value: float, _position: int | None = None) -> str:
    """A tick label without exponent: 0.5, 20, 3,000."""
    return f"{value:g}" if value < 1000 else f"{value:,.0f}"


def dashes(control: int) -> tuple:
    """The line of control number 1, 2, ..."""
    return style.LINES[1 + (control - 1) % (len(style.LINES) - 1)]


def plot_by_depth(
    statistics: pd.DataFrame, value: str, *, control: int = 0, ax: Axes | None = None
) -> Axes:
    """One line per branch over the stages. Columns: `stage`, `branch`, and `value`.

    `control` draws them thin, dashed and without labels, to be compared with: 2 and 3 in other
    dashes than 1.
    """
    ax = _axes(ax)
    stages = style.stage_order(list(statistics.stage))
    for branch, rows in statistics.groupby("branch", sort=False):
        values = rows.groupby("stage")[value].mean().reindex(stages)
        look = {"marker": "o", "label": branch}
        if control:
            look = {"linewidth": 0.9, "linestyle": dashes(control), "label": "_control"}
        ax.plot(range(len(stages)), values, color=style.BRANCH_COLORS[branch], **look)
    ax.set_xticks(range(len(stages)), stages)
    ax.set(xlabel="Inception module")
    return ax


def plot_ablation(ablation: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Change of accuracy in points without each branch, over the stages, bars for the interval.

    Columns: `stage`, `branch`, `change`, `low`, `high` (fractions), one row per branch.
    """
    ax = _axes(ax)
    stages = style.stage_order(list(ablation.stage))
    branches = list(dict.fromkeys(ablation.branch))
    ax.axhline(0, color=style.QUIET, linewidth=0.6, zorder=0)
    for i, (branch, rows) in enumerate(ablation.groupby("branch", sort=False)):
        rows = rows.set_index("stage").reindex(stages)
        places = np.arange(len(stages)) + 0.16 * (i - (len(branches) - 1) / 2)
        reach = 100 * np.abs(rows[["low", "high"]].sub(rows.change, axis=0).to_numpy().T)
        ax.errorbar(places, 100 * rows.change, yerr=reach, color=style.BRANCH_COLORS[branch],
                    linestyle="", marker="o", elinewidth=0.9, label=branch)  # fmt: skip
    ax.set_xticks(range(len(stages)), stages)
    ax.set(xlabel="Inception module")
    return ax


def plot_montage(
    maps: np.ndarray, columns: int, *, limits: tuple[float, float] | None = None,
    cmap: str = "magma", ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Feature maps (channels x height x width) side by side in `columns`, each to its own range.

    `limits` gives all of them one range instead. The last row is filled with blanks.
    """
    ax = _axes(ax)
    count, height, width = maps.shape
    rows = -(-count // columns)
    gap = max(1, round(height / 14))
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for i, one in enumerate(maps):
        low, high = limits or (one.min(), one.max())
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        scaled = (one - low) / (high - low) if high > low else np.zeros_like(one)
        sheet[top : top + height, left : left + width] = scaled
    ax.imshow(sheet, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    return ax


def plot_overlay(
    image: np.ndarray, attribution: np.ndarray, *, limit: float | None = None,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Signed attribution (h x w) over a faded image (H x W x 3 uint8): red for, blue against."""
    ax = _axes(ax)
    height, width = image.shape[:2]
    limit = limit or largest(attribution) or 1.0
    grey = image.mean(axis=2) / 255 * 0.45 + 0.5
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    ax.imshow(attribution, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(0, width, height, 0),
              alpha=np.clip(np.nan_to_num(np.abs(attribution)) / limit, 0, 1) ** 0.5 * 0.85,
              interpolation="nearest")  # fmt: skip
    ax.set_axis_off()
    return ax


def plot_zero_share(structure: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What a module's one 5x5 convolution consists of: weights by branch, and empty for zeros.

    Columns: `stage`, `branch`, `nonzero`, `weights`. Percent of the module's weights; the share of
    zeros is written out.
    """
    ax = _axes(ax)
    stages = style.stage_order(list(structure.stage))
    sums = structure.groupby("stage")[["nonzero", "weights"]].sum()
    left = np.zeros(len(stages))
    for branch, rows in structure.groupby("branch", sort=False):
        share = (100 * rows.set_index("stage").nonzero / sums.weights).reindex(stages, fill_value=0)
        ax.barh(stages, share, left=left, color=style.BRANCH_COLORS[branch], height=0.78,
                label=f"{branch} branch")  # fmt: skip
        left += share.to_numpy()
    zeros = ax.barh(stages, 100 - left, left=left, height=0.78, facecolor="white",
                    edgecolor=style.QUIET, linewidth=0.6, label="zeros")  # fmt: skip
    ax.bar_label(zeros, [f"{100 - start:.0f}%" for start in left], label_type="center")
    ax.set(xlabel="weights of the 5x5 convolution (%)", xlim=(0, 100.5),
           ylim=(len(stages) - 0.4, -0.6))  # fmt: skip
    return ax


# Colour and label of each form but the dense 5x5 convolution, by form and kind of zeros.
_FORMS = {
    ("dense (im2col)", "none"): (style.QUIET, "dense (im2col)"),
    ("Inception branches", "structural"): (style.SERIES[1], "Inception branches"),
    ("CSR (im2col)", "structural"): (style.SERIES[0], "CSR (im2col), the branches' zeros"),
    ("CSR (matmul only)", "random"): (style.SERIES[2], "CSR (matmul only), random zeros"),
    ("CSR (im2col)", "random"): (style.SERIES[0], "CSR (im2col), random zeros"),
    ("2:4 (im2col)", "2:4"): (style.SERIES[3], "2:4 (im2col), float16"),
}


def plot_sparse_speed(speed: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Time over the dense convolution's against the share of zeros, log axes, a marker per stage.

    Columns: `form`, `stage`, `zeros`, `sparsity`, `ratio`. Random zeros are joined by lines; the
    branches' own zeros as CSR are open markers. The dashed line is what the count of operations
    promises: time = remaining operations.
    """
    ax = _axes(ax)
    least = 1 - speed.sparsity.max()
    ax.axhline(1, color=style.QUIET, linewidth=0.6, zorder=0)
    ax.plot([1, least], [1, least], color=style.QUIET, linestyle=(0, (4, 3)), linewidth=1,
            label="time = remaining operations")  # fmt: skip
    markers = dict(zip(style.stage_order(list(speed.stage)), "os^DvP<>X", strict=False))
    for (form, zeros), (color, label) in _FORMS.items():
        of_form = speed[(speed.form == form) & (speed.zeros == zeros)]
        is_open = form.startswith("CSR") and zeros == "structural"
        for i, (stage, rows) in enumerate(of_form.groupby("stage", sort=False)):
            ax.plot(1 - rows.sparsity, rows.ratio, color=color, marker=markers[stage],
                    markerfacecolor="white" if is_open else color, label="" if i else label,
                    linestyle="-" if zeros == "random" else "")  # fmt: skip
    for stage, marker in markers.items():
        # In a colour and fill that no form has.
        ax.plot([], [], color=style.QUIET, marker=marker, markerfacecolor="white", linestyle="",
                label=f"module {stage}")  # fmt: skip
    shares = sorted({0.0, *speed.sparsity[speed.zeros != "structural"]})
    ax.set(xscale="log", yscale="log", xlabel="zeros among the weights (%)",
           xlim=(1.25, least / 1.3), ylabel="time / dense 5x5 convolution")  # fmt: skip
    ax.set_xticks([1 - share for share in shares], [f"{100 * share:.4g}" for share in shares])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_formatter(FuncFormatter(plain_number))
    return ax
