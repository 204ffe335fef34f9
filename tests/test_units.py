"""Figures of selectivity: what stands where, in which colour, and nothing on top of anything."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from test_draw_gradients import misplaced

from gnetlab.draw import style, units

BRANCHES, STAGES = ("1x1", "3x3", "5x5", "pool"), ("3a", "3b", "4a")


def make_selectivity():
    random = np.random.default_rng(0)
    keys = [key for key in itertools.product(STAGES, BRANCHES) for _ in range(12)]
    frame = pd.DataFrame(keys, columns=["stage", "branch"])
    for name in units.LABELS:
        frame[name] = random.uniform(size=len(frame))
    frame.loc[frame.stage + frame.branch == "3a5x5", "colour"] = np.nan
    return frame


def make_verdicts():
    rows = itertools.product(STAGES, units.LABELS)
    return pd.DataFrame(rows, columns=["stage", "property"]).assign(
        p_adjusted=[0.5, 0.2, 0.04, 0.01, 0.3, 0.051, 0.01, 1.0, 0.02]
    )


def make_confound():
    rows = [
        (kernel, layout, seed, trained, name, 0.1 * i + 0.01 * seed)
        for i, (kernel, layout, trained, name) in enumerate(
            itertools.product(
                ("5x5", "3x3", "3x3+3x3"), ("paper", "equal"), (False, True), units.LABELS
            )
        )
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(
        rows, columns=["kernel", "layout", "seed", "trained", "property", "advantage"]
    )


def make_effects():
    contrasts = [
        ("kernel", "5x5 - 3x3", "paper widths"),
        ("kernel", "3x3+3x3 - 3x3", "equal widths"),
        ("width", "paper - equal widths", "5x5"),
    ]
    rows = [
        (*contrast, trained, name, 0.2, 0.1, 0.3 if contrast[0] == "kernel" else np.nan)
        for contrast in contrasts
        for trained in (False, True)
        for name in units.LABELS
    ]
    columns = ["factor", "contrast", "at", "trained", "property", "effect", "low", "high"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(low=frame.low.where(frame.high.notna()))


def make_counts():
    rows = [
        ("3a", "curves", "3x3", 11, 11, 128, 256, 4e-4),
        ("4a", "colour centre-surround", "5x5", 3, 4, 48, 508, 0.1),
    ]
    return pd.DataFrame(
        rows,
        columns=["stage", "label", "branch", "inside", "units", "branch_width", "width", "p"],
    )  # fmt: skip


selectivity, verdicts, confound, effects, counts = (
    pytest.fixture(make, name=make.__name__.removeprefix("make_"))
    for make in (make_selectivity, make_verdicts, make_confound, make_effects, make_counts)
)
EXCITING = pd.DataFrame({
    "module": ["inception3a.branch1x1"] * 3 + ["inception3a.branch5x5"] * 2,
    "branch": ["1x1"] * 3 + ["5x5"] * 2, "channel": [7, 8, 9, 0, 131],
    "start": [0.125, 1.04, 0.0, 123.4, 0.72], "reached": [13.6, 0.72, 0.0, 1234.0, 0.67],
})  # fmt: skip
IMAGES = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 4, 4, 3), np.uint8)
CASES = {
    "selectivity": lambda: (make_selectivity(), make_verdicts()),
    "confound": lambda: (make_confound(), make_effects()),
    "counts": lambda: (make_counts(),),
    "visualized": lambda: (IMAGES, EXCITING),
}


def test_means_are_drawn_in_the_branches_colours_with_na_left_out(selectivity, verdicts):
    ax = units.plot_selectivity(selectivity, verdicts, "colour")
    means = selectivity.groupby(["branch", "stage"]).colour.mean()
    for container in ax.containers:
        branch = container.get_label()
        line = container.lines[0]
        assert to_hex(line.get_color()) == style.BRANCH_COLORS[branch].lower()
        drawn = np.asarray(line.get_ydata(), float)
        np.testing.assert_allclose(drawn, means[branch])
        assert np.isnan(drawn[0]) == (branch == "5x5")
    rows = selectivity[(selectivity.branch == "pool") & (selectivity.stage == "4a")].colour
    low, high = ax.containers[3].lines[2][0].get_segments()[2][:, 1]
    assert high - low == pytest.approx(2 * 1.96 * rows.std() / 12**0.5)
    assert [text.get_text() for text in ax.texts if text.get_text() in BRANCHES]


def test_what_random_weights_show_too_is_marked_by_an_open_dot(selectivity, verdicts):
    tests = verdicts.assign(p_adjusted_random=[1.0] * 6 + [0.2, 1.0, 0.01])
    dots = units.plot_selectivity(selectivity, tests, "colour").collections[-1]
    assert dots.get_offsets()[:, 0].tolist() == [0, 2]
    assert dots.get_facecolor()[:, :3].tolist() == [[0, 0, 0], [1, 1, 1]]
    legend = units.selectivity_figure(selectivity, tests).legends[0]
    assert legend.get_texts()[-1].get_text() == "with random weights too"


def test_modules_that_differ_are_marked(selectivity, verdicts):
    for name, marked in (("orientation", [1, 2]), ("scale", []), ("colour", [0, 2])):
        ax = units.plot_selectivity(selectivity, verdicts, name)
        assert ax.collections[-1].get_offsets()[:, 0].tolist() == marked


def test_labels_keep_their_order_and_distance(selectivity, verdicts):
    close = selectivity.assign(scale=0.5 + 0.001 * selectivity.branch.map(BRANCHES.index))
    close.loc[0, "scale"] = 1.0
    ax = units.plot_selectivity(close, verdicts, "scale")
    places = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert sorted(places, key=places.get) == list(BRANCHES)
    low, high = ax.get_ylim()
    assert np.diff(sorted(places.values())).min() >= 0.07 * (high - low)


def test_advantages_stand_at_their_kernel_grey_before_training(confound):
    ax = units.plot_advantage(confound, "scale")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["5x5", "3x3", "3x3+3x3"]
    points = [c for c in ax.collections if len(c.get_offsets()) == 3]
    assert len(points) == 12
    frame = confound[confound.property == "scale"]
    drawn = sorted(y for c in points for y in c.get_offsets()[:, 1])
    np.testing.assert_allclose(drawn, sorted(frame.advantage))
    assert all(round(x) in range(3) for c in points for x in c.get_offsets()[:, 0])
    colors = {to_hex(c.get_facecolor()[0]) for c in points}
    assert colors == {"#bbbbbb", style.SERIES[0].lower(), style.SERIES[1].lower()}


def test_effects_have_intervals_where_there_are_any(effects):
    ax = units.plot_effects(effects, "colour")
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[0] == "5x5 - 3x3, paper widths"
    assert len(labels) == 3  # trained only
    points = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert [tuple(c.get_offsets()[0]) for c in points] == [(0.2, 0), (0.2, 1), (0.2, 2)]
    opened = [to_hex(c.get_facecolor()[0]) == "#ffffff" for c in points]
    assert opened == [False, False, True]
    intervals = [c.get_segments()[0][:, 0].tolist() for c in ax.collections if c not in points]
    assert intervals == [[0.1, 0.3], [0.1, 0.3]]


def test_counts_show_share_and_chance(counts):
    ax = units.plot_counts(counts)
    assert [bar.get_width() for bar in ax.patches] == [100, 75]
    chance = ax.collections[0].get_offsets()[:, 0].tolist()
    assert chance == pytest.approx([50, 100 * 48 / 508])
    assert "3 of 4 in 5x5, p = 1.0e-01" in [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("name", CASES)
def test_figures_have_no_overlapping_text_and_no_empty_panel(name):
    figure = getattr(units, f"{name}_figure")(*CASES[name](), note="3 seeds")
    assert misplaced(figure) == ([], [])
    assert all(ax.has_data() for ax in figure.axes)
    assert figure.get_figwidth() == style.WIDTHS["page"]
    assert len(figure.get_label()) > 40
    assert figure.get_label().endswith("3 seeds")


def test_visualized_figure_puts_every_image_under_its_number():
    figure = units.visualized_figure(IMAGES, EXCITING, columns=2)
    shown = {}
    for part in figure.subfigs:
        title = part.get_suptitle()
        for ax in part.axes:
            number = ax.get_title() or ax.get_title(loc="left")
            colour = to_hex(ax.spines["top"].get_edgecolor())
            shown[title, number] = (ax.images[0].get_array()[0, 0, 0], colour)
    colours = [to_hex(style.BRANCH_COLORS[branch]) for branch in EXCITING.branch]
    numbers = pd.Series(["7: 0.125 → 13.6", "8: 1.04 → 0.72", "9: 0 → 0", "0: 123 → 1,234",
                         "131: 0.72 → 0.67"])  # fmt: skip
    assert shown == dict(zip(zip(EXCITING.module, numbers, strict=True),
                             zip(range(5), colours, strict=True), strict=True))  # fmt: skip


@pytest.mark.parametrize(("each", "rows"), [(2, 1), (8, 4), (3, 2), (16, 8)])
def test_visualized_blocks_stand_side_by_side_where_they_fit(each, rows):
    modules = [f"inception3a.branch{b}" for b in BRANCHES for _ in range(each)]
    branches = [b for b in BRANCHES for _ in range(each)]
    frame = pd.DataFrame({"module": modules, "branch": branches, "channel": range(len(modules))})
    frame = frame.assign(start=0.5, reached=7.25)
    figure = units.visualized_figure(np.zeros((len(frame), 4, 4, 3), np.uint8), frame)
    assert sum(len(part.axes) for part in figure.subfigs) == len(frame)
    FigureCanvasAgg(figure).draw()
    heights = {round(ax.get_position().y0 * part.bbox.height + part.bbox.y0)
               for part in figure.subfigs for ax in part.axes}  # fmt: skip
    assert len(heights) == rows
