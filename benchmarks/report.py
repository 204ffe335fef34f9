"""The report beside plain papermill, on the same notebooks.

    python benchmarks/report.py [--rounds 3] [--notebooks 1] [--threads 2]

Six small notebooks on GoogLeNet (`--notebooks 1`: the project's own instead, minutes each round):
papermill's command line for one after the other, which is what its documentation shows, and
`gnetlab report` on all of them, with one and with two at a time. The report also writes each
notebook as HTML, the manifest and the index page. Then what a notebook costs beyond its cells: the
wall time of eight notebooks that do nothing, less that of two, for each of the six more.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from machine import prepare

import gnetlab

PARAMETERS = 'profile = "fast"\ndevice = "cpu"\nseed = 0\noutput_dir = "output"'
START = (
    "import torch\nimport pandas as pd\nfrom matplotlib.figure import Figure\n"
    "import gnetlab as gl\n"
    "from gnetlab.draw import figures\nmodel = gl.googlenet('paper', width=0.25, num_classes=10)"
)
FIGURE = (
    "figure = Figure()\nfigure.subplots().plot(frame.select_dtypes('number').iloc[:, 0])\n"
    "figures.save(figure, 'figure', frame, directory=output_dir)"
)
SMALL = {
    "costs": "frame = gl.layer_costs(model)",
    "costs_vgg": "import torchvision\nframe = gl.layer_costs(torchvision.models.vgg11())",
    "latency": "frame = gl.measure_latency(model.eval(), input_size=(3, 64, 64))",
    "receptive": "frame = gl.receptive_fields(model)",
    "gradients": "frame = gl.gradient_flow(model, torch.randn(4, 3, 64, 64), torch.arange(4))",
    "statistics": "frame = gl.branch_statistics(model.eval(), [torch.randn(4, 3, 64, 64)])",
}


def write(path: Path, *cells: str) -> Path:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python",
    }  # fmt: skip
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *cells)]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


def command(*arguments: object, folder: Path) -> float:
    """Seconds of a command's wall time."""
    environment = {**os.environ, "GNETLAB_OFFLINE": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=folder, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start


def papermill(paths: list[Path], folder: Path) -> float:
    out = Path(tempfile.mkdtemp(dir=folder))
    return sum(
        command("papermill", path, out / path.name, "-p", "output_dir", out / path.stem,
                "--no-progress-bar", folder=folder)
        for path in paths
    )  # fmt: skip


def report(paths: list[Path], folder: Path, *options: str) -> float:
    out = tempfile.mkdtemp(dir=folder)
    return command("gnetlab.cli", "report", *paths, "--output", out, *options, folder=folder)


def main() -> None:
    options, _ = prepare(__doc__, rounds=3, notebooks=(0, "1: the project's own notebooks"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.notebooks:
            source = Path(gnetlab.__file__).parent.parent / "notebooks"
            paths = sorted(source.glob("*.ipynb"))
        else:
            paths = [write(folder / f"{n}.ipynb", START, c, FIGURE) for n, c in SMALL.items()]
        runs = {
            "papermill, one by one": lambda: papermill(paths, folder),
            "gnetlab report -j 1": lambda: report(paths, folder, "-j", "1"),
            "gnetlab report -j 2": lambda: report(paths, folder, "-j", "2"),
        }
        seconds = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                seconds[name].append(run())
        print(f"\n{len(paths)} notebooks: {', '.join(path.stem for path in paths)}")
        whole = seconds["papermill, one by one"]
        for name, times in seconds.items():
            ratios = sorted(a / b for a, b in zip(times, whole, strict=True))
            print(f"  {name:24} {statistics.median(times):7.1f} s  "
                  f"{statistics.median(ratios):5.2f}x   "
                  f"(rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip
        empty = [write(folder / f"empty{i}.ipynb", "1") for i in range(8)]
        more = [
            (report(empty, folder, "-j", "1") - report(empty[:2], folder, "-j", "1")) / 6
            for _ in range(options.rounds)
        ]
        print(f"\nbeyond its cells, a notebook takes {statistics.median(more):.2f} s "
              f"(rounds: {min(more):.2f} to {max(more):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
