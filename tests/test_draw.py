"""Drawing: artists, labels and data rather than pixels, and files that come out the same."""

from functools import partialmethod
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from test_draw_gradients import misplaced

from gnetlab.draw import explorer, figures, plots, style

STAGES = ["stem", "3a", "3b", "head"]


def make_costs() -> pd.DataFrame:
    rows = [
        (model, stage, branch, 10**6 * (i + 1), 10**5 * (i + 1))
        for model in ("ours", "theirs")
        for stage, branches in zip(
            STAGES, [[""], ["1x1", "3x3", "5x5", "pool"], ["1x1"], [""]], strict=True
        )
        for i, branch in enumerate(branches)
    ]
    return pd.DataFrame(rows, columns=["model", "stage", "branch", "macs", "parameters"])


def make_table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "stage": ["conv1", "3a", "5a"],
            "parameters": [1024 * 9, 1024 * 159, 1024 * 1018],
            "printed_params": [2.7, 159.0, 1072.0],
            "macs": [118_000_000, 128_000_000, 51_000_000],
            "printed_ops": [34, 128, 54],
            "params_agree": [False, True, False],
            "ops_agree": [False, True, False],
        }
    )


def make_structure() -> pd.DataFrame:
    rows = [
        (stage, branch, nonzero, 100)
        for stage in ("3a", "4a")
        for branch, nonzero in (("1x1", 5), ("3x3", 40), ("5x5", 60))
    ]
    return pd.DataFrame(rows, columns=["stage", "branch", "nonzero", "weights"])


def make_speed() -> pd.DataFrame:
    rows = [
        (form, stage, batch, zeros, sparsity, ratio)
        for stage in ("3a", "4a")
        for batch in (1, 8)
        for form, zeros, sparsity, ratio in (
            ("dense 5x5", "none", 0.0, 1.0),
            ("dense (im2col)", "none", 0.0, 1.5),
            ("Inception branches", "structural", 0.65, 0.4),
            ("CSR (im2col)", "random", 0.9, 1.2),
            ("CSR (im2col)", "random", 0.99, 0.5),
            ("CSR (matmul only)", "random", 0.9, 1.1),
            ("CSR (matmul only)", "random", 0.99, 0.2),
            ("CSR (im2col)", "structural", 0.65, 4.0),
        )
    ]
    columns = ["form", "stage", "batch_size", "zeros", "sparsity", "ratio"]
    return pd.DataFrame(rows, columns=columns)


def make_passes() -> pd.DataFrame:
    rows = [
        (variant, operation, seconds)
        for variant, factor in (("as it is", 1.0), ("fused", 0.5))
        for operation, seconds in (
            ("conv2d", 0.01 * factor), ("max_pool2d", 0.02 * factor), ("relu_", 0.002),
            ("batch_norm", 0.003), ("add", 0.005),
        )
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["variant", "operation", "seconds"])


costs, table, structure, speed, passes = (
    pytest.fixture(make, name=make.__name__.removeprefix("make_"))
    for make in (make_costs, make_table, make_structure, make_speed, make_passes)
)

EXPLAINED = pd.DataFrame(
    [
        ("fvcore", "multiply-adds", 100e6), ("fvcore", "batch norm, 2 per output", 3e6),
        ("fvcore", "adaptive pooling, inputs", 1e6),
        ("FlopCounterMode", "multiplications and additions", 200e6),
    ],
    columns=["tool", "term", "operations"],
)  # fmt: skip
WIDTHS = pd.DataFrame({"width": [0.5, 1, 2], "macs": [3e8, 1e9, 4e9],
                       "exponent": [np.nan, 1.74, 2.0]})  # fmt: skip
RESOLUTIONS = pd.DataFrame(
    [(name, side, macs * side**2)
     for name, macs in (("GoogLeNet", 1e4), ("VGG-16", 9e4), ("VGG-16, small", 9.01e4))
     for side in (32, 224)],
    columns=["network", "side", "macs"],
)  # fmt: skip
TIMES = pd.DataFrame({
    "network": ["a", "a", "b"], "seconds": [1e-3, 2e-3, 4e-3],
    **{f"{p}_seconds": [0, 1e-3, 8e-3] for p in ("macs", "roofline", "calibrated")},
})  # fmt: skip
AGREEMENT = pd.DataFrame({"predictor": ["macs", "roofline", "calibrated"],
                          "spearman": [0.5, 0.75, 0.954]})  # fmt: skip
IMPLEMENTATIONS = pd.DataFrame({"implementation": ["a", "b"], "side": [224, 32],
                                "macs": [1e9, 2e9], "parameters": [6e6, 7e6]})  # fmt: skip
