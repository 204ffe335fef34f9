"""What the READMEs say is so: commands and code run, and results are those published."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from typer.testing import CliRunner

from gnetlab import cli
from gnetlab.measure import attribution, bundled, visualize
from gnetlab.report import cluster

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
README = (ROOT / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in FENCED if not language
    for line in block.splitlines() if line.startswith("gnetlab ")
] + re.findall(r"`(gnetlab \w+ [^`]*)`", README)  # fmt: skip


def python(containing: str) -> str:
    (block,) = (code for language, code in FENCED if language == "python" and containing in code)
    return block


def manifest_notebooks() -> list[dict]:
    return json.loads((ROOT / "figures" / "manifest.json").read_text())["notebooks"]


def claims_table() -> str:
    """The table of claims as README should have it, from the published manifest."""
    rows = ["| claim | verdict | measured |", "|---|---|---|"]
    for claim in json.loads((ROOT / "figures" / "manifest.json").read_text())["claims"]:
        clauses = claim["reason"].split("; ")
        while len(clauses) > 1 and len("; ".join(clauses)) > 200:
            del clauses[-1]
        reason = "; ".join(clauses)
        reason += "; ..." if reason != claim["reason"] else ""
        verdict = f"**{claim['verdict']}**"
        if claim["figure"]:
            verdict = f"[{verdict}](figures/{claim['figure']}.png)"
        rows.append(f"| {claim['text']} | {verdict} | {reason} |")
    return "\n".join(rows)


def devices_table() -> str:
    """The table of devices as README should have it, from the published times."""
    times = pd.read_csv(ROOT / "figures" / "latency.csv")
    (device,) = {n["facts"]["device"] for n in manifest_notebooks() if n["name"][:2] == "01"}
    rows = [f"| network, batch | {device} |", "|---|---|"]
    for row in times.itertuples():
        rows.append(f"| {row.model}, {row.batch_size} | {row.seconds * 1000:.0f} ms |")
    return "\n".join(rows)


def test_results_are_the_published_ones():
    for table in (claims_table(), devices_table()):
        assert table in README, f"README.md should have:\n{table}"


def test_what_readme_says_against_two_criteria_is_so():
    judged = json.loads((ROOT / "figures" / "manifest.json").read_text())["claims"]
    claims = {claim["id"]: claim for claim in judged}
    assert "Two criteria favour the paper" in README
    assert claims["sparse-slow"]["verdict"] == "depends"
    assert max(claims["sparse-slow"]["measured"]["ratios_99"].values()) < 1
    assert claims["correlated"]["verdict"] == "supported"
    assert claims["correlated"]["measured"]["rand_index"] < 0.1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the commands name; its notebooks have the real ones' parameters."""
    folder = tmp_path_factory.mktemp("readme")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, 4).cells
        first = next(c for c in cells if c.source.startswith("profile = "))
        stand_in(folder / "notebooks" / path.name, first.source, "1 + 1")
    stand_in(folder / "mine.ipynb", *mine())
    (folder / "my_models.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
    )
    for report in ("a", "b", "fast"):
        (folder / "reports" / report).mkdir(parents=True)
        for name in ("manifest.json", "escape.call.zip"):
            shutil.copy(ROOT / "figures" / name, folder / "reports" / report)
    shutil.copy(ROOT / "figures" / "escape.png", folder / "picture.png")
    return folder


def stand_in(path: Path, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python",
    }  # fmt: skip
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


def mine() -> tuple[str, str, str]:
    """The cells of README's own notebook: parameters, the claim it judges, and the rest."""
    claim = python("Claim(").strip()
    names = "CLAIMS, NOT_SUPPORTED, SUPPORTED, Claim"
    entry = f"from gnetlab.report.claims import {names}\nCLAIMS['small-images'] = {claim}"
    return python("output_dir = "), entry, python("claims.check(")


@pytest.fixture(scope="module")
def gnetlab(place):
    """Runs a command in the place; one process for all of them, as each imports much."""

    def run(command: str) -> str:
        result = CliRunner().invoke(cli.app, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception}"
        return result.output

    before = Path.cwd(), {number: signal.getsignal(number) for number in SIGNALS}
    os.chdir(place)
    yield run
    os.chdir(before[0])
    for number, handler in before[1].items():  # which `gnetlab report` sets for its process
        signal.signal(number, handler)


