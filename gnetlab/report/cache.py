"""Which notebooks need not run again: those for which nothing that they depend on has changed.

`restore()`  a job's last result, if it still holds; else why the job has to run
`keep()`     note what a result depends on, beside it

A result depends on the notebook's cells, its parameters, gnetlab's source, the versions of
packages, the devices, and the files that parameters name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

import gnetlab

if TYPE_CHECKING:
    from gnetlab.report.runner import Job

RECORD = "run.json"


def restore(job: Job, output: Path, force: bool) -> None:
    """Make `job` "cached", with its last result, or say in `reason` why it runs."""
    folder = output / job.name
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        job.reason = "forced" if force else _difference(record, job, folder)
    except FileNotFoundError:
        job.reason = "no result yet"
    except (ValueError, KeyError, TypeError):
        job.reason = f"{RECORD} of the last result cannot be read"
    if not job.reason:
        job.reason, job.status, job.folder = "nothing changed", "cached", folder
        job.cell, job.seconds, job.facts = job.cells, record["seconds"], record["facts"]
        job.peak_bytes = record["peak_bytes"]


def keep(job: Job) -> None:
    """Write what the result in the job's folder depends on, and its files' hashes."""
    record = {
        "key": _key(job), "seconds": job.seconds, "facts": job.facts, "peak_bytes": job.peak_bytes,
        "files": _hashes(job.folder),
    }  # fmt: skip
    text = json.dumps(record, indent=1, default=str) + "\n"
    (job.folder / RECORD).write_text(text, encoding="utf-8")


def _difference(record: dict[str, Any], job: Job, folder: Path) -> str:
    old, new = record["key"], json.loads(json.dumps(_key(job), default=str))
    for part, value in new.items():
        before = old[part]
        if before == value:
            continue
        if isinstance(value, dict):
            changed = [
                f"{name} {before.get(name, 'absent')} → {value.get(name, 'absent')}"
                for name in {**before, **value}
                if before.get(name) != value.get(name)
            ]
            return f"{part} changed: {', '.join(changed)}"
        return f"{part} changed"
    files = _hashes(folder)
    lost = [name for name, digest in record["files"].items() if files.get(name) != digest]
    return f"result changed or lost: {', '.join(lost)}" if lost else ""


def _key(job: Job) -> dict[str, Any]:
    cells = nbformat.read(job.source, as_version=4).cells
    parameters = {**job.defaults, **job.parameters}
    return {
        "cells": _digest("\0".join(f"{cell.cell_type}\0{cell.source}" for cell in cells).encode()),
        "parameters": parameters,
        "source of gnetlab": _source(),
        "packages": _versions(),
        "devices": _devices(),
        "inputs": _inputs(parameters),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@functools.cache
def _source() -> str:
    folder = Path(gnetlab.__file__).parent
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    names = [f"{path.relative_to(folder)} {_digest(path.read_bytes())}" for path in files]
    return _digest("\n".join(names).encode())


def _versions() -> dict[str, str]:
    from gnetlab.report.runner import PACKAGES

    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}


@functools.cache
def _devices() -> str:
    """The machine's kind and its GPUs, without loading torch."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
        gpus = listed.stdout if listed.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        gpus = ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    return _digest(f"{platform.machine()} {os.cpu_count()} {gpus} {visible}".encode())[:16]


def _inputs(parameters: dict[str, Any]) -> dict[str, str]:
    """Digests of the files that parameters name, and of ImageNet weights where they may be used."""
    inputs = {}
    for name, value in parameters.items():
        path = Path(str(value).rpartition(":")[2]) if isinstance(value, str) and value else None
        if path and path.is_absolute() and path.is_file():
            inputs[name] = _digest(path.read_bytes())
        elif path and path.is_absolute() and path.is_dir():
            inputs[name] = _digest("\n".join(_listing(path)).encode())
    if parameters.get("weights") in ("auto", "imagenet"):
        home = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser()
        found = (home / "hub" / "checkpoints").glob("googlenet-*.pth")
        inputs["ImageNet weights"] = ", ".join(sorted(p.name for p in found)) or "none"
    return inputs


def _listing(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    return [f"{p.relative_to(folder)} {s.st_size} {s.st_mtime_ns}" for p, s in stats]


def _hashes(folder: Path) -> dict[str, str]:
    """Of what a notebook left in its folder; the page beside it can be made again."""
    return {
        str(path.relative_to(folder)): _digest(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD and path.suffix != ".html"
    }