ABLATION = pd.DataFrame(
    [
        (stage, branch, kind, -0.1 * (i + 1), -0.1 * (i + 1) - 0.05, -0.1 * (i + 1) + 0.05)
        for kind in ("zero", "mean")
        for stage in ("3a", "3b")
        for i, branch in enumerate(("1x1", "pool"))
    ],
    columns=["stage", "branch", "kind", "change", "low", "high"],
)
FIELDS = pd.DataFrame({"stage": ["3a", "3b"] * 2, "branch": ["1x1"] * 2 + ["pool"] * 2,
                       "theoretical": [27, 59, 43, 75], "ratio": [0.9, 0.8, 0.7, 0.6]})  # fmt: skip
CORRELATIONS = pd.DataFrame({
    "network": ["trained"] * 2 + ["random"] * 2, "stage": ["3a", "3b"] * 2,
    "within": [0.4, 0.3, 0.2, 0.1], "between": [0.2, 0.2, 0.1, 0.1], "z": [9, 8, 1, 0],
})  # fmt: skip
CONDUCTANCE = pd.DataFrame(
    [("3a", "1x1", 0.7, 0.9), ("3a", "pool", -0.3, 0.9), ("5b", "1x1", 1.0, 1.3)],
    columns=["stage", "branch", "share", "completeness"],
)
IMAGE = np.zeros((16, 16, 3), np.uint8)
BRANCHES = ("1x1", "3x3", "5x5", "pool")
MAPS = {"3a": {b: np.random.default_rng(0).random((12, 4, 4)) for b in BRANCHES}}
BY_BRANCH = pd.DataFrame(
    [("3a", b, 0.25, 1.0, 0.5, 0.25, 0.3) for b in BRANCHES],
    columns=[
        "stage", "branch", "energy_share", "energy_ratio", "zero_fraction", "share", "rank_share",
    ],
)  # fmt: skip
MODELS = pd.DataFrame({"model": ["a"], "top1": [60.0], "macs": [1e8], "parameters": [1e6]})
LATENCY = pd.DataFrame({"model": ["m"], "batch_size": [1], "seconds": [0.01], "iqr": [0.0]})
CASES = {
    "cost": lambda: (make_costs(),),
    "reduction": lambda: (
        make_costs().rename(columns={"model": "variant"}).assign(out_channels=8, pool_share=0.2),
    ),
    "table_1": lambda: (make_table(),),
    "counters": lambda: (EXPLAINED, 100_000_000),
    "scaling": lambda: (WIDTHS, RESOLUTIONS),
    "implementations": lambda: (IMPLEMENTATIONS,),
    "time": lambda: (
        make_passes().assign(quantity="time", amount=lambda f: f.seconds), make_passes(),
    ),
    "predictors": lambda: (TIMES, AGREEMENT),
    "early": lambda: (pd.Series([1.9, 1.1], index=["memory", "time"]),),
    "accuracy": lambda: (MODELS, {"a": "A"}),
    "latency": lambda: (LATENCY, pd.Series({"macs": 2.0}), "ours"),
    "maps": lambda: (IMAGE, MAPS),
    "branch_statistics": lambda: (BY_BRANCH,),
    "receptive": lambda: (FIELDS, 224),
    "ablation": lambda: (ABLATION,),
    "correlation": lambda: (CORRELATIONS,),
    "attribution": lambda: (IMAGE, {"3a": {b: m[0] for b, m in MAPS["3a"].items()}}, BY_BRANCH),
    "conductance": lambda: (CONDUCTANCE,),
    "image_attribution": lambda: (IMAGE, {"occlusion": np.ones((16, 16))}),
    "sparsity": lambda: (make_structure(), make_speed()),
}  # fmt: skip


