"""A notebook as a Dask task: the half of `gnetlab.report.cluster` that runs on the workers.

`versions()`, `about()`  what must be the same there as here, and whether a worker is
`execute()`  the task: it has a notebook executed, and returns its folder as bytes
`pack()`, `unpack()`  a folder as bytes

The notebook hangs on a process of its own, `_attend`: Dask's workers may have no children by
multiprocessing, and may be killed. That process ends when its input does.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ONE_AT_A_TIME = threading.Lock()  # of each worker: notebooks that measure times do not share it


def versions() -> dict[str, str]:
    """What must be the same on all workers: gnetlab's source, Python, packages."""
    from gnetlab.report import cache, machine

    return {"gnetlab's source": cache._source()[:12], **machine.versions()}


def about(asked: dict[str, str], dask_worker: Any) -> tuple[str, bool]:
    """How a worker differs from the versions asked for, if it does; whether it offers a GPU."""
    there = versions()
    differ = [name for name in asked if there.get(name) != asked[name]]
    text = "; ".join(f"{name} {there.get(name)}, here {asked[name]}" for name in differ)
    return text, "GPU" in dask_worker.state.total_resources


def execute(key: str, topic: str, order: bytes) -> dict[str, Any] | None:
    """Have a notebook executed; None if that is no longer wanted.

    Returns its last event as `result` or else `why` there is none, and `folder`, packed.
    """
    import distributed

    worker, work = distributed.get_worker(), pickle.loads(order)
    distributed.secede()  # its thread is then free for the runs that the notebook sends

    def is_wanted() -> bool:
        """Not cancelled, its client is there, and the worker stays."""
        task = worker.state.tasks.get(key)
        running = task is not None and task.state in ("executing", "long-running")
        return running and worker.status.name not in ("closing", "closed", "failed")

    for name, path in work["needed"].items():
        if not Path(path).exists():
            error = (
                f"parameter {name}: worker {worker.address} has no {path}, and only single files "
                "that are not large are sent along; copy it there, or to a disk that all share"
            )
            return {"result": {"error": error}}
    names = ("GNETLAB_CORES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    threads = dict.fromkeys(names, str(worker.state.nthreads))  # Dask's nanny has set 1
    work["environment"] |= {**threads, "GNETLAB_SCHEDULER": worker.scheduler.address}
    work["scratch"] = worker.local_directory
    while not _ONE_AT_A_TIME.acquire(timeout=0.5):
        if not is_wanted():
            return None
    try:
        worker.log_event(topic, {"key": key})  # it has begun
        return _attended(
            work, is_wanted, lambda event: worker.log_event(topic, event | {"key": key})
        )
    finally:
        _ONE_AT_A_TIME.release()


def _attended(
    work: dict[str, Any], is_wanted: Callable[[], bool], say: Callable[[dict], None]
) -> dict[str, Any]:
    command = [sys.executable, "-c", f"from {__name__} import _attend; _attend()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    done = threading.Event()

    def watch() -> None:
        while is_wanted():
            if done.wait(0.5):
                break
        with contextlib.suppress(OSError):
            process.stdin.close()

    with process:
        try:
            pickle.dump(work, process.stdin)
            process.stdin.flush()
            threading.Thread(target=watch, daemon=True).start()
            while "folder" not in (event := pickle.load(process.stdout)):
                say(event)
            return event
        except (EOFError, OSError, pickle.UnpicklingError):
            return {"why": f"the process that attends to it ended with {process.wait()}"}
        finally:
            done.set()


def _attend() -> None:
    """Execute the notebook that comes by stdin; events, and the folder at last, go to stdout."""
    from gnetlab.report import worker

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the one who waits for it decides
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    work, gone = pickle.load(sys.stdin.buffer), threading.Event()
    threading.Thread(target=lambda: os.read(0, 1) or gone.set(), daemon=True).start()

    def say(event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            pickle.dump(event, out)
            out.flush()

    with tempfile.TemporaryDirectory(prefix="gnetlab-", dir=work["scratch"]) as top:
        source, folder = Path(top) / f"{work['name']}.ipynb", Path(top) / "notebook"
        folder.mkdir()
        for name, content in {source.name: work["source"], **work["files"]}.items():
            path = Path(top) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        late_at = time.monotonic() + (work["timeout"] or float("inf"))
        result, why = None, ""
        executed, parameters = folder / source.name, work["parameters"]
        handle = worker.start(source, executed, parameters, work["environment"])
        try:
            while not (result or why or gone.is_set() or time.monotonic() > late_at):
                multiprocessing.connection.wait(handle.waitables, timeout=0.2)
                why = handle.ended()
                for event in handle.read():
                    if "error" in event:
                        result = event
                    else:
                        say(event)
        finally:
            handle.end()
        say({"result": result, "why": why, "folder": pack(folder)})


def pack(folder: Path) -> bytes:
    """A folder's files, with their times: a report shows figures in the order they were made."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", dereference=True) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(folder).as_posix())
    return packed.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Write a packed folder's files; raises tarfile.FilterError for what would lie elsewhere."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(folder, filter="data")
