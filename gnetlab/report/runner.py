"""Notebooks through papermill: execute, keep what is good, say what happened.

`run()`  executes what has changed, each notebook in a process of its own; returns the manifest

A notebook is "done" only if every code cell ran and none raised: papermill's own word is not
taken for it (it reports success after `sys.exit(0)`). A notebook's folder appears under its name
only when it is complete; a failed one goes to failed/, and the last good one stays.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing.connection
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gnetlab.report import cache, machine, manifest, worker
from gnetlab.report.claims import jsonable
from gnetlab.report.executed import normalize, shortened, unfinished
from gnetlab.report.plan import Job, ReportError

Progress = Callable[[Job], None]
_LONGEST_ERROR = 10_000  # characters; the notebook has more


class ReportFailed(ReportError):
    """Notebooks were run, but the report could not be written; what is complete is kept."""


class Handle(Protocol):
    """A notebook being executed, here (`worker.Worker`) or elsewhere (`cluster.Remote`)."""

    @property
    def waitables(self) -> list[Any]: ...
    def read(self) -> list[dict[str, Any]]: ...
    def ended(self) -> str: ...
    def end(self) -> None: ...


class Place(Protocol):
    """Where notebooks are executed: so many at a time."""

    workers: int

    def threads(self, job: Job) -> str: ...
    def prepare(self, notebooks: int) -> None: ...
    def start(
        self, job: Job, part: Path, environment: dict[str, str], timeout: float | None
    ) -> Handle: ...


class Here:
    """This machine; its cores are shared out, and its GPUs, if there are any."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def threads(self, job: Job) -> str:
        """How many a notebook computes with; sums differ in their last digits with it."""
        if self.workers > 1 and not job.alone:
            return str(max(1, machine.available_cores() // self.workers))
        return os.environ.get("OMP_NUM_THREADS", str(machine.available_cores()))

    def prepare(self, notebooks: int) -> None:
        worker.prepare(notebooks)

    def start(
        self, job: Job, part: Path, environment: dict[str, str], timeout: float | None
    ) -> Handle:
        del timeout  # the runner watches it
        if self.workers > 1 and not job.alone:
            threads = self.threads(job)
            environment = {**environment, "GNETLAB_CORES": threads, "OMP_NUM_THREADS": threads}
        parameters = {**job.parameters, "output_dir": "."}
        return worker.start(job.source, part / f"{job.notebook}.ipynb", parameters, environment)


def run(
    jobs: list[Job],
    output: Path,
    *,
    command: str = "",
    progress: Progress = lambda _job: None,
    workers: int = 1,
    timeout: float | None = None,
    force: bool = False,
    place: Place | None = None,
    pages: Callable[[dict[str, Any]], object] = lambda _manifest: None,
) -> dict[str, Any]:
    """Execute the jobs into `output`, so many at a time; a failed one does not stop the others.

    workers   notebooks at a time; their kernels share the cores out
    timeout   seconds that a notebook may take, whatever its cells do (None: no limit)
    force     run those whose results are here and still hold, too, and every run of a study
    place     where, if not on this machine (then it says how many workers there are)
    pages     writes the report's pages from the manifest, before another run may write there

    Returns the manifest, which is also written to `output`/manifest.json. `progress` is called
    whenever a job changes. After a KeyboardInterrupt all processes of the notebooks are gone, the
    running and the remaining jobs are "cancelled", and the manifest is still returned.

    Raises ReportError if `output` cannot be written, holds something else than a report, or
    another run is writing there; ReportFailed if it cannot be written later on.
    """
    from filelock import FileLock, Timeout

    _check_output(output, jobs)
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
    started, begun, place = _now(), time.monotonic(), place or Here(workers)
    try:
        for part in output.glob(".part-*"):  # of a run that was killed
            manifest.remove(part)
        for job in jobs:
            if job.status == "queued":
                cache.restore(job, output, force, place.threads(job))
            if job.status != "queued":
                progress(job)
        queued = [job for job in jobs if job.status == "queued"]
        if queued:
            place.prepare(len(queued))
            _Run(output, progress, place, timeout, force).all(queued)
        kept = manifest.kept(jobs, output)
        if kept:
            pages(kept)
            return kept
        made = manifest.make(jobs, output, command, started, time.monotonic() - begun)
        text = json.dumps(jsonable(made, str), indent=1, ensure_ascii=False) + "\n"
        text = manifest.without_home(text)
        manifest.write(output / "manifest.json", text)
        (output / "report.pdf").unlink(missing_ok=True)  # of the last manifest
        pages(written := json.loads(text))
        return written
    except OSError as error:
        raise ReportFailed(
            f"the report could not be written to {output}: {error}. Make room, or choose another "
            "--output, and run it again: notebooks that are done are not run again"
        ) from error
    finally:
        lock.release()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _check_output(output: Path, jobs: list[Job]) -> None:
    """Nothing may be replaced but an earlier report's own files."""
    for job in jobs:
        for folder, ours in (
            (output / job.name, cache.RECORD),
            (output / "failed" / job.name, f"{job.notebook}.ipynb"),
        ):
            inside = [other.source for other in jobs if folder.resolve() in other.source.parents]
            if inside:
                raise ReportError(
                    f"{inside[0]} lies in {folder}, which a result would replace; copy it "
                    "elsewhere, or choose another --output"
                )
            if folder.is_dir() and any(folder.iterdir()) and not (folder / ours).is_file():
                raise ReportError(
                    f"{folder} is not a result of an earlier report (it has no {ours}), and would "
                    "be replaced; move it, or choose another --output"
                )
    ours = (output / "manifest.json").is_file() or (output / ".lock").is_file()
    if (output / "index.html").exists() and not ours:
        raise ReportError(
            f"{output} holds an index.html that is not a report's; choose another --output"
        )


@dataclass
class _Slot:
    """A running job; `start` is None while it waits elsewhere."""

    job: Job
    part: Path
    handle: Handle
    gpu: str | None = None
    start: float | None = None
    result: dict[str, Any] | None = None


class _Run:
    """What is waiting and what is running."""

    def __init__(
        self, output: Path, progress: Progress, place: Place, timeout: float | None,
        force: bool = False,
    ) -> None:  # fmt: skip
        self.output, self.progress, self.place, self.timeout = output, progress, place, timeout
        self.force = force
        self.running: list[_Slot] = []
        self.gpus = [gpu["id"] for gpu in machine.gpus()] if isinstance(place, Here) else []
        self.free_gpus = list(self.gpus)

    def all(self, jobs: list[Job]) -> None:
        waiting = list(jobs)
        try:
            while waiting or self.running:
                while waiting and self.fits(waiting[0]):
                    self.begin(waiting.pop(0))
                watched = [ready for slot in self.running for ready in slot.handle.waitables]
                multiprocessing.connection.wait(watched, timeout=0.5)
                for slot in list(self.running):
                    self.look_at(slot)
        except BaseException as error:
            # Whatever it is: a worker that is left would keep this process from ever ending.
            for slot in self.running:
                with contextlib.suppress(Exception):  # the others are to be ended all the same
                    slot.handle.end()
            for part in self.output.glob(".part-*"):
                manifest.remove(part)
            for job in jobs:
                if job.status in ("queued", "running"):
                    job.status, job.error = "cancelled", "interrupted"
            if not isinstance(error, KeyboardInterrupt):
                raise

    def fits(self, job: Job) -> bool:
        here = isinstance(self.place, Here)
        if here and (job.alone or any(slot.job.alone for slot in self.running)):
            return not self.running
        usable = self.usable(job)
        if usable and not set(usable) & set(self.free_gpus):
            return False
        return len(self.running) < self.place.workers

    def usable(self, job: Job) -> list[str]:
        """NVIDIA GPUs that would do for a job: any, or the one of its device's number."""
        kind, _, number = str(job.parameters.get("device")).partition(":")
        if kind in ("cpu", "mps"):
            return []
        return self.gpus[int(number) :][:1] if number.isdigit() else self.gpus

    def begin(self, job: Job) -> None:
        part = self.output / f".part-{job.name}"
        manifest.remove(part)
        job.started = _now().isoformat(timespec="seconds")
        environment = {
            "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not a user's own
            "GNETLAB_BATCH": "1",  # nobody is there to move a slider
            "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # what MPS lacks runs on the CPU
        }
        gpu = next((gpu for gpu in self.usable(job) if gpu in self.free_gpus), None)
        if gpu:
            self.free_gpus.remove(gpu)
        if gpu and ":" not in str(job.parameters.get("device")):  # its number counts all of them
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        try:
            part.mkdir()
            self.take_up(job, part)
            handle = self.place.start(job, part, environment, self.timeout)
        except OSError as error:
            job.status, job.error = "failed", f"could not be started: {error}"
            self.free_gpus += [gpu] if gpu else []
            self.progress(job)
            return
        slot = _Slot(job, part, handle, gpu)
        if isinstance(self.place, Here):
            slot.start, job.status = time.monotonic(), "running"
        self.running.append(slot)
        self.progress(job)

    def take_up(self, job: Job, part: Path) -> None:
        """Give a notebook the finished runs of its studies from when it failed or took too long.

        Each is a file whose name says of what; what does not fit any more is not read.
        """
        runs = self.output / "failed" / job.name / "runs"
        if runs.is_dir() and not self.force:
            shutil.copytree(runs, part / "runs", ignore=shutil.ignore_patterns(".*"))

    def look_at(self, slot: _Slot) -> None:
        job, handle = slot.job, slot.handle
        # Both asked before the events are read: what happened until then is among these, such as
        # the cell in which it is late.
        why, now = handle.ended(), time.monotonic()
        for event in handle.read():
            if slot.start is None:
                slot.start, job.status = now, "running"
                self.progress(job)
            if "error" in event:
                slot.result = event
            elif "cell" in event:
                job.cell = event["cell"]
                self.progress(job)
        if slot.start is not None:
            job.seconds = now - slot.start
        late = self.timeout is not None and job.seconds > self.timeout
        if not (slot.result or why or late):
            return
        handle.end()
        self.running.remove(slot)  # only now: if this is interrupted, it still is to be ended
        if slot.gpu:
            self.free_gpus.append(slot.gpu)
        try:
            self.finish(slot, why if not late else "")
        except (OSError, ValueError) as error:  # the disk is full, as a rule
            job.error = job.error or f"its results could not be kept: {error}"
            job.status = "failed" if job.status == "done" else job.status
            job.folder = None
            manifest.remove(slot.part)
        self.progress(job)

    def finish(self, slot: _Slot, why: str) -> None:
        """Decide what became of a job, and put its folder where it belongs."""
        job, part, result = slot.job, slot.part, slot.result
        executed = part / f"{job.notebook}.ipynb"
        if result is not None:
            job.peak_bytes, job.other_load = result.get("peak_bytes"), result.get("other_load")
            job.error = shortened(result["error"] or unfinished(executed), _LONGEST_ERROR)
            died = job.error.startswith("DeadKernelError")
            job.status = "died" if died else "failed" if job.error else "done"
        elif why:
            job.status, job.error = "died", f"{why}, in cell {job.cell}"
        else:
            job.status = "timeout"
            job.error = f"took longer than {self.timeout:g} s, in cell {job.cell}"
        if job.status == "died":
            job.error += " (out of memory?)"
        if job.status == "done":
            normalize(executed, job.source)
        else:
            try:
                normalize(executed, job.source)
            except (OSError, ValueError):  # never saved, or cut off: the disk is full
                shutil.rmtree(part)
                part.mkdir()
                shutil.copy(job.source, executed)
        facts = part / "facts.json"
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(facts.read_text(encoding="utf-8"))
            job.facts = kept if isinstance(kept, dict) else {}
        log = part / worker.LOG
        if job.status == "done":
            log.unlink(missing_ok=True)
            cache.keep(job, part)
            manifest.replace(part, self.output / job.name)
            job.folder = self.output / job.name
            manifest.remove(self.output / "failed" / job.name)
        else:
            with contextlib.suppress(OSError):
                manifest.write(log, manifest.without_home(log.read_text(errors="replace")))
            manifest.replace(part, self.output / "failed" / job.name)
            job.folder = self.output / "failed" / job.name
