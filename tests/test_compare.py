"""Two reports side by side: what moved, by how much, and the exit status."""

import copy
import hashlib
import json
import math

import pytest
from typer.testing import CliRunner

from gnetlab.cli import app
from gnetlab.report import page, runner
from gnetlab.report.compare import compare, flatten, load, relative_change


def write(root, table="x,name\n1.0,a\n2.0,b\n,c\n"):
    """A report of one notebook with two figures in `root`."""
    figures = []
    (root / "01_compute_cost").mkdir(parents=True)
    for name in ("line", "clock"):
        content = {"png": f"drawn {name} {table}", "csv": table}
        files = {}
        for kind, text in content.items():
            (root / "01_compute_cost" / f"{name}.{kind}").write_text(text)
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            files[kind] = {"path": f"{name}.{kind}", "sha256": sha256}
        figures.append({"name": name, "timing": name == "clock", "files": files})
    claim = {
        "id": "vgg-cost", "verdict": "supported", "notebook": "01_compute_cost",
        "run": "01_compute_cost",
        "measured": {"time_ratio": 3.0, "nested": {"3a": 0.5, "nan": math.nan}, "rows": ["a"]},
    }  # fmt: skip
    notebook = {
        "name": "01_compute_cost", "status": "done", "parameters": {"seed": 0}, "facts": {},
        "inputs": {"model.py": "ab" * 32}, "folder": "01_compute_cost", "figures": figures,
    }  # fmt: skip
    manifest = {
        "packages": {"torch": "2.1"}, "git": {"commit": "one"}, "python": "3.12",
        "system": {"cpu": "slow", "gpus": []}, "notebooks": [notebook], "claims": [claim],
    }  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(manifest))
    return manifest


@pytest.fixture
def a(tmp_path):
    return write(tmp_path / "a")


def moved(found):
    return [(c.kind, c.name.removeprefix("01_compute_cost "), c.old, c.new) for c in found.moved]


def test_a_report_does_not_differ_from_itself(a, tmp_path):
    b = copy.deepcopy(a)
    b["notebooks"][0]["status"] = "cached"  # kept: the same result
    found = compare(a, b, (tmp_path / "a",) * 2)
    assert found.moved == found.context == []
    assert not found.differs()


def test_verdicts_numbers_and_statuses(a):
    b = copy.deepcopy(a)
    b["claims"][0]["verdict"] = "depends"
    b["claims"][0]["measured"] = {"time_ratio": 3.3, "nested": {"3a": 0.25, "nan": math.nan},
                                  "rows": ["b"], "new": 1}  # fmt: skip
    b["notebooks"][0]["status"] = "failed"
    found = compare(a, b)
    assert moved(found) == [
        ("verdict", "vgg-cost", "supported", "depends"),
        ("number", "vgg-cost time_ratio", "3", "3.3"),
        ("number", "vgg-cost nested.3a", "0.5", "0.25"),
        ("number", "vgg-cost rows.0", "a", "b"),
        ("number", "vgg-cost new", "-", "1"),
        ("notebook", "01_compute_cost", "done", "failed"),
    ]
    assert [c.relative for c in found.moved[1:4]] == [pytest.approx(0.1), -0.5, None]
    assert [c.timing for c in found.moved[1:3]] == [True, False]


def test_tolerance_is_relative_and_meets_its_bound(a):
    b = copy.deepcopy(a)
    b["claims"][0]["measured"]["nested"]["3a"] = 0.375
    assert compare(a, b, tolerance=0.25).moved == []
    assert len(compare(a, b, tolerance=0.24).moved) == 1


def test_runs_of_a_grid_are_told_apart(a):
    a["claims"] *= 2
    a["claims"][1] = a["claims"][0] | {"run": "01_compute_cost@seed=1"}
    b = copy.deepcopy(a)
    b["claims"][1]["verdict"] = "depends"
    assert moved(compare(a, b)) == [
        ("verdict", "01_compute_cost@seed=1 vgg-cost".removeprefix("01_compute_cost "),
         "supported", "depends"),
    ]  # fmt: skip
    del b["claims"][1]
    assert ("verdict", "supported", "-") in [(k, o, n) for k, _, o, n in moved(compare(a, b))]


