"""Figures of gradient flow and auxiliary heads: what stands where, with what label."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text

from gnetlab.draw import gradients, style

SOURCES = ("main", "aux1", "aux2", "total")
OUTPUTS = ("conv1", "conv2", *style.STAGES[1:-1])
CUTS = ("conv1", "conv2_reduce", *OUTPUTS[1:], "fc")
HEADS = ("with heads", "without heads")


def frame_of(columns, *keys, **values):
    """A row for every combination of `keys`; `values` are functions of the frame so far."""
    return pd.DataFrame(itertools.product(*keys), columns=columns.split()).assign(**values)


def noise(frame, spread=0.2):
    return np.exp(np.random.default_rng(0).normal(0, spread, len(frame)))


def make_flow(norms, inits, seeds=(0, 1, 2), stages=(*style.STAGES, "aux1")):
    depth = {stage: i for i, stage in enumerate(stages)}
    frame = frame_of(
        "norm init stage source seed", norms, inits, stages, SOURCES, seeds,
        gradient_rms=lambda f: noise(f) * f.init.map(inits.index).add(0.2).rmul(-0.22).mul(
            12 - f.stage.map(depth)).rpow(10) * np.where(f.source.isin(["aux1", "aux2"]), 3, 1),
    )  # fmt: skip
    above = frame.source.map({"aux1": 3, "aux2": 6}).fillna(10) < frame.stage.map(depth)
    return frame[~above | (frame.stage == frame.source)]


def make_shares(names, seeds=(0, 1, 2)):
    return frame_of(
        "configuration seed", names, seeds,
        ratio=lambda f: 1 + 10 ** (f.configuration.map(names.index) / 3 - 1) * noise(f, 0.5),
        energy_share=lambda f: (1 - 1 / f.ratio**2).clip(0, 1),
    )  # fmt: skip


def make_cuts(inits, seeds=(0, 1, 2)):
    return frame_of(
        "init seed stage", inits, seeds, CUTS,
        weight_dot_gradient=lambda f: 0.03 * (1 + f.seed) * (1 + 0.05 * (noise(f) - 1)),
    )  # fmt: skip


def make_outputs(inits, seeds=(0, 1, 2)):
    steps = {stage: len(OUTPUTS) - 1 - i for i, stage in enumerate(OUTPUTS)}
    return frame_of(
        "init seed stage", inits, seeds, OUTPUTS,
        flow=lambda f: noise(f) * 10.0 ** (-0.4 * f.init.map(inits.index) * f.stage.map(steps)),
    )  # fmt: skip


def make_noise(seeds=(0, 1, 2)):
    frame = frame_of(
        "stage source layer seed", style.STAGES[:7], ("aux1", "aux2"), range(4), seeds,
        cosine_to_main=lambda f: (noise(f) - 1) / 2 + 0.1,
    )  # fmt: skip
    return frame[(frame.source == "aux2") | frame.stage.isin(style.STAGES[:4])]


def make_over_training(seeds=(0, 1, 2), steps=range(0, 1000, 25)):
    stages = {"conv1.conv": "stem", "inception3a.branch1x1.conv": "3a", "aux1.fc1": "aux1"}
    return frame_of(
        "module source step seed", tuple(stages), SOURCES[:3], steps, seeds,
        stage=lambda f: f.module.map(stages),
        cosine_to_main=lambda f: np.where(
            f.source == "main", 1, noise(f, 0.05) - 0.7 - f.module.str.len() / 50 - f.step / 2000
        ),
        projection_share=lambda f: f.source.map({"main": 0.7, "aux1": 0.4, "aux2": -0.1})
        + (noise(f) - 1) / 9,
    )  # fmt: skip


def make_metrics(settings, variants=HEADS, seeds=(0, 1, 2), steps=range(300)):
    return frame_of(
        "setting variant seed step", settings, variants, seeds, steps,
        loss=lambda f: 2.8 * np.exp(-f.step / (200 + 300 * f.variant.map(variants.index)))
        * noise(f) ** 0.3,
        accuracy=lambda f: 1 - f.loss / 3,
    )  # fmt: skip


def make_summary(settings, variants=HEADS, seeds=3, steps=1500):
    return frame_of(
        "setting variant", settings, variants, seeds=seeds,
        escaped=lambda f: np.arange(len(f)) % (seeds + 1),
        mean_steps=lambda f: steps * (1 - 0.8 * f.escaped / seeds),
        low=lambda f: (f.mean_steps - 200).where(f.escaped > 0, steps),
        high=lambda f: (f.mean_steps + 150).clip(upper=steps), steps=steps,
    )  # fmt: skip


def make_gaps(variants=HEADS, seeds=(0, 1, 2, 3, 4)):
    return frame_of(
        "variant seed", variants, seeds,
        train_accuracy=lambda f: 0.95 - 0.01 * f.seed - 0.03 * (f.variant == "with heads"),
        test_accuracy=lambda f: 0.7 + 0.02 * noise(f) + 0.02 * (f.variant == "with heads"),
    )  # fmt: skip


def make_depth(modules=(9, 11, 13, 17), seeds=(0, 1, 2)):
    return frame_of(
        "modules seed source", modules, seeds, ("main", "total"),
        conv1_rms=lambda f: noise(f) * np.where(
            f.source == "total", 1e-4, 10.0 ** (-f.modules / 2)
        ),
        first_to_last=lambda f: 1.5 * noise(f), propagation=lambda f: noise(f) * 10.0 ** -f.modules,
    )  # fmt: skip


NORMS = ("no norm", "batch norm", "local response norm")
INITS = ("PyTorch default", "gain 0.6", "gain 1.0", "Xavier uniform", "orthogonal", "LSUV")
SETTINGS = ("no norm, gain 0.6", "no norm, gain 1.0", "batch norm, gain 0.6")
CASES = {
    "gradient": lambda: (make_flow(NORMS, INITS),),
    "gradient_four": lambda: (make_flow(NORMS[:2], INITS[:4]),),
    "gradient_one": lambda: (make_flow(NORMS[:1], INITS[:1], seeds=(0,)),),
    "gradient_two": lambda: (make_flow(NORMS[:2], INITS[:2]),),
    "shares": lambda: (make_shares([f"{n}, {i}" for n in NORMS for i in INITS]),),
    "shares_one": lambda: (make_shares(["no norm, gain 0.6"], seeds=(0,)),),
    "pitfall": lambda: (make_cuts(INITS[:5]), make_outputs(INITS[:5])),
    "pitfall_one": lambda: (make_cuts(INITS[:1], seeds=(0,)), make_outputs(INITS[:1], seeds=(0,))),
    "agreement": lambda: (make_noise(), make_over_training()),
    "agreement_one": lambda: (make_noise(seeds=(0,)), make_over_training((0,), steps=(0, 300))),
    "training": lambda: (make_metrics(SETTINGS, (*HEADS, "aux1 only")), 16),
    "training_wide": lambda: (
        make_metrics(("no norm, gain 0.6", "batch norm, PyTorch default"), steps=range(50)), 16,
    ),
    "training_one": lambda: (make_metrics(SETTINGS[:1], seeds=(0,)), 16),
    "escape": lambda: (make_summary(SETTINGS, (*HEADS, "aux1 only", "aux2 only")),),
    "escape_wide": lambda: (make_summary(SETTINGS, ("with heads, learning rate 0.05", "b")),),
    "escape_one": lambda: (make_summary(SETTINGS[:1]),),
    "gap": lambda: (make_gaps(),),
    "gap_one": lambda: (make_gaps(HEADS[:1], seeds=(0,)),),
    "depth": lambda: (make_depth(),),
    "depth_one": lambda: (make_depth((9,), seeds=(0,)),),
}  # fmt: skip


def figure_of(case, note=""):
    return getattr(gradients, f"{case.split('_')[0]}_figure")(*CASES[case](), note=note)


def drawn_texts(figure):
    """Text and box of whatever is visible; ticks of hidden axes or beyond their limits are not."""
    with style.context():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    unseen = [
        tick.label1
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks() + axis.get_minor_ticks()
        if not ax.axison
        or not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    texts = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible())
    return [
        (text, text.get_window_extent(canvas.get_renderer()))
        for text in texts
        if text.get_text().strip() and text not in unseen
    ]


def is_filled(ax):
    """Whether anything known stands in a panel; lines across it do not count."""
    lines = [line.get_ydata() for line in ax.lines if line.get_transform() == ax.transData]
    points = [c.get_offsets()[:, 1] for c in ax.collections if isinstance(c, PathCollection)]
    return any(np.isfinite(np.asarray(values, float)).any() for values in lines + points)


def misplaced(figure):
    """Texts that are not wholly inside the figure, and pairs of straight texts that overlap."""
    drawn, box = drawn_texts(figure), figure.bbox.padded(1)
    outside = [text.get_text() for text, e in drawn
               if not box.contains(e.x0, e.y0) or not box.contains(e.x1, e.y1)]  # fmt: skip
    straight = [(text.get_text(), e) for text, e in drawn if text.get_rotation() in (0, 90)]
    overlapping = [
        (one, two)
        for (one, a), (two, b) in itertools.combinations(straight, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5
    ]
    return outside, overlapping


def check(figure):
    assert misplaced(figure) == ([], [])
    assert all(map(is_filled, figure.axes))
    assert figure.get_figwidth() in style.WIDTHS.values()
    assert figure.get_supxlabel() == "3 seeds"


@pytest.mark.parametrize("case", CASES)
def test_figures_have_no_overlapping_or_clipped_text_and_no_empty_panel(case):
    check(figure_of(case, note="3 seeds"))


@pytest.mark.parametrize("case", [case for case in CASES if "_" not in case])
@pytest.mark.parametrize("kind", [np.nan, pd.NA])
def test_figures_survive_missing_values(case, kind, recwarn):
    def thin_out(frame):
        first = frame.iloc[:, 0] == frame.iloc[0, 0]
        lost = first | (np.random.default_rng(1).random(len(frame)) < 0.1)
        values = frame.select_dtypes("float").astype(object if kind is pd.NA else float)
        return frame.assign(**values.mask(lost, kind))

    given = [thin_out(a) if isinstance(a, pd.DataFrame) else a for a in CASES[case]()]
    check(getattr(gradients, f"{case}_figure")(*given, note="3 seeds"))
    assert [str(warning.message) for warning in recwarn] == []


def data_lines(ax):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in ax.lines}


def points(ax):
    """Centres of the markers drawn by scatter, in order."""
    return [
        tuple(place) for c in ax.collections if isinstance(c, PathCollection)
        for place in c.get_offsets().tolist()
    ]  # fmt: skip


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend(figure, which=0):
    return [text.get_text() for text in figure.legends[which].get_texts()]


def test_gradient_flow_is_a_geometric_mean_of_the_trunk():
    flow = frame_of(
        "stage source seed", ("stem", "3a", "head", "aux1"), ("main", "total"), (0, 1),
        gradient_rms=lambda f: 10.0 ** -(f.seed + f.stage.map({"3a": 1, "head": 2}).fillna(0)),
    )  # fmt: skip
    ax = gradients.plot_gradient_flow(flow)
    assert ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["stem", "3a", "head"]
    assert data_lines(ax)["main loss"][1] == pytest.approx(10**-1.5)  # of seeds 1e-1 and 1e-2


def test_gradient_figure_has_a_panel_for_what_was_measured():
    flow = make_flow(("none", "batch"), INITS[:5])
    flow = flow[~((flow.norm == "batch") & (flow.init == "gain 0.6"))]
    flow = flow[~((flow.init == "gain 1.0") & (flow.stage == "3a"))]
    figure = gradients.gradient_figure(flow)
    assert [ax.get_title("left") for ax in figure.axes] == [
        f"{norm},\n{init}" for norm in ("none", "batch") for init in INITS[:5]
        if (norm, init) != ("batch", "gain 0.6")
    ]  # fmt: skip
    assert legend(figure) == list(style.SOURCE_LABELS.values())
    figure.draw_without_rendering()
    shown = [t.get_text() for t in figure.axes[1].get_xticklabels() if t.get_visible()]
    assert shown == ["stem", "3b", "4b", "4d", "5a", "head"]  # the lowest of its column
    main = data_lines(figure.axes[2])["main loss"]
    assert np.isnan(main).tolist() == [False, True] + [False] * 9
    assert figure.axes[0].get_ylabel() == "gradient RMS\n(loss / weight)"
    four = gradients.gradient_figure(make_flow(NORMS[:1], INITS[:4])).axes[0]
    assert [t.get_text() for t in four.get_xticklabels()] == list(style.STAGES)


def test_shares_stand_at_their_configuration_with_their_means():
    shares = pd.DataFrame({
        "configuration": ["a", "b", "b"], "seed": [0, 0, 1], "ratio": [1.0, 100.0, 1e4],
        "energy_share": [0.0, 0.9, 1.0],
    })  # fmt: skip
    left, right = gradients.shares_figure(shares).axes
    assert (left.get_xscale(), right.get_xscale()) == ("log", "linear")
    assert points(left) == [(1, 0), (1, 0), (100, 1), (1e4, 1), (pytest.approx(1000), 1)]
    assert points(right) == [(0, 0), (0, 0), (90, 1), (100, 1), (pytest.approx(95), 1)]
    assert texts(left) == ["1x", "1,000x"]
    assert texts(right) == ["0%", "95%"]
    assert [t.get_text() for t in left.get_yticklabels()] == ["a", "b"]
    assert left.get_ylim() == right.get_ylim() == (1.5, -0.5)
    assert right.get_xlabel().startswith("percent")
    assert left.get_xlim()[1] > 5e4  # room for the numbers


def test_pitfall_shows_both_relative_to_the_last_layer():
    cuts = frame_of("init seed stage", ("a", "b"), (0, 1), ("conv1", "conv2_reduce", "fc"),
                    weight_dot_gradient=lambda f: (f.seed + 2) * np.tile([1.5, 1, 1], 4)
                    + (f.stage == "conv1") * f.seed)  # fmt: skip
    outputs = frame_of("init seed stage", ("a", "b"), (0, 1), ("conv1", "5b"),
                       flow=lambda f: np.where(f.stage == "5b", 5, 5 * 10.0 ** -(2 + 2 * f.seed))
                       )  # fmt: skip
    figure = gradients.pitfall_figure(cuts, outputs)
    left, right = figure.axes
    np.testing.assert_allclose(data_lines(left)["a"], [(1.5 + 5.5 / 3) / 2, 1, 1])
    np.testing.assert_allclose(data_lines(right)["b"], [1e-3, 1])  # geometric: 1e-2 and 1e-4
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "log")
    assert left.get_ylim()[0] == 0
    assert [t.get_text() for t in left.get_xticklabels()] == ["conv1", "conv2 reduce", "fc"]
    assert legend(figure) == ["a", "b"]
    colors = {line.get_label(): line.get_color() for line in right.lines}
    assert (colors["a"], colors["b"]) == style.SERIES[:2]
    assert len(right.lines) == 1 + 2 * 3  # the line at 1; two seeds and their mean


def test_agreement_shows_spread_layers_and_shares():
    noise = pd.DataFrame({
        "stage": ["3a"] * 11 + ["stem", "aux1"], "source": ["aux1"] * 11 + ["aux2", "aux1"],
        "cosine_to_main": [*np.arange(11) / 10, -0.5, 0.3], "seed": 0,
    })  # fmt: skip
    over = make_over_training(steps=range(0, 400, 25))
    figure = gradients.agreement_figure(noise, over)
    left, middle, right = figure.axes
    one, two = left.containers
    assert [t.get_text() for t in left.get_xticklabels()] == ["stem", "3a"]
    np.testing.assert_allclose(one.lines[0].get_xydata(), [[-0.14, np.nan], [0.86, 0.5]])
    np.testing.assert_allclose(two.lines[0].get_xydata(), [[0.14, -0.5], [1.14, np.nan]])
    assert one.lines[2][0].get_segments()[-1][:, 1] == pytest.approx([0.1, 0.9])
    assert one.lines[0].get_color() == style.SOURCE_COLORS["aux1"]
    trunk = over[over.stage != "aux1"]
    cosines = trunk.groupby(["source", "step"]).cosine_to_main.mean()
    assert [name for name in data_lines(middle) if name[0] != "_"] == [
        style.SOURCE_LABELS[s] for s in ("aux1", "aux2")
    ]
    shares = over[over.module == "conv1.conv"].groupby(["source", "step"]).projection_share.mean()
    assert [name for name in data_lines(right) if name[0] != "_"] == [
        style.SOURCE_LABELS[s] for s in SOURCES[:3]
    ]
    for source in ("aux1", "aux2"):
        found = data_lines(middle)[style.SOURCE_LABELS[source]]
        np.testing.assert_allclose(found, cosines[source])
    np.testing.assert_allclose(data_lines(right)[style.SOURCE_LABELS["main"]], 100 * shares["main"])
    assert {line.get_color() for line in right.lines[1:]} == {
        style.SOURCE_COLORS[source] for source in SOURCES[:3]
    }
    assert right.get_title("left") == "Shares at conv1"
    assert all(list(ax.lines[0].get_ydata()) == [0, 0] for ax in figure.axes)
    assert legend(figure) == [style.SOURCE_LABELS[source] for source in SOURCES[:3]]


def test_shares_of_another_layer_where_it_is_asked():
    over = make_over_training(steps=(0, 25))
    figure = gradients.agreement_figure(make_noise(), over, "inception3a.branch1x1.conv")
    assert figure.axes[2].get_title("left") == "Shares at inception3a"
    there = over[(over.module == "inception3a.branch1x1.conv") & (over.source == "main")]
    np.testing.assert_allclose(
        data_lines(figure.axes[2])[style.SOURCE_LABELS["main"]],
        100 * there.groupby("step").projection_share.mean(),
    )


def test_training_curves_show_seeds_and_their_mean():
    metrics = frame_of("variant seed step", HEADS, (0, 1), range(1, 41),
                       loss=lambda f: 2 / f.step + f.seed)  # fmt: skip
    ax = gradients.plot_training(metrics, "loss", smooth=1)
    assert data_lines(ax)["with heads"][9] == pytest.approx(2 / 10 + 0.5)
    assert len(ax.lines) == 2 * 3
    band = ax.collections[0].get_datalim(ax.transData)
    assert (band.y0, band.y1) == (pytest.approx(2 / 40), pytest.approx(3))
    alone = gradients.plot_training(metrics[metrics.seed == 0], "loss", smooth=3)
    assert data_lines(alone)["with heads"][1] == pytest.approx(1.5)
    assert len(alone.lines) == 2


def test_a_single_step_is_a_point():
    ax = gradients.plot_training(make_metrics(SETTINGS[:1], steps=(0,)))
    means = [line for line in ax.lines if not line.get_label().startswith("_")]
    assert [line.get_marker() for line in means] == ["o", "o"]


def test_the_seventh_variant_does_not_look_like_the_first():
    names = tuple(f"n{i}" for i in range(7))
    curves = gradients.plot_training(make_metrics(SETTINGS[:1], names, seeds=(0,), steps=(0, 1)))
    relative = gradients.plot_relative(make_outputs(names, seeds=(0,)), "flow", "5b", log=True)
    for ax in (curves, relative):
        lines = {line.get_label(): line for line in ax.lines}
        assert lines["n0"].get_color() == lines["n6"].get_color()
        assert (lines["n0"].get_linestyle(), lines["n6"].get_linestyle()) == ("-", "--")
    gaps = make_gaps(names).assign(test=1.0)
    first, *_, last = gradients.plot_pairs(gaps, "test").collections[::2]
    assert len(first.get_paths()[0].vertices) != len(last.get_paths()[0].vertices)


def test_training_figure_has_a_column_per_setting():
    figure = gradients.training_figure(make_metrics(SETTINGS), 16)
    above, below = np.reshape(figure.axes, (2, 3))
    assert [ax.get_title("left") for ax in above] == list(SETTINGS)
    assert len({ax.get_ylim() for ax in above}) == 1
    assert {ax.lines[-1].get_ydata()[0] for ax in above} == {np.log(16)}
    assert {ax.lines[-1].get_ydata()[0] for ax in below} == {1 / 16}
    assert [texts(ax) for ax in figure.axes] == [[], [], ["chance"]] * 2
    assert legend(figure) == list(HEADS)
    assert above[0].get_ylabel().endswith("(nats)")


def test_escapes_are_grouped_with_intervals_and_counts():
    summary = pd.DataFrame({
        "setting": ["a", "a", "b"], "variant": [*HEADS, HEADS[0]], "seeds": 3,
        "escaped": [3, 1, 3], "mean_steps": [200, 900, 100], "low": [100, 700, np.nan],
        "high": [300, 1000, np.nan], "steps": [1000, 1000, 400],
    })  # fmt: skip
    figure = gradients.escape_figure(summary)
    ax = figure.axes[0]
    labels = ax.get_yticklabels()
    assert [t.get_text() for t in labels] == ["a", *HEADS, "b", HEADS[0]]
    assert [t.get_fontweight() == "bold" for t in labels] == [True, False, False, True, False]
    assert points(ax) == [(200, 1), (900, 2), (100, pytest.approx(4.3))]
    assert ax.get_yticks().tolist() == pytest.approx([0, 1, 2, 3.3, 4.3])
    lines = [c.get_segments()[0].tolist() for c in ax.collections
             if not isinstance(c, PathCollection)]  # fmt: skip
    intervals = [line for line in lines if line[0][1] == line[1][1]]
    assert intervals == [[[100, 1], [300, 1]], [[700, 2], [1000, 2]]]
    never = [line for line in lines if line not in intervals]  # each run's own length
    assert [line[0][0] for line in never] == [1000, 1000, 400]
    assert [(a[1] + b[1]) / 2 for a, b in never] == pytest.approx([1, 2, 4.3])
    faces = [to_hex(c.get_facecolor()[0]) for c in ax.collections if isinstance(c, PathCollection)]
    assert faces == [style.SERIES[0].lower(), "#ffffff", style.SERIES[0].lower()]
    assert texts(ax) == ["never", "3 of 3", "1 of 3", "3 of 3", "escaped"]
    assert ax.get_xlim() == pytest.approx((0, 1040))
    assert "open" in ax.get_xlabel()
    assert "open" not in gradients.escape_figure(summary.iloc[[0]]).axes[0].get_xlabel()
    assert figure.get_figwidth() == style.WIDTHS["column"]
    assert figure_of("escape_wide").get_figwidth() == style.WIDTHS["page"]


def test_no_two_variants_share_one_of_several_colours():
    for count, colors in ((6, 6), (7, 1)):
        summary = make_summary(SETTINGS[:1], [f"variant {i}" for i in range(count)])
        markers = [c for c in gradients.plot_escape(summary).collections
                   if isinstance(c, PathCollection)]  # fmt: skip
        assert len({to_hex(c.get_edgecolor()[0]) for c in markers}) == colors


def test_gaps_join_equal_seeds():
    gaps = pd.DataFrame({
        "variant": np.repeat(HEADS, 2), "seed": [0, 1, 1, 0],
        "train_accuracy": [0.9, 0.8, 1.0, 0.7], "test_accuracy": [0.8, 0.6, 0.7, 0.6],
    })  # fmt: skip
    left, right = gradients.gap_figure(gaps).axes
    joined = [line.get_xydata().tolist() for line in left.lines]
    assert joined == [[[0, pytest.approx(90)], [1, pytest.approx(70)]], [[0, 80], [1, 100]],
                      [[2.5, 80], [3.5, 60]], [[2.5, 60], [3.5, 70]]]  # fmt: skip
    gap = [line.get_ydata().tolist() for line in right.lines[:2]]
    assert gap == [pytest.approx([10, 10]), pytest.approx([20, 30])]
    assert points(right)[2] == (0, pytest.approx(15))
    assert texts(right) == ["15.0", "20.0"]
    assert texts(left)[-2:] == ["training images", "test images"]
    assert [t.get_text() for t in right.get_xticklabels()] == ["with\nheads", "without\nheads"]
    assert right.get_ylabel().endswith("(percentage points)")


def test_depth_labels_its_lines_and_shares_the_scale_of_the_ratios():
    depth = make_depth()
    left, middle, right = gradients.depth_figure(depth).axes
    values = depth.set_index(["source", "modules"])[["conv1_rms", "first_to_last", "propagation"]]
    means = np.exp(np.log(values).groupby(["source", "modules"]).mean())
    thick = [line for line in left.lines if line.get_linewidth() > 1]
    for line, source in zip(thick, ("main", "total"), strict=True):
        assert line.get_color() == style.SOURCE_COLORS[source]
        np.testing.assert_allclose(line.get_ydata(), means.conv1_rms[source])
    for ax, value in ((middle, "first_to_last"), (right, "propagation")):
        np.testing.assert_allclose(ax.lines[-1].get_ydata(), means[value]["main"])
    ends = {text.get_text(): text.xy for text in left.texts}
    assert ends == {
        "main loss\nalone": (17, pytest.approx(means.conv1_rms["main", 17])),
        "with\nheads": (17, pytest.approx(means.conv1_rms["total", 17])),
    }
    assert {text.get_va() for text in left.texts} == {"center"}
    assert middle.get_ylim() == right.get_ylim() != left.get_ylim()
    assert {ax.get_yscale() for ax in (left, middle, right)} == {"log"}
    assert left.get_xticks().tolist() == [9, 11, 13, 17]


def test_labels_of_lines_that_end_together_stand_apart():
    near = make_depth().assign(conv1_rms=lambda f: np.where(f.modules == 9, 1, 1e-6) * noise(f))
    sides = [text.get_va() for text in gradients.depth_figure(near).axes[0].texts]
    assert sides == ["top", "bottom"]
    check(gradients.depth_figure(near, note="3 seeds"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("case", ["gradient_two", "shares", "pitfall", "training", "gap", "depth"])
def test_panels_of_diverged_networks_say_that_there_is_nothing(case, bad):
    given = [a.assign(**dict.fromkeys(a.select_dtypes("float"), bad))
             if isinstance(a, pd.DataFrame) else a for a in CASES[case]()]  # fmt: skip
    figure = getattr(gradients, f"{case.split('_')[0]}_figure")(*given)
    assert misplaced(figure) == ([], [])
    assert all("no finite values" in texts(ax) for ax in figure.axes)
    assert not any("no finite values" in texts(ax) for ax in figure_of(case).axes)