def lightness(color: str) -> float:
    """CIE L* (0 to 100) of an sRGB colour: what is left of it in grey."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    y = np.dot([0.2126, 0.7152, 0.0722], linear)
    return 116 * np.cbrt(y) - 16 if y > 0.008856 else 903.3 * y


@pytest.mark.parametrize("colors", [style.BRANCH_COLORS, style.SOURCE_COLORS])
def test_colours_of_one_figure_differ_in_grey(colors):
    named = {name: color for name, color in colors.items() if name}
    levels = sorted(lightness(color) for color in named.values())
    assert min(np.diff(levels)) >= 9


def test_drawing_leaves_global_settings_alone(costs, tmp_path):
    before = dict(matplotlib.rcParams)
    figures.save(figures.cost_figure(costs), "a", costs, directory=tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_stage_costs_stack_to_the_total(costs):
    ours = costs[costs.model == "ours"]
    ax = plots.plot_stage_costs(ours)
    ends: dict[float, float] = {}
    for bar in ax.patches:
        y = round(bar.get_y() + bar.get_height() / 2, 6)
        ends[y] = max(ends.get(y, 0), bar.get_x() + bar.get_width())
    assert list(ends.values()) == pytest.approx([1, 10, 1, 1])
    assert [label.get_text() for label in ax.get_yticklabels()] == STAGES
    assert ax.get_xlabel() == "multiply-adds (millions)"
    assert ax.yaxis_inverted()


def test_legend_of_costs_names_what_only_one_network_has(costs):
    plain = costs[costs.branch == ""].assign(model="VGG")
    for order in ([plain, costs], [costs, plain]):
        figure = figures.cost_figure(pd.concat(order))
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            "1x1 branch", "3x3 branch", "5x5 branch", "pool branch", "outside the modules",
        ]  # fmt: skip


def test_legend_of_time_names_what_only_one_panel_has(passes):
    shares = passes.assign(quantity="time", amount=passes.seconds)
    figure = figures.time_figure(shares, passes[passes.operation != "max_pool2d"])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["convolution", "max pooling", "normalization", "ReLU", "other"]


def test_grouped_bars_show_every_group(costs):
    ax = plots.plot_grouped(costs, "macs", "model", scale=1e6, label="millions")
    assert [c.get_label() for c in ax.containers] == ["ours", "theirs"]
    widths = [bar.get_width() for bar in ax.containers[0]]
    assert widths == pytest.approx([1, 10, 1, 1])


def test_table_1_marks_what_disagrees(table):
    ax = plots.plot_table_1(table, "ops")
    agree, differ = ax.collections[-2:]
    assert agree.get_offsets().tolist() == [[1.0, 1.0]]
    assert differ.get_offsets()[:, 0].tolist() == pytest.approx([118 / 34, 51 / 54])
    assert {t.get_text() for t in ax.texts} == {"118 for 34", "51 for 54"}


def test_accuracy_names_the_highlighted():
    models = pd.DataFrame(
        {"model": ["a", "b", "c"], "top1": [60.0, 70.0, 80.0], "macs": [1e8, 1e9, 1e10]}
    )
    ax = plots.plot_accuracy(models, {"b": "Bee"})
    assert [t.get_text() for t in ax.texts] == ["Bee"]
    assert ax.collections[1].get_offsets().tolist() == [[1000.0, 70.0]]
    assert ax.get_xscale() == "log"


def test_latency_is_per_image():
    frame = pd.DataFrame(
        {"model": ["m", "m"], "batch_size": [1, 8], "seconds": [0.01, 0.04], "iqr": [0.0, 0.0]}
    )
    line = plots.plot_latency(frame).lines[0]
    assert line.get_ydata().tolist() == pytest.approx([10, 5])


def test_more_variants_than_colours_differ_in_style():
    names = [f"n{i}" for i in range(8)]
    of_all = pd.DataFrame({"model": names, "batch_size": 1, "seconds": 0.01, "iqr": 0.0})
    lines = [c.lines[0] for c in plots.plot_latency(of_all).containers]
    assert lines[0].get_color() == lines[6].get_color() != lines[1].get_color()
    assert [line.get_marker() for line in lines] == ["o"] * 6 + ["s"] * 2
    assert lines[0].get_linestyle() != lines[6].get_linestyle()
    of_all = of_all.assign(stage="3a", network=names, macs_seconds=0.01)
    bars = plots.plot_grouped(of_all, "seconds", "model").patches
    assert bars[0].get_facecolor() == bars[6].get_facecolor()
    assert bars[0].get_hatch() != bars[6].get_hatch()
    points = plots.plot_prediction(of_all, "macs").collections
    assert len(points[0].get_paths()[0].vertices) != len(points[6].get_paths()[0].vertices)


def test_ratios_are_written_out():
    ax = plots.plot_ratios(pd.Series({"macs": 9.77, "time": 0.5}))
    assert [t.get_text() for t in ax.texts] == ["9.77x", "0.5x"]


def test_numbers_have_no_exponents():
    ax = plots.plot_ratios(pd.Series({"macs": 1500.0, "time": 999.7}))
    assert [t.get_text() for t in ax.texts] == ["1,500x", "1,000x"]


@pytest.mark.parametrize("others", [[0.0], [np.inf], [np.nan], [0.0, np.nan, -np.inf], [20.0, 0.0]])
def test_ratios_without_a_place_are_written(others):
    ratios = pd.Series([2.0, *others], index=list("abcd")[: len(others) + 1])
    figure = figures.early_figure(ratios)
    assert misplaced(figure)[0] == []
    assert len(figure.axes[0].texts) == len(ratios)
    low, high = figure.axes[0].get_xlim()
    assert 0 < low < 2 < high < 100
    figures.early_figure(ratios[1:].astype(object))


def test_values_without_end_do_not_set_limits():
    odd = CONDUCTANCE.assign(completeness=[np.inf, np.inf, 1.3])
    right = figures.conductance_figure(odd).axes[1]
    assert right.get_xlim() == pytest.approx((1 - 1.15 * 0.3, 1 + 1.15 * 0.3))
    misplaced(figures.conductance_figure(odd.assign(completeness=np.nan, share=np.nan)))
    for values, limit in ((np.full((4, 4), np.nan), 1), (np.array([[np.inf, 2], [np.nan, -1]]), 2)):
        image = figures.image_attribution_figure(IMAGE, {"odd": values})
        assert image.axes[1].images[1].get_clim()[1] == pytest.approx(limit, rel=0.01)
        misplaced(image)
        maps = {"3a": dict.fromkeys(BRANCHES, values)}
        branches = figures.attribution_figure(IMAGE, maps, BY_BRANCH)
        assert branches.axes[1].images[1].get_clim() == (-limit, limit)
        misplaced(branches)


def test_lines_over_depth_have_the_branch_colours():
    frame = pd.DataFrame(
        {"stage": ["3a", "3b"] * 2, "branch": ["1x1"] * 2 + ["pool"] * 2, "share": [1, 2, 3, 4]}
    )
    ax = plots.plot_by_depth(frame, "share")
    assert {line.get_label(): line.get_color() for line in ax.lines} == {
        name: style.BRANCH_COLORS[name] for name in ("1x1", "pool")
    }
    assert ax.lines[1].get_ydata().tolist() == [3, 4]


def test_control_is_dashed_and_has_no_label():
    frame = pd.DataFrame({"stage": ["3a", "3b"], "branch": "1x1", "share": [1.0, 2.0]})
    (line,) = plots.plot_by_depth(frame, "share", control=True).lines
    assert line.get_label().startswith("_")
    assert line.get_linestyle() == "--"
    assert line.get_ydata().tolist() == [1, 2]


def test_statistics_figure_names_the_control():
    rows = [("3a", "1x1", 0.5, 0.3, 0.2, 0.1, n) for n in ("mine", "random")]
    columns = ["stage", "branch", "energy_share", "energy_ratio", "zero_fraction", "rank_share"]
    frame = pd.DataFrame(rows, columns=[*columns, "network"])
    figure = figures.branch_statistics_figure(frame)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["1x1 branch", "random"]
    # Full line, control, and in one panel the line at 1.
    assert [len(ax.lines) for ax in figure.axes] == [2, 3, 2, 2]


def test_statistics_figure_tells_two_controls_apart():
    frame = pd.concat([BY_BRANCH.assign(network=name) for name in ("mine", "random", "shuffled")])
    figure = figures.branch_statistics_figure(frame)
    *_, random, shuffled = figure.legends[0].get_lines()
    assert [t.get_text() for t in figure.legends[0].get_texts()][-2:] == ["random", "shuffled"]
    assert random._dash_pattern != shuffled._dash_pattern
    drawn = figure.axes[0].lines
    assert [drawn[i]._dash_pattern for i in (4, 8)] == [
        random._dash_pattern,
        shuffled._dash_pattern,
    ]


def test_conductance_figure_shows_what_the_sum_leaves_out():
    left, right = figures.conductance_figure(CONDUCTANCE).axes
    assert left.lines[1].get_ydata()[0] == -0.3
    assert right.lines[1].get_xdata().tolist() == [0.9, 1.3]
    low, high = right.get_xlim()
    assert low < 0.9
    assert high > 1.3
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["1x1", "pool"]


def test_single_pixels_do_not_set_the_scale_of_an_image_attribution():
    image, values = np.zeros((40, 40, 3), np.uint8), np.ones((40, 40))
    values[0, 0] = -1000
    figure = figures.image_attribution_figure(image, {"occlusion": values})
    assert [ax.get_title() or ax.get_title(loc="left") for ax in figure.axes] == [
        "image",
        "occlusion",
    ]
    drawn = figure.axes[1].images[1]
    assert drawn.get_clim() == (-1, 1)
    np.testing.assert_array_equal(drawn.get_array(), values)


def test_montage_holds_every_map_at_its_place():
    maps = np.arange(5 * 4 * 4, dtype=float).reshape(5, 4, 4)
    sheet = plots.plot_montage(maps, columns=3, limits=(0, 79)).images[0].get_array()
    assert sheet.shape == (9, 14)
    np.testing.assert_allclose(sheet[5:9, 5:9], maps[4] / 79)
    assert np.ma.getmaskarray(np.ma.masked_invalid(sheet))[5:, 10:].all()


def test_constant_map_is_drawn_as_nothing():
    sheet = plots.plot_montage(np.ones((1, 2, 2)), columns=1).images[0].get_array()
    assert (np.asarray(sheet) == 0).all()


def test_overlay_is_signed_and_stretched_over_the_image():
    attribution = np.array([[1.0, -2.0], [0.0, 0.5]])
    ax = plots.plot_overlay(np.zeros((8, 8, 3), np.uint8), attribution)
    overlay = ax.images[1]
    assert overlay.get_clim() == (-2, 2)
    assert overlay.get_extent() == ax.images[0].get_extent()
    assert overlay.get_alpha()[1, 0] == 0


def test_zero_share_fills_every_bar(structure):
    ax = plots.plot_zero_share(structure)
    assert [c.get_label() for c in ax.containers] == [
        "1x1 branch", "3x3 branch", "5x5 branch", "zeros",
    ]  # fmt: skip
    widths = [[bar.get_width() for bar in c] for c in ax.containers]
    assert widths[0] == pytest.approx([5 / 3] * 2)
    assert [sum(bar) for bar in zip(*widths, strict=True)] == pytest.approx([100, 100])
    assert {t.get_text() for t in ax.texts} == {"65%"}
    assert [to_rgb(c[0].get_facecolor()) for c in ax.containers[:3]] == [
        to_rgb(style.BRANCH_COLORS[branch]) for branch in ("1x1", "3x3", "5x5")
    ]


def test_sparse_speed_is_over_the_remaining_operations(speed):
    ax = plots.plot_sparse_speed(speed[speed.batch_size == 1])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["CSR (im2col), random zeros"].get_xdata() == pytest.approx([0.1, 0.01])
    assert lines["CSR (im2col), random zeros"].get_ydata().tolist() == [1.2, 0.5]
    assert lines["CSR (im2col), random zeros"].get_linestyle() == "-"
    assert lines["CSR (im2col), the branches' zeros"].get_markerfacecolor() == "white"
    assert lines["Inception branches"].get_ydata().tolist() == [0.4]
    promised = lines["time = remaining operations"]
    assert promised.get_xdata() == pytest.approx(promised.get_ydata())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "90", "99"]
    assert ax.get_xlim()[0] > ax.get_xlim()[1]  # more zeros to the right
    assert {lines[f"module {stage}"].get_marker() for stage in ("3a", "4a")} == {"o", "s"}
    looks = [(line.get_color(), line.get_markerfacecolor(), line.get_linestyle())
             for label, line in lines.items() if label[0] != "_" and "4a" not in label]  # fmt: skip
    assert len(looks) == len(set(looks))  # a form's and a module's key do not look alike


def test_sparsity_figure_has_a_panel_per_batch_size(structure, speed):
    left, one, eight = figures.sparsity_figure(structure, speed).axes
    assert left.get_title(loc="left") == "Zeros"
    assert [ax.get_title(loc="left") for ax in (one, eight)] == ["Time, batch 1", "Time, batch 8"]
    assert one.get_ylim() == eight.get_ylim()


@pytest.mark.parametrize("name", CASES)
def test_text_of_a_figure_lies_inside_it(name):
    figure = getattr(figures, f"{name}_figure")(*CASES[name](), note="made in a test")
    assert misplaced(figure)[0] == []
    assert figure.get_supxlabel() == "made in a test"
    assert figure.get_figwidth() in style.WIDTHS.values()
    assert all(ax.has_data() or not ax.axison for ax in figure.axes)


def test_names_of_any_characters_are_drawn_as_they_are(costs, tmp_path):
    names = {"ours": "a$_{}$b $", "theirs": "_under_$5"}
    frame = LATENCY.assign(model=names["theirs"])
    figure = figures.latency_figure(frame, pd.Series({names["ours"]: 2.0}), "a $x^$ b", note="$^$")
    (entry,) = figure.axes[0].get_legend().get_texts()
    assert style.as_given(entry.get_text()) == names["theirs"]
    assert "a $x^$ b" in figures.data_summary(figure)
    figures.save(figure, "a", frame, directory=tmp_path)
    assert figure.call.arguments[0].model.tolist() == [names["theirs"]]
    renamed = costs.assign(model=costs.model.map(names))
    figure = figures.cost_figure(renamed.astype({"model": "category"}))
    assert misplaced(figure)[0] == []
    assert "\\" not in figures.data_summary(figure)
    left, middle, *_ = figure.axes
    assert style.as_given(middle.get_title("left")) == "a$_{}$b $, own scale"
    assert [t.get_text() for t in left.get_yticklabels()] == [*map(style.plain, names.values())]


def test_long_names_and_notes_stay_on_the_page():
    long = "a network whose name is as long as that of a file of weights, number"
    networks = [BY_BRANCH.assign(network=f"{long} {i}") for i in range(4)]
    note = " ".join(f"{long} {i};" for i in range(4))
    figure = figures.branch_statistics_figure(pd.concat(networks), note=note)
    assert misplaced(figure) == ([], [])
    assert len(figure.legends) == 1
    assert len(figure.legends[0].get_texts()) == 7
    assert figure.get_supxlabel().replace("\n", " ") == note
    endless = figures.branch_statistics_figure(
        pd.concat([BY_BRANCH, BY_BRANCH.assign(network="word " * 50)]).fillna({"network": "one"})
    )
    assert misplaced(endless) == ([], [])


def test_save_writes_six_kinds_the_same_way_twice(costs, tmp_path):
    for folder in ("a", "b"):
        figures.save(
            figures.cost_figure(costs), "cost", costs,
            directory=tmp_path / folder, latex=True,
        )  # fmt: skip
    names = {f"cost.{kind}" for kind in ("png", "svg", "pdf", "csv", "tex", "call.zip")}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert (
        Image.open(tmp_path / "a" / "cost.png")
        .info["Description"]
        .startswith("MACs and parameters: the networks on one scale")
    )
    assert b"/Type3" not in (tmp_path / "a" / "cost.pdf").read_bytes()
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "a" / "cost.csv", keep_default_na=False), costs
    )
    assert r"\begin{tabular}" in (tmp_path / "a" / "cost.tex").read_text()


def test_latex_table_says_what_it_needs_and_is_utf_8(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", partialmethod(write_text_elsewhere, Path.write_text))
    frame = pd.DataFrame({"name": ["Nguyễn", "b"], "ratio": [1.5, np.nan]})
    saved = figures.save(Figure(), "a", frame, directory=tmp_path, latex=True)
    lines = saved.paths["tex"].read_text("utf-8").splitlines()
    assert lines[0] == r"% needs \usepackage{booktabs}"
    assert r"Nguyễn & 1.5 \\" in lines
    assert r"b & -- \\" in lines


def write_text_elsewhere(path, write, text, encoding="ascii", **options):
    """`Path.write_text` on a machine whose own encoding has no accents."""
    return write(path, text, encoding, **options)


def test_saved_figure_shows_its_png_in_a_notebook(costs, tmp_path):
    saved = figures.save(figures.cost_figure(costs), "c", costs, directory=tmp_path)
    bundle, metadata = saved._repr_mimebundle_()
    assert bundle["image/png"] == (tmp_path / "c.png").read_bytes()
    assert metadata["image/png"]["width"] == 720
    assert "MACs and parameters" in repr(saved)


@pytest.mark.parametrize("name", ["../x", "a b", "", "a.png"])
def test_save_refuses_names_that_are_paths(name, tmp_path):
    with pytest.raises(ValueError, match="figure name"):
        figures.save(Figure(), name, pd.DataFrame(), directory=tmp_path)


def test_stage_order_keeps_unknown_stages():
    assert style.stage_order(["head", "block2", "stem"]) == ["stem", "block2", "head"]


def test_counters_stack_what_is_beside_the_multiply_adds():
    ax = plots.plot_counters(EXPLAINED, 100_000_000)
    lengths = {c.get_label(): [bar.get_width() for bar in c] for c in ax.containers}
    assert lengths == {"batch norm": [3, 0], "pooling": [1, 0]}
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["prints 104.0 M", "prints 200.0 M (2 x MACs)"]
    assert figures.counters_figure(EXPLAINED, 100_000_000).axes[0].get_legend() is not None


def test_width_shows_the_exponents_beside_slopes_of_one_and_two():
    ax = plots.plot_width(WIDTHS)
    slope_1, slope_2, measured = (line.get_xydata() for line in ax.lines)
    assert slope_1.tolist() == [[0.5, 0.5], [2, 2]]
    assert slope_2.tolist() == [[0.5, 0.25], [2, 4]]
    assert measured.tolist() == [[0.5, 0.3], [1, 1], [2, 4]]
    assert [t.get_text() for t in ax.texts] == ["exponent 1", "exponent 2", "1.74", "2.00"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1]])
@pytest.mark.parametrize(("widths", "anchor"), [([0.25, 0.5, 4], 1), ([0.2, 0.4, 0.8], 0.8)])
def test_slopes_go_through_width_one_or_the_nearest(widths, anchor, rows):
    frame = pd.DataFrame({"width": widths, "exponent": 1.5}).assign(
        macs=lambda f: 1e9 * f.width**1.5
    )
    slope_1, slope_2, measured = (
        line.get_xydata() for line in plots.plot_width(frame.iloc[rows]).lines
    )
    for power, line in ((1, slope_1), (2, slope_2)):
        at = anchor**1.5 * (line[:, 0] / anchor) ** power
        assert line[:, 1] == pytest.approx(at)
    assert measured[:, 0].tolist() == widths


def test_resolution_names_lines_at_their_ends_without_overlap():
    ax = plots.plot_resolution(RESOLUTIONS)
    assert [t.get_text() for t in ax.texts] == ["GoogLeNet", "VGG-16", "VGG-16, small"]
    heights = [np.log10(t.xy[1]) for t in ax.texts]
    assert heights[2] - heights[1] > 0.05
    assert ax.lines[0].get_ydata().tolist() == [1e4 * 32**2 / 1e9, 1e4 * 224**2 / 1e9]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "--"]
    assert len(figures.scaling_figure(WIDTHS, RESOLUTIONS).axes) == 2
    stems = RESOLUTIONS.assign(network=RESOLUTIONS.network.str.replace("VGG-16", "stem"))
    for table in (RESOLUTIONS, stems):
        looks = {(line.get_color(), str(line._dash_pattern)) for line in
                 plots.plot_resolution(table).lines}  # fmt: skip
        assert len(looks) == 3


def test_accuracy_front_is_what_nothing_beats():
    models = pd.DataFrame({
        "model": list("abcd"), "top1": [60.0, 55, 70, 65], "macs": [1e6, 2e6, 3e6, 4e6],
    })  # fmt: skip
    ax = plots.plot_accuracy(models, {"a": "A"})
    front = ax.lines[0].get_xydata()
    assert front.tolist() == [[1, 60], [3, 70]]
    assert ax.lines[0].get_drawstyle() == "steps-post"


def test_operations_are_stacked_by_kind(passes):
    ax = plots.plot_operations(passes, "seconds", "variant")
    lengths = {c.get_label(): [bar.get_width() for bar in c] for c in ax.containers}
    assert list(lengths) == ["convolution", "max pooling", "normalization", "ReLU", "other"]
    assert lengths["max pooling"] == pytest.approx([0.02, 0.01])
    ends = [sum(bars) for bars in zip(*lengths.values(), strict=True)]
    assert ends == pytest.approx([0.04, 0.025])
    ax = plots.plot_operations(passes, "seconds", "variant", percent=True)
    total = sum(np.array([bar.get_width() for bar in c]) for c in ax.containers)
    assert total.tolist() == pytest.approx([100, 100])
    assert "50" in [text.get_text() for text in ax.texts]


def test_time_figure_has_shares_and_variants(passes):
    shares = passes.assign(quantity="time", amount=passes.seconds)
    left, right = figures.time_figure(shares, passes).axes
    assert left.get_xlim() == (0, 100)
    assert right.get_xlabel().endswith("(ms)")
    assert max(bar.get_x() + bar.get_width() for c in right.containers for bar in c) > 39


def test_predictions_stand_against_what_was_measured():
    ax = plots.plot_prediction(TIMES, "macs")
    points = [c.get_offsets().tolist() for c in ax.collections]
    assert points == [[[1, 0.5], [2, 1]], [[4, 8]]]  # no predicted time: at the lower edge
    assert [c.get_label() for c in ax.collections] == ["a", "b"]
    titles = [ax.get_title("left") for ax in figures.predictors_figure(TIMES, AGREEMENT).axes]
    total = "predicted / measured in total: 1.29"
    assert titles[0] == f"Multiply-adds only: rank corr. 0.50\n{total}"
    assert titles[2] == f"Calibrated: rank corr. 0.95\n{total}"


def test_only_what_stands_at_the_lower_edge_is_explained():
    later = TIMES.assign(macs_seconds=1e-3)
    assert not plots.plot_prediction(later, "macs").texts
    ax = plots.plot_prediction(TIMES, "macs")
    (note,) = ax.texts
    assert note.get_text() == "predicted to take (almost) no time"
    assert ax.get_ylim()[0] < 0.45  # below the points at 0.5
    axes = figures.predictors_figure(TIMES.assign(calibrated_seconds=1), AGREEMENT).axes
    assert axes[2].get_ylim()[1] > 1000


def test_implementations_show_both_costs():
    left, right = figures.implementations_figure(IMPLEMENTATIONS).axes
    assert not left.containers + right.containers  # on a log axis bars would start anywhere
    assert left.collections[0].get_offsets().tolist() == [[1000, 0], [2000, 1]]
    assert right.collections[0].get_offsets().tolist() == [[6, 0], [7, 1]]
    assert [t.get_text() for t in right.texts] == ["6.00", "7.00"]
    assert [t.get_text() for t in left.get_yticklabels()] == ["a (224 px)", "b (32 px)"]


@pytest.mark.parametrize(("values", "scale"), [([1.9, 1.1], "linear"), ([19.0, 1.1], "log")])
def test_small_ratios_stand_on_a_linear_axis(values, scale):
    ratios = pd.Series(values, index=["memory", "time"])
    ax = figures.early_figure(ratios).axes[0]
    assert ax.get_xscale() == scale
    assert ax.collections[-1].get_offsets()[:, 0].tolist() == values
    assert [t.get_text() for t in ax.texts] == [f"{v:.3g}x" for v in values]
    low, high = ax.get_xlim()
    assert low < min(values) < max(values) < high


def test_ablation_shows_changes_with_their_intervals():
    left, right = figures.ablation_figure(ABLATION).axes
    assert [left.get_title("left"), right.get_title("left")] == [
        "Branch puts out zeros", "Branch puts out its mean",
    ]  # fmt: skip
    points = [container.lines[0].get_ydata().tolist() for container in left.containers]
    assert points == [pytest.approx([-10, -10]), pytest.approx([-20, -20])]
    segment = left.containers[0].lines[2][0].get_segments()[0]
    assert segment[:, 1] == pytest.approx([-15, -5])
    assert left.containers[0].lines[0].get_color() == style.BRANCH_COLORS["1x1"]
    assert left.get_ylim() == right.get_ylim()


def test_receptive_figure_draws_the_image_across():
    left, right = figures.receptive_figure(FIELDS, 224).axes
    assert [line.get_ydata().tolist() for line in left.lines[:2]] == [[27, 59], [43, 75]]
    assert left.lines[2].get_ydata() == [224, 224]
    assert [line.get_ydata().tolist() for line in right.lines] == [[0.9, 0.8], [0.7, 0.6]]


def test_correlations_of_two_networks_stand_side_by_side():
    left, right = figures.correlation_figure(CORRELATIONS).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in left.lines}
    assert lines == {
        "trained, within": [0.4, 0.3], "trained, between": [0.2, 0.2],
        "random, within": [0.2, 0.1], "random, between": [0.1, 0.1],
    }  # fmt: skip
    assert [line.get_ydata().tolist() for line in right.lines[:2]] == [[9, 8], [1, 0]]
    assert left.lines[0].get_color() == style.EMPHASIS


@pytest.mark.parametrize("modules", [9, 17, 29])
def test_the_explorers_sheet_has_room_for_many_modules_and_long_names(modules):
    names = [f"inception4c_{i}.{b}" for i in range(1, modules + 1) for b in BRANCHES]
    maps = {name: np.random.default_rng(0).random((1, 4, 4)) for name in names}
    statistics = pd.DataFrame({"module": names, "branch": list(BRANCHES) * modules,
                               "channel": 0, "deviation": 1.0})  # fmt: skip
    likeliest = [("American Staffordshire terrier (180)", 0.107), ("W" * 30, 1.0), ("cat", 0.05)]
    picture = explorer.Picture(
        "a photograph's name of 40 letters, $x^$ y", "", IMAGE, likeliest, "", maps, {}, statistics
    )
    figure = explorer.explorer_figure(picture, note="weights of nobody")
    assert misplaced(figure) == ([], [])
    name, *classes = (style.as_given(text.get_text()) for text in figure.texts[:4])
    assert name.startswith("a photograph's")
    assert classes[0].startswith("American Staf")
    assert [text.partition("  ")[2] for text in classes] == ["10.7%", "100.0%", "5.0%"]
    assert [name.endswith("…"), "…" in classes[2]] == [True, False]
    image = figure.axes[0].get_position()
    assert 0 < image.y0 < image.y1 < 1


def test_a_summary_says_in_numbers_what_the_panels_show():
    figure = Figure()
    with style.context():
        left, right, empty = figure.subplots(1, 3)
        left.plot([1, 2, 3], [0.5, np.nan, 1250], label="main loss")
        left.plot([1, 2], [1, 1], label="_not told")
        left.set(title="Loss", xlabel="step", ylabel="nats")
        left.plot([3, 4], ["3a", "3b"], label="along x")
        left.plot(["3a", "3b"], ["3a", "3b"], label="no numbers")
        right.bar(["a", "b"], [2, 3.14159], label="cost")
        right.errorbar([1, 2], [5, 6], [1, 1], label="with errors")
        empty.set_title("Others")
        empty.text(0, 0, "3 of 3")
    told = "Loss, nats by step: main loss from 0.5 to 1.25e+03; along x from 3 to 4. "
    told += "with errors from 5 to 6; cost 2, 3.14. Others: 3 of 3"
    assert figures.data_summary(figure) == told
    short = figures.data_summary(figure, longest=80)
    assert 70 < len(short) <= 80
    assert told.startswith(short.removesuffix(" …"))
    assert short.endswith(" …")
    assert figures.data_summary(Figure()) == ""
