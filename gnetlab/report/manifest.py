"""What made a report and what is in it: manifest.json, and publishing the figures.

`make()`     the manifest of what was run; its schema is manifest.schema.json beside this file
`kept()`     the last one, where nothing has changed
`is_disturbed()`  whether times in it are not to be trusted
`publish()`  copies the figures and the manifest of a complete report
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gnetlab
from gnetlab.report import claims, machine
from gnetlab.report.claims import jsonable
from gnetlab.report.plan import GOOD, Job, ReportError, notebooks_folder

FIGURE_FILES = ("png", "svg", "pdf", "csv", "tex", "call.zip")  # the last draws it again
SCHEMA = 2
BUSY = 0.1  # share of the cores; those of an idle machine took 0.01


def make(
    jobs: list[Job], output: Path, command: str, started: datetime.datetime, seconds: float
) -> dict[str, Any]:
    """The manifest of what was run."""
    entries = [
        {
            "name": job.name,
            "notebook": job.notebook,
            "title": job.title,
            "status": job.status,
            "reason": job.reason,
            "error": job.error,
            "started": job.started,
            "seconds": round(job.seconds, 1),
            "peak_bytes": job.peak_bytes,
            "other_load": job.other_load and round(job.other_load, 3),
            "parameters": {**job.parameters, **job.defaults},
            "grid": job.grid,
            "facts": job.facts,
            "inputs": job.inputs,
            "folder": job.folder.relative_to(output).as_posix() if job.folder else None,
            "figures": figures_of(job.folder) if job.status in GOOD and job.folder else [],
        }
        for job in jobs
    ]
    versions = machine.versions()
    return {
        "schema": SCHEMA,
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "gnetlab": gnetlab.__version__,
        "git": _git(jobs[0].source.parent if jobs else Path()),
        "python": versions.pop("python"),
        "system": machine.describe(),
        "packages": versions,
        "notebooks": entries,
        "claims": _claims(jobs),
    }


def _claims(jobs: list[Job]) -> list[dict[str, Any]]:
    """Every claim in order, once per run of the notebook that measures it."""
    runs: dict[str, list[Job]] = {}
    for job in jobs:
        runs.setdefault(job.notebook, []).append(job)
    most = max((len(of_notebook) for of_notebook in runs.values()), default=1)
    rows: list[dict[str, Any]] = []
    for number in range(most):
        round_of = {n: of[number] for n, of in runs.items() if number < len(of)}
        folders = {n: job.folder if job.status in GOOD else None for n, job in round_of.items()}
        cancelled = [n for n, job in round_of.items() if job.status == "cancelled"]
        for row in claims.collect(folders, cancelled):
            job = round_of.get(row["notebook"])
            if job or number == 0:
                rows.append({**row, "run": job.name if job else None})
    order = list(claims.CLAIMS)
    return sorted(rows, key=lambda row: order.index(row["id"]))


def kept(jobs: list[Job], output: Path) -> dict[str, Any] | None:
    """The last manifest, where nothing was run and it is of the same notebooks: it stays true."""
    if any(job.status != "cached" for job in jobs):
        return None
    try:
        last = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
        entries = [
            [n["name"], n["status"] in GOOD, n["parameters"], n["started"]]
            for n in last["notebooks"]
        ]
        right = last["schema"] == SCHEMA
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # When they were begun, too: a manifest that could not be written leaves the one before.
    asked = [[job.name, True, {**job.parameters, **job.defaults}, job.started] for job in jobs]
    asked = json.loads(without_home(json.dumps(jsonable(asked, str))))
    return last if right and entries == asked else None


def is_disturbed(entry: Mapping[str, Any]) -> bool:
    """Whether a notebook measured times while others took more than `BUSY` of the cores."""
    measures_times = any(figure.get("timing") for figure in entry.get("figures") or [])
    return measures_times and (entry.get("other_load") or 0) > BUSY


def figures_of(folder: Path) -> list[dict[str, Any]]:
    """Saved figures of a notebook's folder: name, alt text, and files with their SHA-256."""
    from PIL import Image

    figures = []
    for png in sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns):
        try:
            with Image.open(png) as image:
                about, size = image.info, image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            about, size = {}, None  # no picture, or a huge one; the file is there all the same
        files = {
            kind: {"path": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for kind in FIGURE_FILES
            if (path := png.with_suffix(f".{kind}")).is_file()
        }
        figures.append({
            "name": png.stem, "alt": about.get("Description", ""), "data": about.get("Data", ""),
            "pixels": size and list(size),
            "timing": about.get("Timing") == "yes", "files": files,
        })  # fmt: skip
    return figures


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


def without_home(text: str) -> str:
    """`text` with the user's home folder written as ~: a report is sent on."""
    home = Path.home()
    # As it is called, and where it lies, if that is a link; Windows' backslashes double in JSON.
    folders = {str(folder) for folder in (home, home.resolve()) if len(folder.parts) > 1}
    written = folders | {json.dumps(folder)[1:-1] for folder in folders}
    if not written:
        return text
    longest_first = "|".join(map(re.escape, sorted(written, key=len, reverse=True)))
    return re.sub(rf"{_BEGINS}(?:{longest_first})(?![\w.-])", "~", text)


# A path begins here and goes not on: after none of its characters, unless these are an escaped
# line's end or tab, a terminal's colour, a compiler's flag or a URL's scheme.
_BEGINS = r"(?:(?<![\w.~/-])|(?<=\\[nrt])|(?<=[\[;\d]m)|(?<=-[IL])|(?<=file://))"


def write(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    part = path.with_name(f".part-{path.name}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def publish(manifest: Mapping[str, Any], output: Path, target: Path) -> list[Path]:
    """Copy every figure's files and the manifest to `target`, replacing what is there at once.

    Raises ReportError unless all notebooks there are were run, once each, and are done; or if two
    have figures of one name, or `target` holds something else than published figures.
    """
    entries = manifest["notebooks"]
    run_here = {entry["notebook"] for entry in entries if entry["status"] in GOOD}
    lacking = sorted({path.stem for path in notebooks_folder().glob("*.ipynb")} - run_here)
    if lacking:
        raise ReportError(
            f"--publish needs every notebook done; lacking: {', '.join(lacking)}. Name none, so "
            "that all are run"
        )
    if any(entry["grid"] for entry in entries):
        raise ReportError("--publish takes one run of each notebook; leave --grid out")
    shown: dict[str, str] = {}
    for entry in entries:
        for figure in entry["figures"]:
            first = shown.setdefault(figure["name"], entry["name"])
            if first != entry["name"]:
                raise ReportError(
                    f"--publish puts all figures into one folder, but {first} and {entry['name']} "
                    f"both have a figure {figure['name']}; give one another name"
                )
    if target.is_dir() and any(target.iterdir()) and not (target / "manifest.json").is_file():
        raise ReportError(f"{target} holds no published figures (no manifest.json); move it away")
    part = target.with_name(f".part-{target.name}")
    remove(part)
    part.mkdir(parents=True)
    copied = []
    for entry in entries:
        for figure in entry["figures"]:
            for file in figure["files"].values():
                shutil.copy2(output / entry["folder"] / file["path"], part)
                copied.append(target / file["path"])
    shutil.copy2(output / "manifest.json", part)
    replace(part, target)
    return copied


def replace(part: Path, target: Path) -> None:
    """Put a folder in the place of another; a reader finds the old one or the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        os.replace(part, target)
    elif _exchange(part, target):
        remove(part)
    else:
        old = target.with_name(f".old-{target.name}")
        remove(old)
        os.replace(target, old)
        os.replace(part, target)
        remove(old)


def remove(path: Path) -> None:
    """Remove a folder, a file or a link (not what it leads to), as far as that can be done."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    at_here, exchange = -100, 2
    try:
        names = os.fsencode(one.absolute()), os.fsencode(other.absolute())
        return ctypes.CDLL(None).renameat2(at_here, names[0], at_here, names[1], exchange) == 0
    except (AttributeError, TypeError, OSError):  # not Linux, or an old one
        return False
