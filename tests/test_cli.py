"""The command line: tables, files and exit statuses."""

import re

import pandas as pd
import pytest
from typer.testing import CliRunner

from gnetlab.cli import app


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_costs_prints_totals(run):
    result = run("costs", "vgg16", "googlenet:paper", "--by", "total")
    assert result.exit_code == 0, result.output
    assert re.search(r"vgg16 +138,357,544 +15,470,264,320", result.output)
    assert re.search(r"googlenet:paper +6,998,552 +1,582,671,872", result.output)


@pytest.mark.parametrize(("by", "rows"), [("stage", 11), ("branch", 40), ("kind", 8)])
def test_costs_writes_the_same_sums_at_every_level(by, rows, run, tmp_path):
    path = tmp_path / "new" / "costs.csv"
    result = run("costs", "googlenet:paper", "--by", by, "--csv", str(path))
    assert result.exit_code == 0, result.output
    frame = pd.read_csv(path)
    assert len(frame) == rows
    assert frame.macs.sum() == 1_582_671_872


def test_costs_at_another_size(run):
    result = run("costs", "googlenet:cifar", "--input", "32", "--by", "total")
    assert "1,521,756,160" in result.output


def test_costs_names_what_it_cannot_count(run):
    result = run("costs", "vit_b_16", "--by", "total")
    assert result.exit_code == 0, result.output
    assert re.search(r"not counted: 12 x MultiheadAttention", result.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["costs", "vgg61"], "did you mean vgg19|did you mean vgg16"),
        (["costs", "googlenet:papper"], "Did you mean 'paper'"),
        (["costs", "vgg16", "--by", "colour"], "choose one of total"),
        (["costs", "googlenet:paper", "--input", "8"], "smallest"),
        (["report", "--profile", "slow"], "choose fast or full"),
        (["report", "-p", "seed"], "NAME=VALUE"),
        (["report", "-p", "sead=1"], "Did you mean seed"),
        (["report", "99"], "no such notebook"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_to_try(arguments, message, run, tmp_path):
    if arguments[0] == "report":
        arguments = [*arguments, "--output", str(tmp_path / "out")]
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output + result.stderr)
    assert not (tmp_path / "out").exists()


def test_info_says_what_is_here(run):
    result = run("info")
    assert result.exit_code == 0, result.output
    for word in ("torch", "device", "weights imagenet", "16 photographs"):
        assert word in result.output


@pytest.mark.parametrize("command", ["report", "costs", "info"])
def test_help_shows_what_the_command_does(command, run):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert command == "info" or "Example: gnetlab" in result.output
