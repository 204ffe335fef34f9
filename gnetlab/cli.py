"""The command line: `gnetlab report`, `gnetlab costs`, `gnetlab info`. Thin: others do the work."""

from __future__ import annotations

import difflib
import gc
import shlex
import sys
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    help="GoogLeNet, measured: run the notebooks, count costs, look at what is here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
USAGE_ERROR, INTERRUPTED = 2, 130


def main() -> None:
    """Entry point of the `gnetlab` command."""
    app()


def _usage_error(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
    return typer.Exit(USAGE_ERROR)


@app.command()
def report(
    notebooks: Annotated[
        list[str] | None, typer.Argument(help="Names, beginnings ('02') or paths; default: all.")
    ] = None,
    profile: Annotated[str, typer.Option(help="fast (2 CPU cores) or full (a GPU).")] = "fast",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="Set a parameter.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report [default: reports/PROFILE].")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Copy figures and manifest to figures/.")
    ] = False,
) -> None:
    """Execute the notebooks through papermill and write a report.

    Example: gnetlab report 02 -p image=coffee -p seed=1

    Exit status: 0 all done, 1 something failed, 2 wrong usage (nothing was run), 130 interrupted.
    """
    from gnetlab.report import page, runner

    if profile not in ("fast", "full"):
        raise _usage_error(f"--profile {profile} asked; choose fast or full")
    parameters = {}
    for text in parameter or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise _usage_error(f"-p {text} asked; write -p NAME=VALUE")
        parameters[name] = value
    output = (output or Path("reports") / profile).resolve()
    try:
        jobs = runner.plan(
            runner.find_notebooks(notebooks or []),
            parameters,
            {"profile": profile, "device": device},
        )
        with _Progress(jobs) as progress:
            command = shlex.join(["gnetlab", *sys.argv[1:]])
            manifest = runner.run(jobs, output, command=command, progress=progress)
        for job in jobs:
            if job.folder and (job.folder / f"{job.name}.ipynb").is_file():
                page.write_notebook(job.folder / f"{job.name}.ipynb")
        index = page.write_index(manifest, output)
        console = Console(highlight=False, soft_wrap=True)
        for job in jobs:
            if job.error:
                console.print(f"[red]{job.name} {job.status}[/]: {job.error.splitlines()[0]}")
        console.print(f"Report: {index}")
        if publish:
            target = runner.notebooks_folder().parent / "figures"
            copied = runner.publish(manifest, output, target)
            console.print(f"Published {len(copied)} files to {target}")
    except runner.ReportError as error:
        raise _usage_error(str(error)) from error
    if any(job.status == "cancelled" for job in jobs):
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(int(any(job.status != "done" for job in jobs)))


class _Progress:
    """A live table on a terminal, else one line whenever a notebook starts or ends."""

    def __init__(self, jobs: list) -> None:
        from rich.live import Live

        self._jobs, self._console = jobs, Console()
        self._live = Live(self._table(), console=self._console, refresh_per_second=4)
        self._is_live = self._console.is_terminal

    def __enter__(self) -> _Progress:
        if self._is_live:
            self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_live:
            self._live.__exit__(*exception)

    def __call__(self, job) -> None:
        if self._is_live:
            self._live.update(self._table())
        elif job.status != "running":
            self._console.print(f"{job.name}: {job.status} in {job.seconds:.0f} s")
        elif job.cell == 0:
            self._console.print(f"{job.name}: running, {job.cells} cells")

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for title in ("notebook", "state", "cell", "seconds"):
            table.add_column(title)
        colors = {"done": "green", "failed": "red", "running": "yellow"}
        for job in self._jobs:
            state = f"[{colors.get(job.status, 'dim')}]{job.status}[/]"
            table.add_row(job.name, state, f"{job.cell}/{job.cells}", f"{job.seconds:.0f}")
        return table


