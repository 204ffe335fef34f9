"""Figures drawn again from what was kept: the same bytes, other widths, and nothing foreign run."""

import inspect
import json
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
import test_draw
import test_draw_gradients
import test_units
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from test_draw_gradients import misplaced
from typer.testing import CliRunner

from gnetlab.cli import app
from gnetlab.draw import calls, figures, gradients, redraw, style, units

MODULES = {figures: test_draw.CASES, units: test_units.CASES, gradients: test_draw_gradients.CASES}
CASES = {
    name: (getattr(module, f"{name.removesuffix('_one').removesuffix('_wide')}_figure"), given)
    for module, cases in MODULES.items()
    for name, given in cases.items()
    if name not in ("gradient_two", "gradient_four")  # what gradient has, fewer times
}
SMALLEST = {function: name for name, (function, _) in CASES.items()}
NOTE = "weights of nobody; made in a test, on a machine with a name that is long, for a long footer"


def figure_of(name, width=None):
    function, given = CASES[name]
    with style.width(width):
        return function(*given(), note=NOTE)


def content(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("call.json"))


def rewrite(path, **changes):
    text = json.dumps(content(path) | changes)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("call.json", text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report with two figures, of which one is a matter of time."""
    folder = tmp_path_factory.mktemp("made")
    for name, timing in (("latency", True), ("counts", False)):
        figures.save(figure_of(name), name, pd.DataFrame(), directory=folder / "01", timing=timing)
    return folder


@pytest.fixture
def report(made, tmp_path):
    return shutil.copytree(made, tmp_path / "report")


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["figures", *map(str, arguments)])


def test_every_figure_function_has_a_case():
    functions = {
        function for module in MODULES for name, function in inspect.getmembers(module)
        if name.endswith("_figure") and inspect.isfunction(function) and name != "_figure"
    }  # fmt: skip
    assert functions == set(SMALLEST)
    assert all(function.is_figure_function for function in functions)


@pytest.mark.parametrize("name", SMALLEST.values())
def test_every_figure_is_kept_whole_and_drawn_again_alike(name, tmp_path, monkeypatch):
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda *_: None)  # it takes most time
    monkeypatch.setitem(style._SETTINGS, "savefig.dpi", 40)
    figure, path = figure_of(name), tmp_path / f"{name}.call.zip"
    calls.store(figure.call, path)
    calls.store(calls.load(path), tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == path.read_bytes()
    first = figures.write(figure, name, tmp_path, kinds=["png"])["png"]
    (again,) = redraw.redraw(path, tmp_path / "again", kinds=["png"])
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("name", ["maps", "early", "visualized", "escape_one"])
def test_a_figure_drawn_again_has_the_same_bytes_in_every_format(name, tmp_path):
    saved = figures.save(figure_of(name), name, pd.DataFrame(), directory=tmp_path)
    again = redraw.redraw(saved.paths["call.zip"], tmp_path / "again")
    assert [path.name for path in again] == [f"{name}.{kind}" for kind in ("png", "svg", "pdf")]
    for path in again:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("_one")])
def test_in_one_column_nothing_overlaps_or_is_cut(name):
    figure = figure_of(name, "column")
    assert figure.get_figwidth() == 3.5
    assert misplaced(figure) == ([], [])
    assert figure.get_supxlabel().count("\n") == 1


@pytest.mark.parametrize("name", ["early", "escape", "counts"])
def test_on_a_page_as_well(name):
    figure = figure_of(name, "page")
    assert figure.get_figwidth() == 7.2
    assert misplaced(figure) == ([], [])


def test_the_width_is_asked_for_inside_only():
    with style.width("page"):
        assert style.asked() == "page"
    assert style.asked() is None
    assert figure_of("early").get_figwidth() == 3.5


def test_the_same_call_gives_the_same_bytes(tmp_path):
    for name in "ab":
        calls.store(figure_of("selectivity").call, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arguments_come_back_exactly(tmp_path):
    frame = pd.DataFrame({
        "int": np.int32([1, 2, 3]), "float": [np.nan, -np.inf, 0.1 + 0.2], "none": [None, 1, "x"],
        "single": np.float32([0.1, 1e-45, np.inf]), "str": ["a", None, "é"], "bool": [True] * 3,
        "kind": pd.Categorical(["b", "a", "b"], ["b", "a"], ordered=True),
        "Int64": pd.array([1, None, 2**62 + 1], dtype="Int64"),
        "Float64": pd.array([0.1, None, 2], dtype="Float64"),
        "boolean": pd.array([True, None, False], dtype="boolean"),
        "string": pd.array(["a", None, ""], dtype="string"),
        "NA": pd.array([pd.NA, np.float64(1), np.nan], dtype=object),
        "when": pd.to_datetime(["2020-02-29", None, "1970-01-01"]),
    })  # fmt: skip
    frame.index = pd.MultiIndex.from_tuples([("x", 1), ("x", 2), ("y", 1)], names=["a", None])
    twice = pd.DataFrame([[1, 2]], columns=["same", "same"], index=[0.5])
    series = pd.Series([1.5, 2], index=pd.CategoricalIndex(["u", "v"], name="i"), name=("s", 1))
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    plain = [None, True, 1, 1.5, "text", (1, [2, (3,)]), {"a": {1: np.nan}, ("b", 2): -0.0}]
    scalars = (np.float32(0.1), np.int64(2**60), np.bool_(True), np.str_("n"))
    path = tmp_path / "x.call.zip"
    call = calls.Call(
        figures.cost_figure, (frame, twice, series, image), {"p": plain, "s": scalars}
    )
    calls.store(call, path)
    back = calls.load(path)
    assert back.function is figures.cost_figure
    assert not back.timing
    for one, other in zip(call.arguments[:2], back.arguments[:2], strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True, check_index_type="exact")
    assert [type(v) for v in back.arguments[0]["none"]] == [type(None), int, str]
    missing = back.arguments[0]["NA"].tolist()
    assert missing[0] is pd.NA
    assert isinstance(missing[2], float)
    pd.testing.assert_series_equal(back.arguments[2], series, check_exact=True)
    assert back.arguments[3].dtype == np.uint8
    np.testing.assert_array_equal(back.arguments[3], image)
    assert repr(back.options) == repr(call.options)
    assert list(map(type, back.options["s"])) == list(map(type, scalars))


def test_what_cannot_be_kept_is_refused(tmp_path):
    figure = figure_of("counts")
    figure.call = figure.call._replace(options={"note": {1, 2}})
    with pytest.raises(TypeError, match="holds a set, which cannot be kept"):
        figures.save(figure, "a", pd.DataFrame(), directory=tmp_path)


def test_a_figure_keeps_what_it_was_given_not_what_became_of_it():
    (counts,) = test_units.CASES["counts"]()
    figure = units.counts_figure(counts)
    counts["units"] = 0
    assert figure.call.arguments[0].units.tolist() == [11, 4]


@pytest.mark.parametrize("function", [
    "os:system", "gnetlab.draw.figures:save", "gnetlab.draw.figures:Path", "gnetlab.cli:main",
    "gnetlab.draw.nothing:x_figure", "gnetlab.draw.figures:x_figure", "", "os.path:join",
])  # fmt: skip
def test_nothing_but_figure_functions_may_be_named(function, report, run):
    path = report / "01" / "counts.call.zip"
    rewrite(path, function=function, arguments=["touch hacked"], options=[])
    with pytest.raises(ValueError, match="no figure function of gnetlab"):
        calls.load(path)
    result = run("counts", "--report", report)
    assert result.exit_code == 2
    assert f"names {function!r}" in result.stderr
    assert not (report.parent / "figures-own").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"format": 2}, "format 2, this gnetlab reads 1"), ({"arguments": [1]}, "cannot draw what"),
    ({"arguments": [{"array": 99}]}, "KeyError"), ({"arguments": [{"pickle": 1}]}, "unknown kind"),
    ({"arguments": [{}]}, "cannot be read"), ({"function": 5}, "cannot be read"),
    ({"options": [["nope", 1]]}, "'nope'"),
])  # fmt: skip
def test_a_broken_file_is_said_to_be_one(changes, message, report, run):
    rewrite(report / "01" / "counts.call.zip", **{"arguments": [], "options": []} | changes)
    result = run("counts", "--report", report)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "run `gnetlab report` again" in result.stderr


def test_timing_is_marked_and_stays_so(report, tmp_path):
    for name, expected in (("latency", "yes"), ("counts", None)):
        redraw.redraw(redraw.stored(report)[name], tmp_path, width="column", kinds=["png"])
        for png in (report / "01" / f"{name}.png", tmp_path / f"{name}.png"):
            assert Image.open(png).info.get("Timing") == expected


def test_figures_outside_gnetlab_are_saved_without_a_call(tmp_path):
    figure = figures.Figure()
    saved = figures.save(figure, "own", pd.DataFrame(), directory=tmp_path)
    assert set(saved.paths) == {"png", "svg", "pdf", "csv"}
    assert not (tmp_path / "own.call.zip").exists()


def test_the_command_draws_what_is_asked_and_prints_what_it_wrote(report, run, tmp_path):
    result = run("--report", report, "counts", "--style", "column", "--format", "png")
    assert result.exit_code == 0, result.output
    assert result.output.split() == ["figures-column/counts.png"]
    assert Image.open(tmp_path / "figures-column" / "counts.png").size[0] == 700
    result = run("--report", report, "--output", "out", "--format", "svg", "--format", "png")
    assert result.output.split() == [
        f"out/{name}.{kind}" for name in ("counts", "latency") for kind in ("png", "svg")
    ]
    assert (tmp_path / "out" / "latency.svg").read_bytes() == (
        report / "01" / "latency.svg"
    ).read_bytes()


def test_two_figures_of_one_name_are_not_taken_for_one(report, run, tmp_path):
    shutil.copytree(report / "01", report / "02")
    result = run("counts", "--report", report)
    assert result.exit_code == 2
    message = f"one in each of {report / '01'}, {report / '02'}; give one of these folders as"
    assert message in result.stderr
    assert not (tmp_path / "figures-own").exists()
    result = run("counts", "--report", report / "02", "--format", "png")
    assert result.output.split() == ["figures-own/counts.png"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["latncy"], "did you mean latency? There are counts, latency"),
    (["--style", "wide"], "--style wide asked; choose column or page"),
    (["--format", "gif"], "--format gif asked; choose from png, svg, pdf"),
    (["--report", "nowhere"], "nowhere is not there; run `gnetlab report` again"),
    (["--report", "."], "has no stored figures; run `gnetlab report` again"),
])  # fmt: skip
def test_wrong_usage_exits_with_2_and_says_what_to_try(arguments, message, report, run):
    result = run("--report", report, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
