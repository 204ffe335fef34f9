"""What each notebook proposes to try at its end: three changed parameters, each of which runs."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# The same notebooks with smaller networks, images and measurements, for time.
SHORTER = {
    "01_compute_cost": """
from torch.utils.benchmark import Timer
Timer.blocked_autorange = lambda self, **_: self.timeit(1)
""",
    "02_branch_activations": """
import gnetlab
from gnetlab.measure import confound
a_full_network, a_full_training = gnetlab.googlenet, confound.branch_confound
gnetlab.googlenet = lambda **options: a_full_network(**options, width=0.25)
confound.branch_confound = lambda *given, **o: a_full_training(*given, **o | {"steps": 2})
""",
    "03_auxiliary_heads": """
from gnetlab.measure import training
from gnetlab.net import data as of_data
full_size, a_full_training = of_data.load, training.train
of_data.load = lambda name, **options: full_size(name, **options | {"size": 16})
training.train = lambda *given, **options: a_full_training(*given, **options | {"steps": 3})
training.local_executor = lambda device: None
""",
    "04_sparse_vs_dense": """
import gnetlab
from gnetlab.measure import sparsity
a_full_network, all_rounds = gnetlab.googlenet, sparsity.sparse_speed
gnetlab.googlenet = lambda *given, **options: a_full_network(*given, **options, width=0.25)
sparsity.sparse_speed = lambda *given, **options: all_rounds(*given, **options | {"rounds": 1})
""",
}


def tries(path: Path) -> list[tuple[str, object]]:
    last = nbformat.read(path, 4).cells[-1].source
    assert last.startswith("## Three things to try\n")
    found = re.findall(r"^- `(\w+) = (.+?)`: ", last, re.MULTILINE)
    return [(name, ast.literal_eval(value)) for name, value in found]


def defaults(path: Path) -> dict[str, object]:
    names: dict = {}
    cells = nbformat.read(path, 4).cells
    exec(next(c.source for c in cells if c.source.startswith("profile = ")), names)
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_three_parameters_are_proposed(path):
    proposed, known = tries(path), defaults(path)
    assert len({name for name, _ in proposed}) == len(proposed) == 3
    for name, value in proposed:
        assert type(value) is type(known[name])
        assert value != known[name]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_proposed_runs(path, tmp_path):
    """All three at once, for time, and through the report, which makes figures and verdicts too."""
    notebook, proposed = nbformat.read(path, 4), tries(path)
    at = next(i for i, c in enumerate(notebook.cells) if c.source.startswith("profile = "))
    notebook.cells[at].source += "".join(f"\n{name} = {value!r}" for name, value in proposed)
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(SHORTER[path.stem]))
    nbformat.write(notebook, tmp_path / path.name)
    command = [sys.executable, "-m", "gnetlab.cli", "report", path.name, "--output", "out"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (entry,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["notebooks"]
    assert {name: entry["parameters"][name] for name, _ in proposed} == dict(proposed)
    assert entry["figures"]