REAL = {  # what stands in README for something of the reader's own
    "image=PATH": "image=picture.png",
    "weights=PATH": f"weights={ROOT / 'gnetlab' / 'net' / 'bundled.safetensors'}",
    "train bundled": "train bundled --steps 1",
}


def test_every_command_runs(gnetlab, monkeypatch):
    phases = [phase | {"size": 32} for phase in bundled.RECIPE["phases"]]
    monkeypatch.setattr(bundled, "RECIPE", bundled.RECIPE | {"batch_size": 4, "phases": phases})
    monkeypatch.setattr(bundled, "held_out_accuracy", lambda _: {})
    monkeypatch.setattr(cli, "_check_device", lambda _: None)  # as where there is a GPU
    for command in dict.fromkeys(COMMANDS):
        for words, real in REAL.items():
            command = command.replace(words, real)
        if "--scheduler" not in command:
            gnetlab(command)


def test_pip_installs_the_extra_for_a_cluster(tmp_path):
    """In a copy, and up to the installation itself."""
    (command,) = re.findall("`(pip install [^`]+)`", README)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "gnetlab").mkdir()
    options = ["--dry-run", "--no-index", "--no-build-isolation"]  # what is installed will do
    ran = subprocess.run(
        [sys.executable, "-m", *shlex.split(command), *options], cwd=tmp_path,
        capture_output=True, text=True, env=os.environ | {"PIP_CONSTRAINT": os.devnull},
    )  # fmt: skip
    # Not looked for here: that would keep setuptools from being imported in this process.
    if "No module named pip" in ran.stderr:
        pytest.skip("no pip, as in uv's environments")
    assert ran.returncode == 0, ran.stderr
    assert "does not provide the extra" not in ran.stderr
    assert "already satisfied: distributed>" in ran.stdout


def test_the_line_for_conda_runs(tmp_path):
    """With a stand-in that makes an environment of the file's name, and activates no other."""
    (tmp_path / "conda").write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'"env create -f "*) cd {tmp_path}; mkdir $(sed -n "s/^name: //p" "{ROOT}/$4");;\n'
        f'"activate "*) cd {tmp_path}/$2;;\n'
        "*) exit 2;;\n"
        "esac\n"
    )
    (tmp_path / "conda").chmod(0o755)
    (line,) = re.findall("`(conda [^`]+)`", README)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", line], cwd=ROOT, check=True, env=os.environ | path)


