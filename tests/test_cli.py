"""The command line: tables, files and exit statuses."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

import gnetlab
from gnetlab import cli
from gnetlab.cli import _Progress, app
from gnetlab.measure import bundled
from gnetlab.report import plan, runner

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_costs_prints_totals(run):
    result = run("costs", "vgg16", "googlenet:paper", "--by", "total")
    assert result.exit_code == 0, result.output
    assert re.search(r"vgg16 +138,357,544 +15,470,264,320", result.output)
    assert re.search(r"googlenet:paper +6,998,552 +1,582,671,872", result.output)


@pytest.mark.parametrize(("by", "rows"), [("stage", 11), ("branch", 47), ("kind", 9)])
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
    result = run("costs", "maxvit_t", "--by", "total")
    assert result.exit_code == 0, result.output
    assert re.search(r"maxvit_t, not counted: 44 x einsum", result.output)


def test_costs_are_sorted_with_every_column(run, tmp_path):
    path = tmp_path / "costs.csv"
    result = run("costs", "vgg16", "--by", "kind", "--sort", "weight_bytes", "--all",
                 "--csv", str(path))  # fmt: skip
    assert result.exit_code == 0, result.output
    frame = pd.read_csv(path)
    assert frame.kind.tolist()[:2] == ["Linear", "Conv2d"]
    assert {"comparisons", "live_bytes", "depth", "intensity"} <= set(frame)
    assert frame.live_bytes.max() == 26_292_224


def test_costs_compares_models(run, tmp_path):
    path = tmp_path / "costs.tex"
    result = run("costs", "vgg16", "googlenet", "--compare", "--latex", str(path))
    assert result.exit_code == 0, result.output
    assert re.search(r"macs +15,470,264,320 +1,498,376,192 +10\.32\n", result.output)
    assert re.search(r"outputs .* 4\.20\n", result.output)
    assert "vgg16 / googlenet" in path.read_text()


def test_costs_of_training(run):
    result = run("costs", "googlenet:paper", "--training", "--by", "total")
    assert result.exit_code == 0, result.output
    assert re.search(r"13,378,280 +1,591,044,096 .* 3,064,074,240 ", result.output)


def test_costs_as_other_tools_print_them(run):
    result = run("costs", "googlenet", "--tools")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"FlopCounterMode +multiplications and additions +2,996,752,384", result.output
    )


def test_costs_of_a_models_own_function(run, tmp_path, monkeypatch):
    (tmp_path / "mine_own.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 2, 1))\n"
        "def wrong(): return 7\n"
    )
    monkeypatch.chdir(tmp_path)
    result = run("costs", "mine_own:make", "--input", "5", "--by", "layer")
    assert result.exit_code == 0, result.output
    assert re.search(r"mine_own:make +0 .* 150 ", result.output)
    result = run("costs", "mine_own:wrong")
    assert result.exit_code == 2
    assert "returned int" in result.output + result.stderr


def test_costs_of_a_model_that_cannot_be_made_on_meta(run):
    result = run("costs", "regnet_y_400mf", "--by", "total")
    assert re.search(r"regnet_y_400mf +4,344,144 +401,842,848", result.output), result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["costs", "vgg61"], "did you mean vgg19|did you mean vgg16"),
        (["costs", "googlenet:papper"], "Did you mean 'paper'"),
        (["costs", "vgg16", "--by", "colour"], "choose one of total"),
        (["costs", "vgg16", "--sort", "mass"], "choose one of model, stage"),
        (["costs", "no_such_module:make"], "no module 'no_such_module'"),
        (["costs", "math:make"], "has no attribute 'make'"),
        (["costs", "googlenet:paper", "--input", "8"], "smallest"),
        (["train", "bundle"], "one recipe: gnetlab train bundled"),
        (["report", "--profile", "slow"], "choose fast or full"),
        (["report", "-p", "seed"], "NAME=VALUE"),
        (["report", "-p", "sead=1"], "Did you mean seed"),
        (["report", "-p", "profile=ful"], "choose fast or full"),
        (["report", "-p", "device=gpu"], "choose auto, cpu, cuda"),
        (["report", "-p", "seed=5", "-p", "seed=6", "--grid"], "-p seed=VALUE,VALUE"),
        (["report", "99"], "no such notebook"),
        (["report", "--device", "gpu"], "choose auto, cpu, cuda"),
        (["costs", "vgg16", "--input", "1"], "try another --input"),
        (["costs", "vgg16", "--input", "0"], "greater than|x>=1"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_to_try(arguments, message, run, tmp_path):
    if arguments[0] == "report":
        arguments = [*arguments, "--output", str(tmp_path / "out")]
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output + result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_failed_notebook_is_named_with_its_whole_error(run, monkeypatch, tmp_path):
    def failing(jobs, _output, **_options):
        jobs[0].status, jobs[0].error = "failed", "ValueError: it does not fit:\n[bold]missing[/] 3"
        return {"notebooks": []}

    monkeypatch.setattr(runner, "run", failing)
    result = run("report", "04", "--output", str(tmp_path))
    assert "04_sparse_vs_dense failed: ValueError: it does not fit:" in result.output
    assert "[bold]missing[/] 3" in result.output


def test_times_that_were_measured_on_a_busy_machine_are_named(run, monkeypatch, tmp_path):
    entries = [
        {"name": name, "other_load": 0.514, "figures": [{"timing": name == "04[x]"}]}
        for name in ("03", "04[x]")
    ]
    monkeypatch.setattr(runner, "run", lambda *_, **__: {"notebooks": entries})
    result = run("report", "04", "--output", str(tmp_path))
    assert "04[x]: other processes took 51% of the cores, so do not rely on" in result.output
    assert "03:" not in result.output


def test_info_says_what_is_here(run):
    result = run("info")
    assert result.exit_code == 0, result.output
    for word in ("torch", "device", "weights imagenet", "16 photographs"):
        assert word in result.output


def test_train_writes_weights_and_says_how_good_they_are(run, tmp_path, monkeypatch):
    phases = [phase | {"size": 32} for phase in bundled.RECIPE["phases"][:1]]
    monkeypatch.setattr(bundled, "RECIPE", bundled.RECIPE | {"batch_size": 4, "phases": phases})
    monkeypatch.setattr(bundled, "held_out_accuracy", lambda _: {"64": 0.125})
    path = tmp_path / "w.safetensors"
    result = run("train", "bundled", "--output", str(path), "--steps", "1", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert path.is_file()
    assert "held-out crops of 64 px: 12.5%" in result.output


def test_version(run):
    assert run("--version").output == f"gnetlab {gnetlab.__version__}\n"


COMMANDS = ["report", "compare", "figures", "costs", "train", "info"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_fits_80_columns_and_leaves_its_lines_whole(command, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run(*command, "--help").output
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^  Examples?:\n    gnetlab ", text, re.MULTILINE)
    for name in COMMANDS if not command else []:  # each summary is whole
        assert re.search(rf"^  {name} +[A-Z].+\.$", text, re.MULTILINE)


def examples() -> list[str]:
    """The commands in the docstrings of which --help is made; --help itself shows them whole."""
    commands = [info.callback for info in app.registered_commands]
    texts = [command.__doc__ for command in (app.registered_callback.callback, *commands)]
    return [line for text in texts for line in re.findall(r"^ +(gnetlab .+)$", text, re.MULTILINE)]


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A folder with what the examples of --help ask for; what takes minutes is not done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_models.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 2, 1))\n"
    )
    Path("figures").symlink_to(ROOT / "figures")
    Path("reports").mkdir()
    Path("reports/fast").symlink_to(ROOT / "figures")

    def write(output, **_options):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).touch()
        return {"sha256": "0", "held_out_accuracy": {}}

    def done(jobs, *_, **_options):
        for job in jobs:
            job.status = "done"
        return {"notebooks": []}

    monkeypatch.setattr(bundled, "train_bundled", write)
    monkeypatch.setattr(runner, "run", done)
    monkeypatch.setattr(cli, "_place", lambda *_: contextlib.nullcontext())
    return tmp_path


@pytest.mark.parametrize("line", examples())
def test_the_examples_of_help_work(line, run, place, monkeypatch):
    monkeypatch.setattr(cli, "_check_device", lambda _: None)  # as where there is a GPU
    result = run(*shlex.split(line, comments=True)[1:])
    assert result.exit_code == 0, result.output + result.stderr
    written = re.search(r"--(?:csv|output) (\S+)", line)
    assert not written or "gnetlab report" in line or (place / written[1]).exists()


def test_every_command_has_an_example_that_was_run():
    assert {line.split()[1] for line in examples()} == set(COMMANDS)


class TestProgress:
    def job(self, **changes):
        return plan.Job("long[bold]", Path("long[bold].ipynb"), "", {}, 9, **changes)

    def test_a_line_per_change_where_there_is_no_terminal(self, capsys):
        job = self.job(expected=41.2, reason="parameters changed: seed 0 → 1")
        progress = _Progress([job])
        with progress:
            for status, cell in [("running", 0), ("running", 1), ("running", 5), ("done", 9)]:
                job.status, job.cell = status, cell
                job.seconds = 7.6 * (status == "done")
                progress(job)
        assert capsys.readouterr().out.splitlines() == [
            "long[bold]: running, 9 cells, about 41 s the last time "
            "(parameters changed: seed 0 → 1)",
            "long[bold]: done in 8 s",
        ]

    def test_a_line_per_notebook_that_is_alive_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "120")
        running = self.job(status="running", cell=4, seconds=12.3, expected=41.2, reason="forced")
        progress = _Progress([running, self.job()])
        assert progress._is_live
        Console(width=120).print(progress._table())
        lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
        assert re.split(r"\s{2,}", lines[0].strip()) == [
            "notebook", "state", "cell", "seconds", "last time", "why",
        ]  # fmt: skip
        assert lines[1].split() == ["long[bold]", "running", "4/9", "12", "41", "forced"]
        assert lines[2].split() == ["long[bold]", "queued", "0/9", "0"]
        progress(running)
        assert capsys.readouterr().out == ""  # no lines between the drawings
        running.cell = 5  # it is read anew at every refresh
        Console(width=120).print(progress._live.get_renderable())
        assert "5/9" in capsys.readouterr().out


def test_a_grid_is_given_with_commas(run, monkeypatch, tmp_path):
    seen = []

    def planned(_paths, parameters, _common):
        seen.append(parameters)
        raise plan.ReportError("enough")

    monkeypatch.setattr(plan, "plan", planned)
    given = ["-p", "seed=0,1", "-p", "stages=[3a,4e],[5b]", "-p", "image=a,b"]
    run("report", "04", *given, "--grid", "--output", str(tmp_path))
    run("report", "04", *given, "--output", str(tmp_path))
    assert seen == [
        {"seed": ["0", "1"], "stages": ["[3a,4e]", "[5b]"], "image": ["a", "b"]},
        {"seed": "0,1", "stages": "[3a,4e],[5b]", "image": "a,b"},
    ]


def test_a_device_that_does_not_work_is_said_before_anything_runs(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as on a machine without
    monkeypatch.chdir(tmp_path)
    result = run("report", "04", "--device", "cuda")
    assert result.exit_code == 2
    assert "device='cuda' asked, but PyTorch cannot use such a device" in result.output
    assert not list(tmp_path.iterdir())


def test_a_console_that_lacks_a_character_does_not_end_a_command():
    code = "from gnetlab import cli; cli.app = lambda: print('seed 0 \u2192 1'); cli.main()"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert said.stdout.strip() == b"seed 0 ? 1", said.stderr
