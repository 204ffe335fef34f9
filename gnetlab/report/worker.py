"""One notebook in a process of its own, with everything that it starts.

`prepare()`  begin to load what notebooks import, for workers to be forked from
`start()`    begin to execute; what happens comes through a pipe
`Worker.end()`  kill the worker, the kernel, its children, and theirs

A kernel lives in a session of its own, and so may what a cell starts: neither a process group nor
a parent says what belongs to a notebook. What was executed bears a mark in its environment; what
was only forked is in the kernel's session; and the worker adopts what has lost its parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Half of the time that importing papermill takes goes into parsers of URIs, which only check
# JSON schemas that have some; a notebook's has none.
sys.modules.setdefault("rfc3987_syntax", None)

from gnetlab.report import kernel  # noqa: E402

try:
    import resource
except ImportError:  # Windows
    resource = None

MARK = "GNETLAB_NOTEBOOK"
_LARGE = 1_000_000  # bytes of a notebook that is not saved twice per cell
_PATIENCE = 600  # seconds for a kernel to start, and for a cell's last outputs to come
LOG = "log.txt"  # beside a notebook that failed
# Both must be there when Python starts, and matplotlib, in the process that is forked.
_FROM_THE_START = {
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


class Worker:
    """A notebook being executed; `events` gives {"cell": number}, at the end {"error": text, ...}.

    mark    in the environment of all that the notebook starts
    kernel  its process, once it is known
    """

    def __init__(self, process: Any, events: Connection, mark: str) -> None:
        self.process, self.events, self.mark, self.kernel = process, events, mark, None

    @property
    def waitables(self) -> list[Any]:
        """What `multiprocessing.connection.wait` finds ready when there is something to read."""
        return [self.events, self.process.sentinel]

    def ended(self) -> str:
        """Why there will be no more events; empty while there may be."""
        code = None if self.process.is_alive() else self.process.exitcode
        return "" if code is None else f"its process ended with {code}"

    def read(self) -> list[dict[str, Any]]:
        """The events since the last time."""
        found = []
        with contextlib.suppress(EOFError, OSError):  # the worker is gone
            while self.events.poll():
                event = self.events.recv()
                self.kernel = event.pop("kernel", self.kernel)
                found += [event] if event else []
        return found

    def end(self) -> None:
        """Kill the worker and all that its notebook started; returns when they are gone."""
        self.read()
        _sweep(self.mark, self.kernel, self.process.pid)
        self.process.kill()
        self.process.join()
        _sweep(self.mark, self.kernel, None)
        self.events.close()


def prepare(notebooks: int = 1) -> None:
    """Begin to load what notebooks import, in the background.

    For more than one notebook it pays to load all that most of them import, before the first.
    """
    context = _context(everything=notebooks > 1 and kernel.may_fork())
    if context.get_start_method() != "forkserver":
        return
    from multiprocessing import forkserver

    before = {name: os.environ.get(name) for name in _FROM_THE_START}
    os.environ.update(_FROM_THE_START)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _context(everything: bool = False) -> Any:
    """Workers are forked from a process that has loaded much already, where there is fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    modules = ["gnetlab.report.worker", "papermill", "nbclient", "ipykernel.kernelapp"]
    context.set_forkserver_preload(modules + ["gnetlab.report.preload"] * everything)
    return context


def start(
    source: Path, executed: Path, parameters: dict[str, Any], environment: dict[str, str]
) -> Worker:
    """Execute `source` into `executed`, in its folder, with these variables set for the kernel."""
    prepare()
    context, mark = _context(), uuid.uuid4().hex
    ours, theirs = context.Pipe(duplex=False)
    variables = {**_FROM_THE_START, **environment, MARK: mark}
    work = (theirs, str(source), str(executed), parameters, variables)
    process = context.Process(target=_execute, args=work, daemon=False)
    process.start()
    theirs.close()
    return Worker(process, ours, mark)


