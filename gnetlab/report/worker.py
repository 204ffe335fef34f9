"""One notebook in a process of its own, with everything that it starts.

`start()`   begin to execute; events come through a pipe
`end()`     kill whatever bears a mark: kernel, its children, and theirs

A kernel lives in a session of its own, and so may what a cell starts: neither a process group nor
a parent says what belongs to a notebook. All of them inherit the environment, so a mark in it does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

MARK = "GNETLAB_NOTEBOOK"
LOG = "log.txt"  # beside a notebook that failed


class Worker(NamedTuple):
    """`events` gives {"cell": number} as cells start, and at the end {"error": text, ...}."""

    process: Any
    events: Connection
    mark: str


def start(
    source: Path, executed: Path, parameters: dict[str, Any], environment: dict[str, str]
) -> Worker:
    """Execute `source` into `executed`, in its folder, with these variables set for the kernel."""
    mark = uuid.uuid4().hex
    ours, theirs = _context().Pipe(duplex=False)
    work = (theirs, str(source), str(executed), parameters, {**environment, MARK: mark})
    process = _context().Process(target=_execute, args=work, daemon=False)
    process.start()
    theirs.close()
    return Worker(process, ours, mark)


def _context() -> Any:
    """Workers are forked from a process that has papermill loaded already, where there is fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["papermill", "nbclient", "gnetlab.report.worker"])
    return context


def end(worker: Worker) -> None:
    """Kill the worker and all that its notebook started; returns when they are gone."""
    worker.process.kill()
    worker.process.join()
    _sweep(worker.mark)
    worker.events.close()


def _sweep(mark: str) -> None:
    import psutil

    for _ in range(20):  # one that was just being started is found the next time
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                    process.kill()
                    found.append(process)
        if not found:
            return
        psutil.wait_procs(found, timeout=1)


def _execute(
    events: Connection, source: str, executed: str, parameters: dict, environment: dict[str, str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the one who started it decides
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, args=(environment[MARK],), daemon=True).start()
    os.chdir(Path(executed).parent)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT)  # what a dying kernel says, and much else
    for stream in (1, 2):
        os.dup2(log, stream)
    import papermill

    def on_cell(**event: Any) -> None:
        events.send({"cell": event["cell_index"] + 1})

    error = ""
    try:
        papermill.execute_notebook(
            source,
            executed,
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            on_cell_start=on_cell,
            extra_arguments=["--log-level=ERROR"],  # of the kernel: it warns about its sockets
        )
    except Exception as raised:  # whatever it is, it is the notebook's
        error = _cause(raised)
    events.send({"error": error, "peak_bytes": _peak_of_children()})


def _peak_of_children() -> int | None:
    """Bytes of the largest child that has ended, the kernel as a rule."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def _cause(error: Exception) -> str:
    if type(error).__name__ == "PapermillExecutionError":
        return f"{error.ename}: {error.evalue}"
    return f"{type(error).__name__}: {str(error)[:500]}"


def _end_with_parent(mark: str) -> None:
    multiprocessing.parent_process().join()
    _sweep(mark)
    os._exit(1)
