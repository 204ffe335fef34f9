"""Notebooks through papermill: plan, check, execute, keep what is good, say what happened.

`find_notebooks()`  the notebooks by name, or all of them
`plan()`            jobs with checked parameters, or one `ReportError` with every problem
`run()`             executes what has changed, each notebook in a process of its own; returns the
                    manifest
`publish()`         copies the figures and the manifest of a complete report

A notebook is "done" only if every code cell ran and none raised: papermill's own word is not
taken for it (it reports success after `sys.exit(0)`). A notebook's folder appears under its name
only when it is complete; a failed one goes to failed/, and the last good one stays.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import difflib
import hashlib
import importlib.metadata
import json
import multiprocessing.connection
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml

import gnetlab
from gnetlab.report import cache, claims, worker

PACKAGES = (
    "torch", "torchvision", "jupyterlab", "matplotlib", "pandas", "numpy", "fvcore", "captum",
    "papermill", "scikit-image",
)  # fmt: skip
FIGURE_FILES = ("png", "svg", "pdf", "csv", "tex")
Progress = Callable[["Job"], None]


class ReportError(Exception):
    """What was asked cannot be run; nothing was."""


GOOD = ("done", "cached")


@dataclass
class Job:
    """A notebook to execute.

    status      queued, running; done, cached (nothing it depends on has changed); failed (a cell
                raised, or never ran), timeout, died (its kernel), cancelled
    reason      why it was run, or was not
    parameters  set for this run; `defaults`: what the notebook has for the others
    alone       it measures times, and nothing may run beside it: `metadata.gnetlab.alone`
    """

    name: str
    source: Path
    title: str
    parameters: dict[str, Any]
    cells: int
    status: str = "queued"
    cell: int = 0
    seconds: float = 0.0
    error: str = ""
    folder: Path | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    peak_bytes: int | None = None
    alone: bool = False


def notebooks_folder() -> Path:
    """./notebooks, else the folder beside the installed source."""
    beside = Path(gnetlab.__file__).resolve().parent.parent / "notebooks"
    for folder in (Path("notebooks"), beside):
        if any(folder.glob("*.ipynb")):
            return folder.resolve()
    raise ReportError(
        f"no notebooks found in ./notebooks or {beside}; run from a clone of the repository, or "
        "give paths of notebooks"
    )


def find_notebooks(names: list[str]) -> list[Path]:
    """Notebooks by path, name or beginning of a name ("02"); all of them for an empty list."""
    paths = [Path(name).resolve() for name in names if name.endswith(".ipynb")]
    missing = [str(path) for path in paths if not path.is_file()]
    rest = [name for name in names if not name.endswith(".ipynb")]
    if rest or not names:
        known = {path.stem: path for path in sorted(notebooks_folder().glob("*.ipynb"))}
        if not names:
            return list(known.values())
        for name in rest:
            found = [path for stem, path in known.items() if stem.startswith(name)]
            paths += found
            if not found:
                missing.append(f"{name} (known: {', '.join(known)})")
    if missing:
        raise ReportError(f"no such notebook: {'; '.join(missing)}")
    return list(dict.fromkeys(paths))


def plan(
    notebooks: list[Path], parameters: Mapping[str, str], common: Mapping[str, Any]
) -> list[Job]:
    """Check everything before anything runs; one ReportError lists every problem.

    `parameters` come from the command line as text: each must exist in at least one notebook's
    cell tagged "parameters", and fit the type of its default there; a notebook gets those it has.
    `common` (profile, device) must exist in all of them.
    """
    problems: list[str] = []
    known: dict[str, dict[str, Any]] = {}
    about: dict[str, list] = {}
    for path in notebooks:
        try:
            known[path.stem], *about[path.stem] = _inspect(path)
        except ReportError as error:
            problems.append(str(error))
    everywhere = sorted({name for defaults in known.values() for name in defaults} - {"output_dir"})
    for name in parameters:
        if known and name not in everywhere:
            near = difflib.get_close_matches(name, everywhere, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            problems.append(f"unknown parameter {name}.{hint} Known: {', '.join(everywhere)}")
    jobs = []
    for path in notebooks:
        defaults = known.get(path.stem)
        if defaults is None:
            continue
        lacking = [name for name in (*common, "output_dir") if name not in defaults]
        if lacking:
            problems.append(f"{path.name}: its parameters cell lacks {', '.join(lacking)}")
        values: dict[str, Any] = dict(common)
        for name, text in parameters.items():
            if name in defaults:
                try:
                    values[name] = _typed(name, text, defaults[name])
                except ReportError as error:
                    problems.append(f"{path.name}: {error}")
        title, cells, alone = about[path.stem]
        rest = {k: v for k, v in defaults.items() if k not in values and k != "output_dir"}
        jobs.append(Job(path.stem, path, title, values, cells, defaults=rest, alone=alone))
    if problems:
        raise ReportError("\n".join(dict.fromkeys(problems)))
    return jobs


def _inspect(path: Path) -> tuple[dict[str, Any], str, int, bool]:
    """Parameters with their defaults, title (its first heading), number of cells, `Job.alone`."""
    import papermill

    try:
        notebook = nbformat.read(path, as_version=4)
        tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        if len(tagged) != 1:
            raise ReportError(
                f"{path.name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one"
            )
        # papermill's word on what is a parameter; its types are guesses, so the default decides.
        inferred = papermill.inspect_notebook(str(path))
        defaults = {name: _literal(p["default"]) for name, p in inferred.items()}
        headings = (
            re.search(r"^# (.+)$", c.source, re.M)
            for c in notebook.cells
            if c.cell_type == "markdown"
        )
        title = next((found[1] for found in headings if found), path.stem)
        alone = bool(notebook.metadata.get("gnetlab", {}).get("alone"))
        return defaults, title, len(notebook.cells), alone
    except ReportError:
        raise
    except Exception as error:  # nbformat and papermill raise many kinds
        raise ReportError(f"{path} is not a notebook: {str(error)[:200]}") from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None  # an expression: any value fits


def _typed(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        # Notebooks run in folders of their own: what is a file here must stay one there.
        kind, colon, path = text.rpartition(":")
        if (colon or os.sep in path or Path(path).suffix) and path and Path(path).exists():
            return f"{kind}{colon}{Path(path).resolve()}"
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise ReportError(
            f"parameter {name} takes {type(default).__name__} (default {default!r}), "
            f"but {text!r} was given"
        )
    return value


def run(
    jobs: list[Job],
    output: Path,
    *,
    command: str = "",
    progress: Progress = lambda _job: None,
    workers: int = 1,
    timeout: float | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Execute the jobs into `output`, so many at a time; a failed one does not stop the others.

    workers   notebooks at a time; their kernels share the cores out
    timeout   seconds that a notebook may take, whatever its cells do (None: no limit)
    force     run those whose results are here and still hold, too

    Returns the manifest, which is also written to `output`/manifest.json. `progress` is called
    whenever a job changes. After a KeyboardInterrupt all processes of the notebooks are gone, the
    running and the remaining jobs are "cancelled", and the manifest is still returned.

    Raises ReportError if `output` cannot be written, or another run is writing there.
    """
    from filelock import FileLock, Timeout

    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ReportError(
            f"another report is being written to {output}; wait for it, or choose another --output"
        ) from error
    except OSError as error:
        raise ReportError(f"cannot write to {output}: {error}; choose another --output") from error
    started = datetime.datetime.now(datetime.UTC)
    try:
        for part in output.glob(".part-*"):  # of a run that was killed
            shutil.rmtree(part, ignore_errors=True)
        for job in jobs:
            cache.restore(job, output, force)
            if job.status == "cached":
                progress(job)
        _run_all(
            [job for job in jobs if job.status == "queued"], output, progress, workers, timeout
        )
        kept = _kept_manifest(jobs, output)
        if kept:
            return kept
        manifest = _manifest(jobs, output, command, started)
        _write(output / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    finally:
        lock.release()
    return manifest


def _kept_manifest(jobs: list[Job], output: Path) -> dict[str, Any] | None:
    """The last manifest, where nothing was run and it is of the same notebooks: it stays true."""
    if any(job.status != "cached" for job in jobs):
        return None
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
        entries = [(n["name"], n["status"] in GOOD, n["parameters"]) for n in manifest["notebooks"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    asked = [(job.name, True, {**job.parameters, **job.defaults}) for job in jobs]
    return manifest if entries == asked else None


@dataclass
class _Slot:
    """A running job."""

    job: Job
    part: Path
    worker: worker.Worker
    start: float
    result: dict[str, Any] | None = None


def _run_all(
    jobs: list[Job], output: Path, progress: Progress, workers: int, timeout: float | None
) -> None:
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            while waiting and _fits(waiting[0], running, workers):
                running.append(_begin(waiting.pop(0), output, workers))
                progress(running[-1].job)
            watched = [w for s in running for w in (s.worker.events, s.worker.process.sentinel)]
            multiprocessing.connection.wait(watched, timeout=0.5)
            for slot in list(running):
                ended = not slot.worker.process.is_alive()  # asked before the last events are read
                _read_events(slot, progress)
                slot.job.seconds = time.monotonic() - slot.start
                late = timeout is not None and slot.job.seconds > timeout
                if slot.result or ended or late:
                    running.remove(slot)
                    _finish(slot, output, late, timeout)
                    progress(slot.job)
    except KeyboardInterrupt:
        for slot in running:
            worker.end(slot.worker)
            shutil.rmtree(slot.part, ignore_errors=True)
        for job in jobs:
            if job.status in ("queued", "running"):
                job.status, job.error = "cancelled", "interrupted"


def _fits(job: Job, running: list[_Slot], workers: int) -> bool:
    if job.alone or any(slot.job.alone for slot in running):
        return not running
    return len(running) < workers


def _begin(job: Job, output: Path, workers: int) -> _Slot:
    part = output / f".part-{job.name}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    environment = {
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not a user's own
        "GNETLAB_BATCH": "1",  # nobody is there to move a slider
        "PYTHONHASHSEED": "0",
    }
    if workers > 1 and not job.alone:
        cores = str(max(1, available_cores() // workers))
        environment |= {"GNETLAB_CORES": cores, "OMP_NUM_THREADS": cores}
    job.status = "running"
    started = worker.start(
        job.source, part / f"{job.name}.ipynb", {**job.parameters, "output_dir": "."}, environment
    )
    return _Slot(job, part, started, time.monotonic())


def available_cores() -> int:
    """Cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _read_events(slot: _Slot, progress: Progress) -> None:
    with contextlib.suppress(EOFError, OSError):  # the worker is gone
        while slot.worker.events.poll():
            event = slot.worker.events.recv()
            if "error" in event:
                slot.result = event
            else:
                slot.job.cell = event["cell"]
                progress(slot.job)


def _finish(slot: _Slot, output: Path, late: bool, timeout: float | None) -> None:
    """Decide what became of a job, and put its folder where it belongs."""
    job, part, result = slot.job, slot.part, slot.result
    worker.end(slot.worker)
    executed = part / f"{job.name}.ipynb"
    if result is None and late:
        job.status, job.error = "timeout", f"took longer than {timeout:g} s, in cell {job.cell}"
    elif result is None:
        code = slot.worker.process.exitcode
        job.status, job.error = "died", f"its process ended with {code}, in cell {job.cell}"
    else:
        job.peak_bytes = result["peak_bytes"]
        job.error = result["error"] or _unfinished(executed)
        died = job.error.startswith("DeadKernelError")
        job.status = "died" if died else "failed" if job.error else "done"
    if job.status == "died":
        job.error += " (out of memory?)"
    if executed.is_file():
        _normalize(executed)
    facts = part / "facts.json"
    job.facts = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    if job.status == "done":
        (part / worker.LOG).unlink(missing_ok=True)
    job.folder = output / job.name if job.status == "done" else output / "failed" / job.name
    _replace(part, job.folder)
    if job.status == "done":
        shutil.rmtree(output / "failed" / job.name, ignore_errors=True)
        cache.keep(job)


def _unfinished(executed: Path) -> str:
    """Why an executed notebook is not complete; empty if it is."""
    cells = [c for c in nbformat.read(executed, as_version=4).cells if c.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        raised = next((out for out in cell.outputs if out.output_type == "error"), None)
        if raised:
            return f"{raised.ename}: {raised.evalue} (in code cell {number})"
        if cell.source.strip() and cell.execution_count is None:
            return f"code cell {number} never ran (the kernel ended before it)"
    return ""


def _normalize(executed: Path) -> None:
    """Drop what papermill and nbclient add about this run and this machine."""
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "papermill-error-cell-tag" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = ["error"]
    nbformat.write(notebook, executed)


def _replace(part: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(part, target)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".part-{path.name}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def figures_of(folder: Path) -> list[dict[str, Any]]:
    """Saved figures of a notebook's folder: name, alt text, and files with their SHA-256."""
    from PIL import Image

    figures = []
    for png in sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns):
        with Image.open(png) as image:
            alt, size = image.info.get("Description", ""), image.size
        files = {
            kind: {"path": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for kind in FIGURE_FILES
            if (path := png.with_suffix(f".{kind}")).is_file()
        }
        figures.append({"name": png.stem, "alt": alt, "pixels": list(size), "files": files})
    return figures


def _manifest(
    jobs: list[Job], output: Path, command: str, started: datetime.datetime
) -> dict[str, Any]:
    entries = [
        {
            "name": job.name,
            "title": job.title,
            "status": job.status,
            "reason": job.reason,
            "error": job.error,
            "seconds": round(job.seconds, 1),
            "peak_bytes": job.peak_bytes,
            "parameters": {**job.parameters, **job.defaults},
            "facts": job.facts,
            "folder": str(job.folder.relative_to(output)) if job.folder else None,
            "figures": figures_of(job.folder) if job.status in GOOD and job.folder else [],
        }
        for job in jobs
    ]
    folders = {job.name: job.folder if job.status in GOOD else None for job in jobs}
    return {
        "schema": 1,
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "gnetlab": gnetlab.__version__,
        "git": _git(jobs[0].source.parent if jobs else Path()),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "notebooks": entries,
        "claims": claims.collect(folders),
    }


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the notebooks' repository, and whether something in it was changed since."""
    try:
        commit = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = ["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
        return {"commit": commit, "dirty": bool(changed.strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def publish(manifest: Mapping[str, Any], output: Path, target: Path) -> list[Path]:
    """Copy every figure's files and the manifest to `target`, replacing what is there.

    Raises ReportError unless all notebooks there are were run and are done.
    """
    run_here = {entry["name"] for entry in manifest["notebooks"] if entry["status"] in GOOD}
    lacking = sorted({path.stem for path in notebooks_folder().glob("*.ipynb")} - run_here)
    if lacking:
        raise ReportError(f"--publish needs every notebook done; lacking: {', '.join(lacking)}")
    part = target.with_name(f".part-{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    copied = []
    for entry in manifest["notebooks"]:
        for figure in entry["figures"]:
            for file in figure["files"].values():
                shutil.copy2(output / entry["folder"] / file["path"], part)
                copied.append(target / file["path"])
    shutil.copy2(output / "manifest.json", part)
    _replace(part, target)
    return copied