def _sweep(mark: str, kernel_pid: int | None, worker_pid: int | None) -> None:
    """Kill all that belongs to a notebook, except its worker."""
    import psutil

    def belongs(process: psutil.Process) -> bool:
        if process.pid in (os.getpid(), worker_pid):
            return False
        if kernel_pid and hasattr(os, "getsid"):
            with contextlib.suppress(OSError):
                if os.getsid(process.pid) == kernel_pid:
                    return True
        return process.environ().get(MARK) == mark

    for _ in range(20):  # one that was just being started is found the next time
        found = []
        if worker_pid:
            with contextlib.suppress(psutil.Error):
                found = psutil.Process(worker_pid).children(recursive=True)
        for pid in psutil.pids():  # `process_iter` may take a new process for an old one
            with contextlib.suppress(psutil.Error):
                if belongs(process := psutil.Process(pid)):
                    found.append(process)
        found = [p for p in found if p.is_running() and _status(p) != psutil.STATUS_ZOMBIE]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=0.5)


def _status(process: Any) -> str:
    import psutil

    try:
        return process.status()
    except psutil.Error:  # it is gone
        return psutil.STATUS_ZOMBIE


def _execute(
    events: Connection, source: str, executed: str, parameters: dict, environment: dict[str, str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the one who started it decides
    os.environ.update(environment)
    os.chdir(Path(executed).parent)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT)  # what a dying kernel says, and much else
    for stream in (1, 2):
        os.dup2(log, stream)
    options: dict[str, Any] = {}
    forked = kernel.fork() if kernel.can_fork() else None  # while there is one thread
    if forked:
        events.send({"kernel": forked.pid})
        options["kernel_manager_class"] = kernel.manager(forked)
    kernel.adopt_orphans()
    end = (environment[MARK], forked.pid if forked else None)
    threading.Thread(target=_end_with_parent, args=end, daemon=True).start()
    import papermill

    from gnetlab.report import machine

    others = machine.OtherLoad()

    def on_cell(**event: Any) -> None:
        events.send({"cell": event["cell_index"] + 1})

    error = ""
    try:
        papermill.execute_notebook(
            source,
            executed,
            parameters=parameters,
            kernel_name="python3",
            engine_name=_engine(executed),
            progress_bar=False,
            on_cell_start=on_cell,
            # Far more than they take; on a busy machine the usual 60 and 4 s may not be enough,
            # and after the latter outputs would be lost without a word.
            start_timeout=_PATIENCE,
            iopub_timeout=_PATIENCE,
            extra_arguments=["--log-level=ERROR"],  # of the kernel: it warns about its sockets
            **options,
        )
    except Exception as raised:  # whatever it is, it is the notebook's
        error = _cause(raised)
    found = {"peak_bytes": _peak_of_children(), "other_load": others.share()}
    events.send({"error": error, **found})
    while True:  # until `Worker.end()`, as what the notebook left running is found through this
        time.sleep(3600)


def _engine(executed: str) -> str:
    """papermill's own engine; only that it saves whole files, and large ones less often.

    When a notebook is ended, papermill may just be saving that its kernel has died.
    """
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.iorw import LocalHandler, papermill_io

    from gnetlab.report import manifest

    class Whole(LocalHandler):
        def write(self, text: str, path: str) -> None:
            manifest.write(Path(path), text)

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            nb_man.save = _now_and_then(nb_man.save, nb_man.output_path)
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_io.register(executed, Whole())  # for all paths that begin so
    papermill_engines.register("gnetlab", Engine)
    return "gnetlab"


def _now_and_then(save: Callable[..., None], path: str) -> Callable[..., None]:
    """`save` to `path`; where that has become large, in at most a twentieth of the time."""
    due = 0.0

    def saved(**options: Any) -> None:
        nonlocal due
        begun = time.monotonic()
        if begun >= due:
            save(**options)
            ended = time.monotonic()
            is_large = os.path.getsize(path) > _LARGE
            due = ended + 20 * (ended - begun) if is_large else 0.0

    return saved


def _peak_of_children() -> int | None:
    """Bytes of the largest child that has ended, the kernel as a rule."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def _cause(error: Exception) -> str:
    if type(error).__name__ == "PapermillExecutionError":
        return f"{error.ename}: {error.evalue}"
    if type(error).__name__ == "NoSuchKernel":
        return f"{error}; is ipykernel installed in this environment? Try: pip install ipykernel"
    return f"{type(error).__name__}: {str(error)[:500]}"


def _end_with_parent(mark: str, kernel_pid: int | None) -> None:
    multiprocessing.parent_process().join()
    _sweep(mark, kernel_pid, os.getpid())
    os._exit(1)
