"""Notebooks on a Dask cluster: sent as bytes, and their folders come back as bytes.

`Cluster`  a place for `runner.run`; no disk need be shared

A worker executes one notebook at a time, with as many cores as the worker has threads. What is done
there is in `gnetlab.report.task`.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import pickle
import tarfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from gnetlab.report import task
from gnetlab.report.plan import Job, ReportError, named_path

# Seconds for the cluster to answer, for a first worker to come, for what is late; as long as Dask's
# own processes wait for each other.
PATIENCE = 30
LARGEST = 200_000_000  # bytes of a parameter's file that is sent along
_ATTEMPTS = 3
_KEY = "gnetlab-notebook"  # begins the keys of tasks


class Cluster:
    """The Dask cluster at an address, for these jobs; to be entered.

    workers   notebooks in flight at a time (None: as many as the cluster has workers)

    Entering raises ReportError if the cluster does not answer, has no worker, lacks a GPU that is
    asked for, or if a worker has another gnetlab, or other packages, than this process.
    """

    def __init__(self, address: str, jobs: list[Job], workers: int | None = None) -> None:
        self.address, self.jobs, self.workers = address, jobs, workers or 0
        self.topic = f"gnetlab-{uuid.uuid4().hex}"
        self.remotes: dict[str, Remote] = {}  # by the keys of their tasks
        self.load: collections.Counter[str | None] = collections.Counter()  # notebooks per worker
        self._known, self._lock = {}, threading.Lock()

    def __enter__(self) -> Cluster:
        try:
            import dask
            from distributed import Client
        except ImportError as error:
            raise ReportError(
                f"--scheduler {self.address} asked, but distributed is not installed here; "
                "pip install 'gnetlab[cluster]'"
            ) from error
        # a notebook and its files are one message
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 GB"})
        try:
            self.client = Client(self.address, timeout=PATIENCE, set_as_default=False)
        except Exception as error:  # of many kinds
            raise ReportError(
                f"--scheduler {self.address} asked, but no Dask scheduler answers there ({error}); "
                "start one (dask scheduler), and give the address that it prints"
            ) from error
        try:
            self._check()
            self.client.subscribe_topic(self.topic, self._hear)
        except BaseException:
            self.client.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    def _check(self) -> None:
        with contextlib.suppress(TimeoutError):
            self.client.wait_for_workers(1, timeout=PATIENCE)
        if not (found := self._look()):
            raise ReportError(
                f"--scheduler {self.address} asked, but no worker is there; start some: "
                f"dask worker {self.address}"
            )
        for address, (differs, _) in found.items():
            if differs:
                raise ReportError(
                    f"worker {address} of the cluster at {self.address} differs from here: "
                    f"{differs}. Install the same gnetlab and packages there, and start it again"
                )
        self.gpus = any(gpu for _, gpu in found.values())
        devices = [str(job.parameters.get("device")) for job in self.jobs]
        asked = next((device for device in devices if device.startswith("cuda")), None)
        if asked and not self.gpus:
            raise ReportError(
                f"--device {asked} asked, but no worker at {self.address} offers a GPU; start one "
                "per GPU, with its CUDA_VISIBLE_DEVICES and --resources GPU=1"
            )
        self.workers = self.workers or len(found)

    def _look(self) -> dict[str, tuple[str, bool]]:
        """The workers: how each differs from here, "" if it does not, and whether it has a GPU."""
        there = self.client.nthreads()
        self._known = {address: known for address, known in self._known.items() if address in there}
        new = [address for address in there if address not in self._known]
        here, run = task.versions(), self.client.run
        answers = run(task.about, here, workers=new, on_error="return") if new else {}
        for address, answer in answers.items():
            if isinstance(answer, OSError):  # it has just gone
                continue
            if isinstance(answer, Exception):
                answer = f"{type(answer).__name__}: {answer}", False
            self._known[address] = answer
        return self._known

    def threads(self, job: Job) -> str:  # noqa: ARG002
        """Those of a worker, which is not known before the notebook is sent."""
        return "a cluster's"

    def prepare(self, notebooks: int) -> None:
        """Nothing: the workers are there."""

    def start(
        self, job: Job, part: Path, environment: dict[str, str], timeout: float | None
    ) -> Remote:
        """Send a notebook, and the files that its parameters name; larger ones must be there."""
        parameters, files, needed = {**job.parameters, "output_dir": "."}, {}, {}
        for name, value in job.parameters.items():
            kind, text = named_path(value) if isinstance(value, str) else ("", "")
            path = Path(text)
            if not path.is_absolute() or not path.exists():
                continue
            if path.is_file() and path.stat().st_size <= LARGEST:
                files[f"inputs/{name}/{path.name}"] = path.read_bytes()
                parameters[name] = f"{kind}../inputs/{name}/{path.name}"
            else:
                needed[name] = text
        order = {
            "name": job.notebook, "source": job.source.read_bytes(), "parameters": parameters,
            "environment": environment, "timeout": timeout, "files": files, "needed": needed,
        }  # fmt: skip
        wants_gpu = self.gpus and job.parameters.get("device") != "cpu"
        return Remote(self, pickle.dumps(order), wants_gpu, part, timeout)

    def choose(self, wants_gpu: bool) -> str | None:
        """The one with the fewest notebooks: Dask does not count tasks that have left its pool."""
        with self._lock:
            workers, busy = self._look().items(), self.client.processing()
            fit = [name for name, (differs, gpu) in workers if not differs and gpu >= wants_gpu]
            others = {name: str(busy.get(name, ())).count(_KEY) for name in fit}
            chosen = min(fit, key=lambda name: (self.load[name], others[name]), default=None)
            self.load[chosen] += 1
        return chosen

    def _hear(self, event: tuple[float, dict[str, Any]]) -> None:
        message = dict(event[1])
        if remote := self.remotes.get(message.pop("key")):
            remote.say(message)


class Remote:
    """A notebook on the cluster, as `runner.Handle`."""

    def __init__(
        self, cluster: Cluster, order: bytes, wants_gpu: bool, part: Path, timeout: float | None
    ) -> None:
        self._cluster, self._order, self._wants_gpu = cluster, order, wants_gpu
        self._part, self._timeout, self._late_at = part, timeout, float("inf")
        self._outcome: dict[str, Any] = {}
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._events, self._ours = multiprocessing.Pipe(duplex=False)
        self._thread = threading.Thread(target=self._see_through, daemon=True)
        self._thread.start()

    @property
    def waitables(self) -> list[Any]:
        """What `multiprocessing.connection.wait` finds ready when there is something to read."""
        return [self._events]

    def say(self, event: dict[str, Any]) -> None:
        """Pass an event on to who reads."""
        with self._lock, contextlib.suppress(OSError):  # it is closed
            self._ours.send(event)

    def ended(self) -> str:
        """Why there will be no more events; empty while there may be."""
        return self._outcome.get("why", "")

    def read(self) -> list[dict[str, Any]]:
        """The events since the last time; before the last one the folder is unpacked."""
        found = []
        while self._events.poll():
            found.append(self._events.recv())
            if self._timeout and self._late_at == float("inf"):
                self._late_at = time.monotonic() + self._timeout
        if packed := self._outcome.pop("folder", None):
            try:
                task.unpack(packed, self._part)
            except (OSError, tarfile.TarError) as error:
                text = f"its results could not be kept: {error}"
                self._outcome["result"] = {"error": text}
        result = self._outcome.pop("result", None)
        return [*found, result] if result else found

    def end(self) -> None:
        """Have it ended there, within seconds; one that took too long brings back what it has."""
        if time.monotonic() > self._late_at:
            self._thread.join(PATIENCE)
            self.read()
        self._stop.set()
        self._thread.join(PATIENCE)
        with self._lock:
            self._ours.close()
        self._events.close()

    def _see_through(self) -> None:
        try:
            self._outcome = self._attempts()
        except BaseException as error:  # of many kinds, when the scheduler is lost
            text = f"the cluster at {self._cluster.address} failed: {type(error).__name__}: {error}"
            self._outcome = {"result": {"error": text}}
        self.say({})

    def _attempts(self) -> dict[str, Any]:
        for _ in range(_ATTEMPTS):
            while not (address := self._cluster.choose(self._wants_gpu)):
                if self._stop.wait(1):  # all workers are gone; others may come
                    return {}
            outcome = self._attempt(address)
            if outcome is not None:
                return outcome
        return {"why": f"{_ATTEMPTS} workers ended while they executed it"}

    def _attempt(self, address: str) -> dict[str, Any] | None:
        """What came of it on this worker, and nowhere else; None if the worker is gone."""
        from distributed import KilledWorker

        client, key = self._cluster.client, f"{_KEY}-{uuid.uuid4().hex}"
        self._cluster.remotes[key] = self
        future = client.submit(
            task.execute, key, self._cluster.topic, self._order, key=key, workers=[address],
            resources={"GPU": 1} if self._wants_gpu else None,
        )  # fmt: skip
        try:
            while not self._stop.is_set():
                try:
                    return future.result(timeout=0.5)
                except KilledWorker as error:
                    return {"why": f"its workers ended: {error}"}
                except TimeoutError:
                    with contextlib.suppress(OSError):  # if the scheduler is lost, so is the future
                        if address not in client.nthreads():
                            return None
            return {}
        finally:
            del self._cluster.remotes[key]
            self._cluster.load[address] -= 1
            future.cancel()