@app.command()
def costs(
    models: Annotated[
        list[str], typer.Argument(help="googlenet:PRESET (ours) or any name of torchvision.")
    ],
    input_side: Annotated[int, typer.Option("--input", help="Side of the image in pixels.")] = 224,
    by: Annotated[str, typer.Option(help="total, stage, branch, kind or layer.")] = "stage",
    csv: Annotated[Path | None, typer.Option(help="Write the table to this file too.")] = None,
) -> None:
    """Count multiply-adds, parameters and activations, without computing a convolution.

    Example: gnetlab costs vgg16 googlenet:paper --input 224 --by branch
    """
    gc.disable()  # collecting garbage while these are imported takes half a second
    try:
        import pandas as pd
        import torchvision.models  # noqa: F401

        from gnetlab.measure.costs import layer_costs
    finally:
        gc.freeze()  # nor go through them again, at the end either
        gc.enable()
    keys = {
        "total": [], "stage": ["stage"], "branch": ["stage", "branch"], "kind": ["kind"],
        "layer": ["module", "stage", "branch", "kind", "output_shape"],
    }  # fmt: skip
    if by not in keys:
        raise _usage_error(f"--by {by} asked; choose one of {', '.join(keys)}")
    frames = []
    for name in models:
        try:
            frame = layer_costs(_model(name), (3, input_side, input_side))
        except (ValueError, RuntimeError) as error:
            raise _usage_error(f"{name}: {error}") from error
        frames.append(frame.assign(model=name))
    everything = pd.concat(frames, ignore_index=True)
    uncounted = everything[everything.macs.isna()]
    sums = ["parameters", "macs", "activations"]
    table = everything.groupby(["model", *keys[by]], sort=False)[sums].sum().reset_index()
    if csv:
        csv.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(csv, index=False)
    _print_frame(table, everything.groupby("model", sort=False)[sums].sum())
    for kind, rows in uncounted.groupby("kind"):
        typer.echo(f"not counted: {len(rows)} x {kind} (no formula), e.g. {rows.module.iloc[0]}")


def _model(name: str):
    """A model on the meta device (no memory for weights): ours as googlenet:PRESET, or theirs."""
    import torch

    from gnetlab.net.model import googlenet

    with torch.device("meta"):
        if name.partition(":")[0] == "googlenet":
            return googlenet(name.partition(":")[2] or "paper")
        from torchvision.models import get_model, list_models

        if name not in list_models():
            near = difflib.get_close_matches(name, ["googlenet:paper", *list_models()], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(
                f"unknown model; {hint} Ours: googlenet:paper, :torchvision, :cifar, :naive; "
                "theirs: any of torchvision.models.list_models()"
            )
        options = {"init_weights": False} if name == "inception_v3" else {}
        return get_model(name, weights=None, **options)


def _print_frame(table: pd.DataFrame, totals: pd.DataFrame) -> None:
    shown = Table(box=None, pad_edge=False)
    for column in table.columns:
        number = column in totals.columns
        shown.add_column(column, justify="right" if number else "left", no_wrap=True)
    for model, rows in table.groupby("model", sort=False):
        for row in rows.itertuples(index=False):
            shown.add_row(*(f"{v:,}" if isinstance(v, Integral) else str(v) for v in row))
        if len(rows) > 1:
            total = [f"{int(value):,}" for value in totals.loc[model]]
            blanks = [""] * (len(table.columns) - len(total) - 1)
            shown.add_row(
                str(model), *blanks[1:], *(["total"] * bool(blanks)), *total, style="bold"
            )
            shown.add_section()
    Console(width=None if sys.stdout.isatty() else 160).print(shown)
    typer.echo("macs: multiply-adds of convolutions and linear layers, for one image")


@app.command()
def info() -> None:
    """Say what is here: versions, device, weights in the cache, data."""
    import importlib.metadata

    from gnetlab.measure.latency import device_name, resolve_device
    from gnetlab.net import data, weights
    from gnetlab.report.runner import PACKAGES

    table = Table(box=None, show_header=False, pad_edge=False)
    for name in ("gnetlab", *PACKAGES):
        table.add_row(name, importlib.metadata.version(name))
    device = resolve_device()
    table.add_row("device", f"{device.type}: {device_name(device)}")
    cached = weights.imagenet_path()[1]
    there = "in the cache" if cached.exists() else "not in the cache"
    table.add_row("weights imagenet", f"{there} ({cached})")
    table.add_row("data photocrops", f"{len(data.photographs())} photographs, always there")
    folders = [f for f in data.FASHION_MNIST_FOLDERS if Path(f).expanduser().is_dir()]
    table.add_row("data fashion-mnist", folders[0] if folders else "not on this machine")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
