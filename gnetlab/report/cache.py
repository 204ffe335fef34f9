"""Which notebooks need not run again: those for which nothing that they depend on has changed.

`restore()`  a job's last result, if it still holds; else why the job has to run
`keep()`     note what a result depends on, beside it

A result depends on the notebook's cells, its parameters, gnetlab's source, the versions of
packages, the devices, the threads it computes with, and the files that parameters name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat

import gnetlab
from gnetlab.report import machine
from gnetlab.report.claims import jsonable
from gnetlab.report.manifest import without_home
from gnetlab.report.plan import Job, named_path

RECORD = "run.json"
DATA_FOLDERS = ("~/.cache/gnetlab", "/usr/share/datasets/fashion-mnist")  # of named data sets


def restore(job: Job, output: Path, force: bool, threads: str) -> None:
    """Make `job` "cached", with its last result, or say in `reason` why it runs."""
    folder = output / job.name
    # Of what is there before it runs: a later change is noticed next time.
    job.key = _key(job, threads)
    job.inputs = job.key["inputs"]
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        job.expected = record["seconds"]
        job.reason = "forced" if force else _difference(record, job.key, folder, job.notebook)
    except FileNotFoundError:
        job.reason = "first run"
    except (ValueError, KeyError, TypeError):
        job.reason = f"{RECORD} of the last result cannot be read"
    if not job.reason:
        job.reason, job.status, job.folder = "nothing changed", "cached", folder
        job.cell, job.seconds, job.facts = job.cells, record["seconds"], record["facts"]
        job.peak_bytes, job.started = record["peak_bytes"], record["started"]
        job.other_load = record.get("other_load")


def keep(job: Job, folder: Path) -> None:
    """Write what the result in `folder` depends on, and its files' hashes."""
    record = {
        "key": job.key, "started": job.started, "seconds": job.seconds, "facts": job.facts,
        "peak_bytes": job.peak_bytes, "other_load": job.other_load,
        "files": _hashes(folder, job.notebook),
    }  # fmt: skip
    text = json.dumps(jsonable(record, str), indent=1) + "\n"
    (folder / RECORD).write_text(without_home(text), encoding="utf-8")


def _difference(record: dict[str, Any], key: dict[str, Any], folder: Path, notebook: str) -> str:
    old, new = record["key"], json.loads(without_home(json.dumps(jsonable(key, str))))
    for part, value in new.items():
        before = old.get(part)
        if before == value:
            continue
        if isinstance(value, dict):
            changed = [
                f"{name} {before.get(name, 'absent')} → {value.get(name, 'absent')}"
                for name in {**before, **value}
                if before.get(name) != value.get(name)
            ]
            return f"{part} changed: {', '.join(changed)}"
        return f"{part} changed" + (f": {before} → {value}" if part == "threads" else "")
    files = _hashes(folder, notebook)
    lost = [name for name, digest in record["files"].items() if files.get(name) != digest]
    return f"result changed or lost: {', '.join(lost)}" if lost else ""


def _key(job: Job, threads: str) -> dict[str, Any]:
    cells = nbformat.read(job.source, as_version=4).cells
    parameters = {**job.defaults, **job.parameters}
    return {
        "cells": _digest("\0".join(map(_content, cells)).encode()),
        "parameters": parameters,
        "source of gnetlab": _source(),
        "packages": machine.versions(),
        "devices": _devices(),
        "threads": threads,
        "inputs": _inputs(parameters),
    }


def _content(cell: nbformat.NotebookNode) -> str:
    """What of a cell the result depends on or shows; pictures are attached to text."""
    attached = [json.dumps(cell.attachments, sort_keys=True)] if cell.get("attachments") else []
    return "\0".join([cell.cell_type, cell.source, *attached])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def _source() -> str:
    folder = Path(gnetlab.__file__).parent
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    names = [f"{path.relative_to(folder)} {_digest(path.read_bytes())}" for path in files]
    return _digest("\n".join(names).encode())


def _devices() -> str:
    """The machine's kind and its GPUs."""
    text = f"{platform.machine()} {os.cpu_count()} {machine.gpus()}"
    return _digest(text.encode())[:16]


def _inputs(parameters: dict[str, Any]) -> dict[str, str]:
    """Digests of files that parameters name, of data sets and ImageNet weights that may be used."""
    inputs = {}
    for name, text in _texts(parameters):
        path = Path(os.path.expanduser(named_path(text)[1]))
        if path.is_absolute() and path.is_file():
            inputs[name] = _digest(path.read_bytes())
        elif path.is_absolute() and path.is_dir():
            inputs[name] = _digest("\n".join(_listing(path)).encode())
    if parameters.get("data") not in (None, "photocrops"):  # those come with a package
        places = [Path(place).expanduser() for place in DATA_FOLDERS]
        listed = [line for place in places if place.is_dir() for line in _listing(place)]
        inputs["data sets"] = _digest("\n".join(listed).encode())
    if parameters.get("weights") in ("auto", "imagenet"):
        home = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser()
        found = (home / "hub" / "checkpoints").glob("googlenet-*.pth")
        lacking = "none" if os.environ.get("GNETLAB_OFFLINE") else "none, may be fetched"
        inputs["ImageNet weights"] = ", ".join(sorted(p.name for p in found)) or lacking
    return inputs


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested parameters, with a name: {"images": ["a"]} has images.0."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(inner, f"{name}.{key}" if name else str(key))


def _listing(folder: Path) -> list[str]:
    """Every file's name, size and time; folders that are links are gone into."""
    files = []
    for top, folders, names in os.walk(folder, followlinks=True):
        here, inner = Path(os.path.realpath(top)), [Path(top, name) for name in folders]
        # but for one that leads back to where it lies in
        folders[:] = [p.name for p in inner if not here.is_relative_to(os.path.realpath(p))]
        for path in (Path(top, name) for name in names):
            with contextlib.suppress(OSError):  # a broken link, or removed meanwhile
                files.append((path, path.stat()))
    files = [(path, found) for path, found in files if stat.S_ISREG(found.st_mode)]
    return [f"{p.relative_to(folder)} {s.st_size} {s.st_mtime_ns}" for p, s in sorted(files)]


def _hashes(folder: Path, notebook: str) -> dict[str, str]:
    """Of what a notebook left in its folder; its page can be made again."""
    ours = (folder / RECORD, folder / f"{notebook}.html")
    return {
        str(path.relative_to(folder)): _digest(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in ours
    }