def own_port() -> int:
    """A free port that nobody gets who asks for any: Linux gives those from 32768 on."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def test_the_commands_of_a_local_cluster_run(gnetlab, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "PATIENCE", 300)  # a busy machine may need it
    port = str(own_port())
    (lines,) = (block for _, block in FENCED if block.startswith("dask scheduler"))
    (report,) = (line for line in COMMANDS if "--scheduler tcp" in line)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def start(command: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", command], env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    opened = [start(f"{lines.replace('8786', port)} wait")]
    try:
        gnetlab(report.replace("8786", port) + " --output reports/cluster")
        (line,) = re.findall("`(CUDA_VISIBLE_DEVICES=0 [^`]+)`", README)
        line = line.replace("ADDRESS", f"tcp://127.0.0.1:{port}")
        opened.append(start(f"exec env {line}"))
        with distributed.Client(f"tcp://127.0.0.1:{port}") as client:
            client.wait_for_workers(3, timeout=300)
            place = client.submit(os.getenv, "CUDA_VISIBLE_DEVICES", resources={"GPU": 1})
            assert place.result(timeout=300) == "0"
    finally:
        for shell in opened:
            os.killpg(shell.pid, signal.SIGTERM)
            shell.wait(timeout=300)


def test_the_script_for_several_gpus_runs(tmp_path):
    code = python("own_device()")
    for long, short in {
        "_size=64": "_size=4", ", size=64": ", size=16", "steps=600": "steps=1",
        "num_classes=16": "num_classes=16, width=0.1", "own_device()": "own_device('cpu')",
    }.items():  # fmt: skip
        assert long in code
        code = code.replace(long, short)
    (tmp_path / "script.py").write_text(code)
    (command,) = re.findall(r"`torchrun ([^`]+)`", README)
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run.pt").is_file()


def test_the_notebook_for_colab_runs(tmp_path, monkeypatch):
    """In a clone, whose first notebook is a small one here; what pip would install is noted."""
    clone = tmp_path / "clone"
    (clone / "notebooks").mkdir(parents=True)
    (clone / "gnetlab").symlink_to(ROOT / "gnetlab")
    small = python("claims.check(").partition("claims.check(")[0]
    stand_in(clone / "notebooks" / "01_compute_cost.ipynb", mine()[0], small)
    notebook = nbformat.read(ROOT / "notebooks" / "cloud" / "colab.ipynb", 4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.count("%pip install") == 1
    first.source = re.sub(
        "^%pip (.+)$", r"!echo pip \1 > pip.txt", first.source, flags=re.MULTILINE
    )
    (work := clone / "notebooks" / "cloud").mkdir()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    patient = {"timeout": 900, "startup_timeout": 600, "iopub_timeout": 600}
    NotebookClient(notebook, resources={"metadata": {"path": work}}, **patient).execute()
    assert (work / "pip.txt").read_text() == f"pip install --quiet {clone}\n"
    shown = [o.data for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    assert sum("image/png" in data for data in shown) == 2  # the explorer has a still image
    assert any("channel" in data.get("text/html", "") for data in shown)  # the explorer
    assert (clone / "report.zip").is_file()
    lost = nbformat.v4.new_notebook(cells=[first], metadata=notebook.metadata)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(CellExecutionError, match="give its address as `repository`"):
        NotebookClient(
            lost, resources={"metadata": {"path": tmp_path / "elsewhere"}}, **patient
        ).execute()


def test_the_lines_for_slurm_run(gnetlab, tmp_path, monkeypatch):
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setattr(cluster, "PATIENCE", 300)
    stand_ins = {
        # As Slurm does, it takes a copy: the script is gone when the job begins.
        "sbatch": 'cp "$1" job.sh; setsid sh job.sh >/dev/null 2>&1 &\n'
        'echo "Submitted batch job $!"',
        "scancel": 'for job; do kill -- "-$job"; done',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    lines = python("SLURMCluster").replace("jobs=4", "jobs=1").replace("workers(4)", "workers(1)")
    lines = lines.replace("scheduler_address)", "scheduler_address, flush=True)")
    opened = subprocess.Popen(
        [sys.executable, "-c", f"{lines}\ninput()\ncluster.close()"], cwd=tmp_path, text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        late = threading.Timer(600, opened.kill)  # it waits for its worker for ever
        late.start()
        address = opened.stdout.readline().strip()
        late.cancel()
        gnetlab(f"gnetlab report 04 --scheduler {address} --output reports/slurm")
    finally:
        opened.communicate("\n", timeout=300)
    assert opened.returncode == 0


def test_the_commands_of_make_are_there():
    for target in ("report", "test", "lab"):
        assert f"`make {target}`" in README
        dry = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert {"report": "gnetlab report", "test": "pytest", "lab": "jupyter lab"}[
            target
        ] in dry.stdout


def test_python_runs(place, monkeypatch):
    """With fewer steps, images and settings, for time; all else as it stands there."""
    for function, shorter in (
        (visualize.visualize_channel, {"steps": 2, "size": 32}),
        (attribution.branch_attribution, {"steps": 2}),
    ):
        monkeypatch.setattr(function, "__kwdefaults__", function.__kwdefaults__ | shorter)
    monkeypatch.chdir(place)
    code = python('gl.googlenet("paper")')
    for long, short in {'["cat", "coffee"]': '["cat"]', "steps=300": "steps=2, width=0.1, size=16",
                        "range(5)": "range(1)"}.items():  # fmt: skip
        assert long in code
        code = code.replace(long, short)
    exec(code, names := {})
    maps = names["maps"]
    assert maps["inception3a.branch5x5"].shape == (2, 32, 28, 28)
    assert torch.equal(maps.channel("inception3a", 195), maps.channel("inception3a.branch5x5", 3))


def test_the_japanese_readme_names_the_same_commands_and_files():
    japanese = (ROOT / "README.ja.md").read_text()
    for command in ("make report", "make test", "make lab"):
        assert f"`{command}`" in japanese
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", japanese):
        assert (ROOT / link).exists(), link
    for claim in json.loads((ROOT / "figures" / "manifest.json").read_text())["claims"]:
        assert re.search(rf"\| `{claim['id']}` \| .* \| {claim['verdict']} \|", japanese)
