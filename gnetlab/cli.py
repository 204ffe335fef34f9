"""The command line: `gnetlab report | compare | figures | costs | train | info`; it is thin.

`gnetlab COMMAND --help` is made of the docstrings here: a paragraph that begins with a backspace
keeps its lines. The tests run every example in them.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import shlex
import signal
import subprocess
import sys
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: examples can be copied, and flags have no types
    context_settings={"help_option_names": ["--help", "-h"]},
)
USAGE_ERROR, INTERRUPTED = 2, 130
DEVICES = "auto, cpu, cuda, cuda:1 (the second) or mps"


def main() -> None:
    """Entry point of the `gnetlab` command."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console may lack an arrow, or a file's name
    app()


def _say_version(asked: bool) -> None:
    if asked:
        from gnetlab import __version__

        typer.echo(f"gnetlab {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """GoogLeNet, measured: run the notebooks, count costs, look at what is here.

    \b
    Examples:
      gnetlab report                        # all notebooks, into reports/fast
      gnetlab report 02 -p image=coffee     # one of them, on another image
      gnetlab costs vgg16 googlenet:paper   # multiply-adds, parameters, bytes
      gnetlab info                          # versions, device, weights, data

    `gnetlab COMMAND --help` says more of each.
    """


def _usage_error(message: str) -> typer.Exit:
    return _error(message, USAGE_ERROR)


def _error(message: str, status: int) -> typer.Exit:
    console = Console(stderr=True)
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(status)


@app.command()
def report(
    notebooks: Annotated[
        list[str] | None, typer.Argument(help="Names, beginnings ('02') or paths; default: all.")
    ] = None,
    profile: Annotated[str, typer.Option(help="fast (2 CPU cores) or full (a GPU).")] = "fast",
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", metavar="NAME=VALUE", help="Set a parameter; may be repeated."),
    ] = None,
    grid: Annotated[
        bool,
        typer.Option("--grid", help="Run every combination of -p NAME=VALUE,VALUE,... given."),
    ] = False,
    device: Annotated[str, typer.Option(help=f"{DEVICES}.")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report (default: reports/PROFILE).")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Copy figures and manifest to figures/.")
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            "-j",
            min=0,
            show_default=False,
            help="Notebooks at a time (default: what cores, memory and GPUs bear).",
        ),
    ] = 0,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds a notebook may take (default: no limit).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run also those for which nothing has changed.")
    ] = False,
    scheduler: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Run on the Dask cluster there, not here.")
    ] = "",
    pdf: Annotated[
        bool, typer.Option("--pdf", help="Print it to report.pdf too, by an installed Chromium.")
    ] = False,
) -> None:
    """Execute the notebooks through papermill and write a report.

    What has not changed since the report in the same folder is kept.

    \b
    Examples:
      gnetlab report
      gnetlab report 02 -p image=coffee -p seed=1
      gnetlab report 03 -p seed=0,1,2 -p gain=0.6,1.0 --grid
      gnetlab report --profile full --device cuda --output reports/gpu
      gnetlab report --scheduler tcp://127.0.0.1:8786 -j 4

    \b
    Exit status:
      0 all done, 1 something failed, 2 wrong usage (nothing was run),
      130 interrupted.
    """
    from gnetlab.report import worker  # noqa: F401, I001  (first: it makes the others quicker)
    from gnetlab.report import machine, page, plan, runner
    from gnetlab.report.manifest import is_disturbed
    from gnetlab.report.manifest import publish as publish_figures

    for name in ("SIGTERM", "SIGHUP"):  # these end as Ctrl-C does
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    parameters = _parameters(parameter or [], grid)
    for asked in _asked("profile", profile, parameters):
        if asked not in ("fast", "full"):
            raise _usage_error(f"--profile {asked} asked; choose fast or full")
    for asked in _asked("device", device, parameters):
        if asked.partition(":")[0] not in ("auto", "cpu", "cuda", "mps"):
            raise _usage_error(f"--device {asked} asked; choose {DEVICES}")
        if asked not in ("auto", "cpu") and not scheduler:
            _check_device(asked)
    output, jobs = (output or Path("reports") / profile).resolve(), []
    try:
        jobs = plan.plan(
            plan.find_notebooks(notebooks or []),
            parameters,
            {"profile": profile, "device": device},
        )
        with _place(scheduler, jobs, workers) as place, _Progress(jobs) as progress:
            manifest = runner.run(
                jobs, output, command=shlex.join(["gnetlab", *sys.argv[1:]]), progress=progress,
                timeout=timeout, force=force, place=place,
                pages=lambda manifest: _write_pages(manifest, jobs, output),
                workers=workers or machine.bearable_workers(device),
            )  # fmt: skip
        index = output / "index.html"
        console = Console(highlight=False, soft_wrap=True)
        _print_errors(jobs)
        for entry in filter(is_disturbed, manifest["notebooks"]):
            console.print(
                f"[yellow]{escape(entry['name'])}[/]: other processes took "
                f"{entry['other_load']:.0%} of the cores, so do not rely on its times; run it "
                "again when the machine is idle, with --force"
            )
        console.print(f"Report: {escape(str(index))}")
        if pdf:
            try:
                console.print(f"PDF: {escape(str(page.print_pdf(index)))}")
            except page.PrintError as error:  # the report is there all the same
                typer.echo(f"not printed to PDF: {error}", err=True)
        if publish:
            target = plan.notebooks_folder().parent / "figures"
            copied = publish_figures(manifest, output, target)
            console.print(f"Published {len(copied)} files to {escape(str(target))}")
    except (runner.ReportFailed, OSError) as error:
        _print_errors(jobs)
        raise _error(str(error), 1) from error
    except plan.ReportError as error:
        raise _usage_error(str(error)) from error
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(INTERRUPTED) from interrupt
    if any(job.status == "cancelled" for job in jobs):
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(int(any(job.status not in plan.GOOD for job in jobs)))


def _check_device(device: str) -> None:
    """Before anything runs, in a process of its own: here a GPU would stay in use."""
    code = f"from gnetlab.measure.devices import resolve_device; resolve_device({device!r})"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if tried.returncode:
        said = tried.stderr.strip().splitlines() or [f"--device {device} ends Python; use cpu"]
        raise _usage_error(said[-1].removeprefix("ValueError: "))


def _print_errors(jobs: list) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for job in jobs:
        if job.error:
            console.print(f"[red]{escape(job.name)} {job.status}[/]: {escape(job.error)}")


def _parameters(given: list[str], grid: bool) -> dict[str, str | list[str]]:
    from gnetlab.report.plan import split_values

    parameters: dict[str, str | list[str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise _usage_error(f"-p {text} asked; write -p NAME=VALUE")
        if name in parameters:
            raise _usage_error(
                f"-p {name} asked twice; give it once, with --grid for several values: "
                f"-p {name}=VALUE,VALUE"
            )
        parameters[name] = split_values(value) if grid else value
    return parameters


def _write_pages(manifest: dict, jobs: list, output: Path) -> None:
    from gnetlab.report import page

    for job in jobs:
        executed = job.folder / f"{job.notebook}.ipynb" if job.folder else None
        shown = job.status == "cached" and executed.with_suffix(".html").is_file()
        if executed and not shown:
            page.write_notebook(executed, output / "index.html")
    page.write_index(manifest, output)


def _asked(name: str, option: str, parameters: dict[str, str | list[str]]) -> list[str]:
    """What an option asks for, and -p of the same name, which goes before it."""
    given = parameters.get(name, [])
    return [option, *([given] if isinstance(given, str) else given)]


def _place(scheduler: str, jobs: list, workers: int) -> contextlib.AbstractContextManager:
    """The cluster at an address, or nothing for this machine."""
    if not scheduler:
        return contextlib.nullcontext()
    from gnetlab.report.cluster import Cluster

    return Cluster(scheduler, jobs, workers or None)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A report's folder, or its manifest.json.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative changes up to it are none, such as 0.01.")
    ] = 0.0,
    ignore_timing: Annotated[
        bool,
        typer.Option(
            "--ignore-timing", help="Times may differ: for figures not told, not counted."
        ),
    ] = False,
) -> None:
    """Say what moved from report A to report B, and what may be why.

    Verdicts, numbers and figures; then what was made differently.

    \b
    Examples:
      gnetlab compare figures reports/fast
      gnetlab compare figures reports/fast --tolerance 0.01 --ignore-timing

    \b
    Exit status:
      0 nothing moved, 1 something did, 2 wrong usage.
    """
    from gnetlab.report import compare as comparing

    try:
        (old, folder_a), (new, folder_b) = map(comparing.load, (a, b))
    except ValueError as error:
        raise _usage_error(str(error)) from error
    found = comparing.compare(
        old, new, (folder_a, folder_b), tolerance=tolerance, ignore_timing=ignore_timing
    )
    width = None if sys.stdout.isatty() else 1000
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    for title, changes in (("Moved", found.moved), ("Made differently", found.context)):
        table = Table("what", "name", "A", "B", "change", box=None, pad_edge=False)
        for change in changes:
            relative = "" if change.relative is None else f"{change.relative:+.3%}"
            relative += " (timing)" if change.timing else ""
            table.add_row(change.kind, change.name, change.old, change.new, relative)
        times = sum(change.timing for change in changes) if ignore_timing else 0
        beside = f", beside {times} of measured times" if times else ""
        console.print(f"{title}: {len(changes) - times or 'nothing'}{beside}", style="bold")
        if changes:
            console.print(table)
    raise typer.Exit(int(found.differs(ignore_timing=ignore_timing)))


class _Progress:
    """A live table on a terminal, else one line whenever a notebook starts or ends."""

    def __init__(self, jobs: list) -> None:
        from rich.live import Live

        self._jobs, self._console = jobs, Console()
        self._is_live = self._console.is_terminal
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4)

    def __enter__(self) -> _Progress:
        if self._is_live:
            self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_live:
            self._live.__exit__(*exception)

    def __call__(self, job) -> None:
        if self._is_live:
            return  # it is drawn anew four times a second
        if job.status == "cached":
            self._say(job, f"{job.reason} since the last run")
        elif job.status == "running" and job.cell == 0:
            expected = f", about {job.expected:.0f} s the last time" if job.expected else ""
            self._say(job, f"running, {job.cells} cells{expected} ({job.reason})")
        elif job.status not in ("queued", "running"):
            self._say(job, f"{job.status} in {job.seconds:.0f} s")

    def _say(self, job, text: str) -> None:
        self._console.print(f"{escape(job.name)}: {escape(text)}", highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for title in ("notebook", "state", "cell", "seconds", "last time", "why"):
            table.add_column(title, overflow="ellipsis", no_wrap=True)
        for job in self._jobs:
            color = _STATE_COLORS.get(job.status, "dim")
            expected = f"{job.expected:.0f}" if job.expected else ""
            table.add_row(
                escape(job.name), f"[{color}]{job.status}[/]", f"{job.cell}/{job.cells}",
                f"{job.seconds:.0f}", expected, escape(job.reason),
            )  # fmt: skip
        return table


_STATE_COLORS = {
    "done": "green", "cached": "green", "running": "yellow",
    "failed": "red", "timeout": "red", "died": "red", "invalid": "red",
}  # fmt: skip
_KEYS = {
    "total": [], "stage": ["stage"], "branch": ["stage", "branch"], "kind": ["kind"],
    "layer": ["module", "stage", "branch", "kind", "output_shape"],
}  # fmt: skip
_SHOWN = ("parameters", "macs", "activations", "bytes", "live_bytes")


@app.command()
def costs(
    models: Annotated[
        list[str],
        typer.Argument(
            help="googlenet:PRESET (ours), any name of torchvision, or MODULE:FUNCTION, which "
            "returns a model."
        ),
    ],
    input_side: Annotated[
        int, typer.Option("--input", min=1, help="Side of the image in pixels.")
    ] = 224,
    by: Annotated[str, typer.Option(help="total, stage, branch, kind or layer.")] = "stage",
    sort: Annotated[
        str, typer.Option(help="Largest first in this column (else in order of execution).")
    ] = "",
    all_columns: Annotated[bool, typer.Option("--all", help="Every column there is.")] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Forward and backward, auxiliary heads included.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Totals side by side, over those of the last model.")
    ] = False,
    tools: Annotated[
        bool, typer.Option("--tools", help="What fvcore, ptflops, thop ... would print, and why.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the table to this file too.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write it as a LaTeX table too.")] = None,
) -> None:
    """Count multiply-adds, parameters, bytes and memory of networks.

    No convolution is computed, and no memory taken for weights.

    \b
    Examples:
      gnetlab costs vgg16 googlenet:paper --by total
      gnetlab costs googlenet:cifar --input 32 --by branch --sort macs
      gnetlab costs vgg16 googlenet --compare
      gnetlab costs googlenet --tools
      gnetlab costs my_models:make --by layer --all --csv costs.csv
    """
    gc.disable()  # collecting garbage while these are imported takes half a second
    try:
        import pandas as pd
        import torchvision.models  # noqa: F401

        from gnetlab.measure.costs import layer_costs, summed
        from gnetlab.measure.counters import explain
    finally:
        gc.freeze()  # nor go through them again, at the end either
        gc.enable()
    if by not in _KEYS:
        raise _usage_error(f"--by {by} asked; choose one of {', '.join(_KEYS)}")
    frames, explained = {}, []
    for name in models:
        try:
            frames[name] = layer_costs(_model(name), (3, input_side, input_side), training=training)
            if tools:
                explained.append(explain(frames[name]).assign(model=name))
        except RuntimeError as error:  # of the model itself, at this size
            raise _usage_error(f"{name}: {error}; try another --input") from error
        except (ValueError, TypeError) as error:
            raise _usage_error(f"{name}: {error}") from error
    everything = pd.concat(
        [frame.assign(model=name) for name, frame in frames.items()], ignore_index=True
    )
    totals = summed(everything, "model")
    if tools:
        table = pd.concat(explained)[["model", "tool", "term", "operations"]]
    elif compare:
        table = _compared(totals)
    else:
        table = summed(everything, ["model", *_KEYS[by]])
        if sort:
            if sort not in table:
                raise _usage_error(f"--sort {sort} asked; choose one of {', '.join(table)}")
            table = table.sort_values(sort, ascending=False, kind="stable", ignore_index=True)
        extra = ("backward_macs", "stored_bytes") if training else ()
        if not all_columns:
            table = table[["model", *_KEYS[by], *_SHOWN, *extra]]
    _write(table, csv, latex)
    _print_frame(table, None if tools or compare else totals)
    for (name, kind), rows in everything[everything.macs.isna()].groupby(["model", "kind"]):
        typer.echo(
            f"{name}, not counted: {len(rows)} x {kind} (no rule), e.g. {rows.module.iloc[0]}"
        )


def _model(name: str):
    """A model, on the meta device (no memory for weights) where it can be made there."""
    import torch

    from gnetlab.net.model import googlenet

    family, colon, rest = name.partition(":")
    if family == "googlenet" and colon:
        with torch.device("meta"):
            return googlenet(rest)
    if colon:
        return _model_of_function(family, rest)
    from torchvision.models import get_model, list_models

    if name not in list_models():
        near = difflib.get_close_matches(name, ["googlenet:paper", *list_models()], n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"unknown model; {hint}Ours: googlenet:paper, :torchvision, :cifar, :naive; "
            "theirs: any of torchvision.models.list_models(); yours: MODULE:FUNCTION"
        )
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    try:
        with torch.device("meta"):
            return get_model(name, weights=None, **options)
    except NotImplementedError:  # it reads values while it is made
        return get_model(name, weights=None, **options)


def _model_of_function(module: str, function: str):
    import importlib

    from torch import nn

    sys.path.insert(0, "")  # a file beside the user is meant
    try:
        model = getattr(importlib.import_module(module), function)()
    except ImportError as error:
        raise ValueError(
            f"no module {module!r} here or installed ({error}); call from the folder of "
            f"{module}.py, or install it"
        ) from error
    except AttributeError as error:
        raise ValueError(
            f"{error}; give MODULE:FUNCTION of a function that returns a model"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{function}() returned {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model.eval()


def _compared(totals: pd.DataFrame) -> pd.DataFrame:
    """Quantities down, models across, each with its ratio to the last model."""
    rows = totals.set_index("model").T.astype(float)
    last = rows.columns[-1]
    for name in rows.columns[:-1]:
        rows[f"{name} / {last}"] = rows[name] / rows[last]
    return rows.rename_axis("total").reset_index()


def _write(table: pd.DataFrame, csv: Path | None, latex: Path | None) -> None:
    for path in filter(None, (csv, latex)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if csv:
        table.to_csv(csv, index=False)
    if latex:
        from gnetlab.draw.figures import write_latex

        write_latex(table, latex)


def _print_frame(table: pd.DataFrame, totals: pd.DataFrame | None) -> None:
    shown = Table(box=None, pad_edge=False)
    numbers = set(table.select_dtypes("number"))
    for column in table.columns:
        shown.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    for model, rows in table.groupby(table.columns[0], sort=False):
        for row in rows.itertuples(index=False):
            shown.add_row(*map(_shown, row))
        if totals is not None and len(rows) > 1:
            total = totals[totals.model == model].iloc[0]
            cells = [_shown(total[c]) if c in numbers else "" for c in table.columns]
            shown.add_row(str(model), "total", *cells[2:], style="bold")
            shown.add_section()
    Console(width=None if sys.stdout.isatty() else 1000).print(shown)
    typer.echo("macs: multiply-adds of convolutions, linear layers and matrix products; one image")


def _shown(value: object) -> str:
    if isinstance(value, Integral) or (isinstance(value, float) and value >= 1000):
        return f"{int(value):,}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


@app.command()
def figures(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names, as in the report; default: all.")
    ] = None,
    report: Annotated[
        Path, typer.Option(help="Folder of the report, or of some of its figures.")
    ] = Path("reports/fast"),
    style: Annotated[
        str | None,
        typer.Option(help="column (3.5 in wide) or page (7.2 in); default: each figure's own."),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="pdf, svg or png; may be repeated; default: all three."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the files; default: figures-STYLE, here.")
    ] = None,
) -> None:
    """Draw a report's figures again, for a paper's column or a page.

    Nothing is measured. Without --style the files are the same as in the report, and go to
    figures-own.

    \b
    Examples:
      gnetlab figures latency cost_per_module --style column --format pdf
      gnetlab figures escape --report figures --output paper

    \b
    Exit status:
      0 drawn, 2 wrong usage, no report, or a stored figure that cannot be
      drawn.
    """
    from gnetlab.draw.figures import KINDS
    from gnetlab.draw.redraw import redraw, stored
    from gnetlab.draw.style import WIDTHS

    if style not in (None, *WIDTHS):
        raise _usage_error(f"--style {style} asked; choose {' or '.join(WIDTHS)}")
    for kind in formats or []:
        if kind not in KINDS:
            raise _usage_error(f"--format {kind} asked; choose from {', '.join(KINDS)}")
    if not (known := stored(report)):
        found = "has no stored figures" if report.is_dir() else "is not there"
        raise _usage_error(
            f"{report} {found}; run `gnetlab report` again, or give another --report"
        )
    for name in names or []:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise _usage_error(f"no figure {name} in {report}; {hint}There are {', '.join(known)}")
    output = output or Path(f"figures-{style or 'own'}")
    try:
        for name in dict.fromkeys(names or known):
            for path in redraw(known[name], output, width=style, kinds=formats or KINDS):
                typer.echo(path)
    except ValueError as error:
        raise _usage_error(str(error)) from error


@app.command()
def train(
    what: Annotated[str, typer.Argument(help="bundled: gnetlab's own recipe, on its photographs.")],
    output: Annotated[
        Path, typer.Option(help="Where the weights go; their card lies beside them.")
    ] = Path("bundled.safetensors"),
    device: Annotated[str, typer.Option(help=f"{DEVICES}.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Fewer steps than the recipe's.")] = None,
) -> None:
    """Train weights by their recipe.

    An interrupted training goes on where it stopped.

    \b
    Examples:
      gnetlab train bundled --output weights/bundled.safetensors
      gnetlab train bundled --steps 100 --output try.safetensors
    """
    from gnetlab.measure.bundled import train_bundled
    from gnetlab.measure.distributed import own_device, processes

    if what != "bundled":
        raise _usage_error(f"train {what} asked; there is one recipe: gnetlab train bundled")
    try:
        place = own_device(device)
        card = train_bundled(output, device=place, steps=steps)
    except ValueError as error:
        raise _usage_error(str(error)) from error
    if not processes(place).first:
        return
    typer.echo(f"{output}: SHA-256 {card['sha256']}")
    for side, accuracy in card["held_out_accuracy"].items():
        typer.echo(f"held-out crops of {side} px: {accuracy:.1%} of the photographs told")


@app.command()
def info() -> None:
    """Say what is here: versions, device, weights in the cache, data.

    \b
    Example:
      gnetlab info
    """
    import importlib.metadata

    from gnetlab.measure.devices import device_name, resolve_device
    from gnetlab.net import data, weights
    from gnetlab.report.machine import PACKAGES

    table = Table(box=None, show_header=False, pad_edge=False)
    for name in ("gnetlab", *PACKAGES):
        table.add_row(name, importlib.metadata.version(name))
    device = resolve_device()
    table.add_row("device", f"{device.type}: {device_name(device)}")
    cached = weights.imagenet_path()[1]
    there = "in the cache" if cached.exists() else "not in the cache"
    table.add_row("weights imagenet", f"{there} ({cached})")
    table.add_row("weights bundled", "always there (16 photographs, not ImageNet)")
    table.add_row("data photocrops", f"{len(data.photographs())} photographs, always there")
    folders = [f for f in data.FASHION_MNIST_FOLDERS if Path(f).expanduser().is_dir()]
    table.add_row("data fashion-mnist", folders[0] if folders else "not on this machine")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