def test_what_was_made_differently_is_told_but_nothing_moved(a):
    b = copy.deepcopy(a)
    b["packages"] = {"torch": "2.2", "new": "1"}
    b["git"] = None
    b["system"]["gpus"] = [{"name": "big"}]
    b["notebooks"][0]["parameters"]["seed"] = 1
    b["notebooks"][0]["inputs"]["model.py"] = "cd" * 32
    found = compare(a, b)
    assert {(c.kind.split()[-1], c.name, c.old, c.new) for c in found.context} == {
        ("packages", "torch", "2.1", "2.2"), ("packages", "new", "-", "1"),
        ("git", "commit", "one", "-"), ("system", "gpus.0.name", "-", "big"),
        ("parameters", "seed", "0", "1"), ("inputs", "model.py", "ab" * 6, "cd" * 6),
    }  # fmt: skip
    assert not found.differs()


@pytest.mark.parametrize("published", [False, True])
def test_tables_of_figures(a, published, tmp_path):
    b = write(tmp_path / "b", "x,name\n1.0,a\n2.5,b\n,d\n")
    if published:  # all figures in one folder
        for file in (tmp_path / "b" / "01_compute_cost").iterdir():
            file.rename(tmp_path / "b" / file.name)
    found = compare(a, b, (tmp_path / "a", tmp_path / "b"))
    assert moved(found)[:3] == [
        ("figure", "line", "png, csv", "png, csv"),
        ("column", "line x (1 of 3 rows)", "2", "2.5"),
        ("column", "line name (1 of 3 rows)", "c", "d"),
    ]
    assert found.moved[1].relative == 0.25
    assert [c.timing for c in found.moved] == [False] * 3 + [True] * 3
    without = compare(a, b, (tmp_path / "a", tmp_path / "b"), ignore_timing=True)
    assert without.moved == found.moved[:3]


def test_names_of_records_are_no_result(tmp_path):
    """A study's column `run` changes with its code, and no picture shows it."""
    before, after = (write(tmp_path / run, f"x,run\n1.0,{run}\n") for run in ("0e1f", "2a3b"))
    folders = tmp_path / "0e1f", tmp_path / "2a3b"
    assert len(compare(before, after, folders).moved) == 2  # drawn otherwise
    for figure, same in zip(after["notebooks"][0]["figures"], before["notebooks"][0]["figures"],
                            strict=True):  # fmt: skip
        figure["files"]["png"]["sha256"] = same["files"]["png"]["sha256"]
    assert compare(before, after, folders).moved == []
    assert len(compare(before, after).moved) == 2  # without the tables nobody can tell


def test_a_table_within_the_tolerance_is_the_same_however_drawn(a, tmp_path):
    b = write(tmp_path / "b", "x,name\n1.0,a\n2.1,b\n,c\n")
    folders = (tmp_path / "a", tmp_path / "b")
    assert compare(a, b, folders, tolerance=0.1).moved == []
    assert {c.kind for c in compare(a, b, folders, tolerance=0.01).moved} == {"figure", "column"}
    assert {c.kind for c in compare(a, b, tolerance=0.1).moved} == {"figure"}  # no tables to ask


def test_figures_rows_and_columns_in_one_alone(a, tmp_path):
    b = write(tmp_path / "b", "x,other\n1.0,a\n")
    found = moved(compare(a, b, (tmp_path / "a", tmp_path / "b"), ignore_timing=True))
    assert ("column", "line (all)", "3 rows", "1 rows") in found
    c = write(tmp_path / "c", "x,other\n1.0,a\n2.0,b\n,c\n")
    found = moved(compare(a, c, (tmp_path / "a", tmp_path / "c"), ignore_timing=True))
    assert ("column", "line name", "there", "-") in found
    assert ("column", "line other", "-", "there") in found
    del c["notebooks"][0]["figures"][0]
    assert moved(compare(a, c))[0] == ("figure", "line", "there", "-")


def test_relative_change():
    assert relative_change(2, 3) == 0.5
    assert relative_change(-2, -3) == -0.5
    assert relative_change(0, 0.0) == relative_change(math.nan, math.nan) == 0
    assert relative_change(math.inf, math.inf) == 0
    assert relative_change(0, -1) == -math.inf
    assert math.isnan(relative_change(1, math.nan))
    assert relative_change(True, 1) is None
    assert relative_change(1, "1") is None
    assert dict(flatten({"p": {"3a": 1}, "l": [2, 3]})) == {"p.3a": 1, "l.0": 2, "l.1": 3}


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_exit_statuses(a, run, tmp_path):
    a_folder, b_folder = tmp_path / "a", tmp_path / "b"
    assert run(a_folder, a_folder / "manifest.json").exit_code == 0
    b = write(b_folder)
    b["claims"][0]["measured"]["time_ratio"] = 3.03
    b["claims"][0]["measured"]["[red]odd"] = 1
    a["claims"][0]["measured"]["[red]odd"] = 1 + 1e-6
    for manifest, folder in ((a, a_folder), (b, b_folder)):
        (folder / "manifest.json").write_text(json.dumps(manifest))
    result = run(a_folder, b_folder)
    assert result.exit_code == 1
    assert "[red]odd" in result.output
    assert "+1.000% (timing)" in result.output
    assert run(a_folder, b_folder, "--tolerance", "0.02").exit_code == 0
    result = run(a_folder, b_folder, "--tolerance", "0.0001", "--ignore-timing")
    assert result.exit_code == 0
    assert "time_ratio" in result.output  # told, though not counted
    assert "Moved: nothing, beside 1 of measured times" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no report there"),
        ("<<<", "cannot be read as JSON"),
        ("[]", "is no report's manifest"),
        ('{"notebooks": 1, "claims": []}', "is no report's manifest"),
    ],
)
def test_what_is_no_report_is_wrong_usage(content, message, a, run, tmp_path):  # noqa: ARG001
    (tmp_path / "[b]").mkdir()
    if content is not None:
        (tmp_path / "[b]" / "manifest.json").write_text(content)
    result = run(tmp_path / "a", tmp_path / "[b]")
    assert result.exit_code == 2, result.output
    assert message in result.output + result.stderr
    assert "[b]" in result.output + result.stderr
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "[b]")


def test_a_pdf_that_cannot_be_made_leaves_the_report_a_success(monkeypatch, tmp_path):
    def failing(_index):
        raise page.PrintError("no browser to print with")

    def done(jobs, _output, **_options):
        jobs[0].status = "done"
        return {"notebooks": []}

    monkeypatch.setattr(runner, "run", done)
    monkeypatch.setattr(page, "print_pdf", failing)
    command = ["report", "04", "--output", str(tmp_path), "--pdf"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "not printed to PDF: no browser" in result.stderr
    monkeypatch.setattr(page, "print_pdf", lambda index: index.with_name("report.pdf"))
    assert f"PDF: {tmp_path / 'report.pdf'}" in CliRunner().invoke(app, command).output


def test_nan_is_the_same_in_an_older_report_as_in_one_of_now(a, tmp_path):
    for name, value in (("old", math.nan), ("new", "NaN")):
        (tmp_path / name).mkdir()
        a["claims"][0]["measured"]["time_ratio"] = value
        (tmp_path / name / "manifest.json").write_text(json.dumps(a))
    (old, _), (new, _) = (load(tmp_path / name) for name in ("old", "new"))
    assert moved(compare(old, new)) == []
