"""Notebooks and runs on a Dask cluster of two real worker processes, one of which offers a GPU."""

import contextlib
import io
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from test_faults import CHILD, hear_signals, late_once, odd, sleepers, until
from test_report import FIGURE, PARAMETERS, plan, write

from gnetlab.measure import training
from gnetlab.report import cache, cluster, machine, runner, task
from gnetlab.report.cluster import Cluster
from gnetlab.report.plan import ReportError

distributed = pytest.importorskip("distributed")

# Every notebook notes under which processes it ran, one of which is a worker of the cluster.
NOTE = """
import os, pathlib, psutil, time
note = pathlib.Path({note!r})
with note.open("a") as file:
    print(*(process.pid for process in psutil.Process().parents()), file=file)
"""
WAITS_ONCE = "while len(note.read_text().splitlines()) == 1: time.sleep(0.1)"
STUDY = """
import os
from gnetlab.measure.training import local_executor, study
pool = local_executor("cpu")
assert type(pool).__module__ == "gnetlab.measure.training", pool
pids = {pool.submit(os.getpid).result()}
study({"seed": [3, 4]}, folder="runs", device="cpu", executor=pool, progress=False, **TINY)
print("threads", os.environ["OMP_NUM_THREADS"], "here", os.getpid() in pids)
"""
TINY = {"size": 16, "width": 0.1, "batch_size": 4, "steps": 2}


@pytest.fixture(scope="module", autouse=True)
def patience():
    """A busy machine may need it; a test that waits for nobody asks for less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "PATIENCE", 300)
        yield


@pytest.fixture(scope="module")
def dask():
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=":0", silence_logs=logging.CRITICAL
    ) as started:
        started.new_spec["options"] = started.new_spec["options"] | {"resources": {"GPU": 1}}
        started.scale(2)
        yield started


@pytest.fixture(scope="module")
def client(dask):
    with distributed.Client(dask, set_as_default=False) as connected:
        connected.wait_for_workers(2)
        yield connected


def pids(client) -> dict[int, bool]:
    """The workers' processes, and whether each offers a GPU."""
    about = client.run(
        lambda dask_worker: (os.getpid(), "GPU" in dask_worker.state.total_resources),
        on_error="ignore",
    )
    return dict(about.values())


@pytest.fixture(scope="module")
def report(client, tmp_path_factory):
    """A report of five notebooks, two at a time; a worker is killed while it executes one."""
    root, workers = tmp_path_factory.mktemp("cluster"), []
    notes = {name: root / f"{name}.note" for name in ("killed", "good", "study", "raises")}
    note = {name: NOTE.format(note=str(path)) for name, path in notes.items()}
    (root / "picture.txt").write_text("a picture")
    (root / "gone").mkdir()
    given = PARAMETERS + "\n{} = ''"
    auto = plan([write(root / "study.ipynb", note["study"], f"TINY = {TINY}", STUDY)])
    auto[0].parameters["device"] = "auto"
    reads = "print(image, open(image).read())"
    jobs = [
        *plan([write(root / "killed.ipynb", note["killed"], WAITS_ONCE)]),
        *plan([write(root / "good.ipynb", note["good"], FIGURE.replace("line", "b"),
                     FIGURE.replace("line", "a"), reads, parameters=given.format("image"))],
              {"image": str(root / "picture.txt")}),
        *auto,
        *plan([write(root / "raises.ipynb", note["raises"], "1 / 0")]),
        *plan([write(root / "needs.ipynb", parameters=given.format("data"))],
              {"data": f"folder:{root / 'gone'}"}),
    ]  # fmt: skip
    seen = []

    def kill():
        until(lambda: notes["killed"].is_file() and notes["killed"].read_text().endswith("\n"))
        workers.append(pids(client))
        ran_under = {int(pid) for pid in notes["killed"].read_text().split()}
        (worker,) = ran_under & set(workers[0])
        os.kill(worker, signal.SIGKILL)
        until(lambda: len(pids(client)) == 2 and worker not in pids(client))
        workers.append(pids(client))

    class Sends(Cluster):
        def choose(self, wants_gpu):  # called after a notebook was sent, before it is executed
            if jobs[-1].status == "queued" and jobs[-1].started:
                with contextlib.suppress(FileNotFoundError):  # others choose meanwhile, too
                    (root / "gone").rmdir()
            return super().choose(wants_gpu)

    killer = threading.Thread(target=kill)
    killer.start()
    with Sends(client.scheduler.address, jobs) as place:
        assert place.workers == 2
        manifest = runner.run(
            jobs, root / "out", place=place,
            progress=lambda job: seen.append((job.name, job.status, job.cell)),
        )  # fmt: skip
    killer.join()
    ran_under = {
        name: [{int(pid) for pid in line.split()} for line in path.read_text().splitlines()]
        for name, path in notes.items()
    }
    entries = {entry["name"]: entry for entry in manifest["notebooks"]}
    return root / "out", entries, seen, ran_under, workers


def test_results_come_back_as_files(report):
    out, entries, *_ = report
    assert entries["good"]["status"] == "done"
    assert [figure["name"] for figure in entries["good"]["figures"]] == ["b", "a"]  # as made
    assert (out / "good" / "a.pdf").is_file()
    assert not list(out.glob(".part-*"))


def test_a_file_that_a_parameter_names_is_sent_along(report):
    out, entries, *_ = report
    assert '"../inputs/image/picture.txt a picture\\n"' in (out / "good" / "good.ipynb").read_text()
    assert not list((out / "good").rglob("*.txt"))
    assert entries["good"]["parameters"]["image"].endswith("picture.txt")


def test_a_folder_that_is_not_there_is_a_clear_error(report):
    entry = report[1]["needs"]
    assert entry["status"] == "failed"
    assert entry["error"].startswith("parameter data: worker tcp://")
    assert "/gone, and only single files" in entry["error"]


def test_a_failed_notebook_is_kept_with_its_traceback(report):
    out, entries, *_ = report
    assert entries["raises"]["status"] == "failed"
    assert entries["raises"]["error"] == "ZeroDivisionError: division by zero"
    assert '"output_type": "error"' in (out / "failed" / "raises" / "raises.ipynb").read_text()


def test_progress_counts_cells(report):
    events = [event for event in report[2] if event[0] == "good"]
    assert events[:2] == [("good", "queued", 0), ("good", "running", 0)]
    assert [cell for _, state, cell in events if state == "running"] == [0, 1, 2, 3, 4, 5, 6]
    assert events[-1][1] == "done"


def test_a_killed_workers_notebook_runs_elsewhere_and_no_other_again(report):
    _, entries, _, ran_under, _ = report
    assert entries["killed"]["status"] == "done"
    assert [len(runs) for runs in ran_under.values()] == [2, 1, 1, 1]


def test_the_one_that_wants_a_gpu_gets_it(report):
    _, _, _, ran_under, workers = report
    gpus = {pid for alive in workers for pid, gpu in alive.items() if gpu}
    assert ran_under["study"][0] & gpus


def test_a_study_in_a_notebook_runs_on_the_cluster_and_gives_the_same(report, tmp_path):
    out, entries, *_ = report
    assert entries["study"]["status"] == "done"
    # on the worker's thread, that the notebook's own task would else hold, and not in the kernel
    assert "threads 1 here False" in (out / "study" / "study.ipynb").read_text()
    training.study({"seed": [3, 4]}, folder=tmp_path, device="cpu", progress=False, **TINY)
    for path in tmp_path.glob("*.jsonl"):
        (here, *mine), (there, *theirs) = (
            [json.loads(line) for line in (folder / path.name).read_text().splitlines()]
            for folder in (tmp_path, out / "study" / "runs")
        )
        assert mine == theirs
        assert here["experiment"] == there["experiment"]


def test_a_notebook_that_takes_too_long_comes_back_as_far_as_it_got(client, tmp_path, monkeypatch):
    path = write(tmp_path / "hangs.ipynb", CHILD.format(odd(7501)), "print('so far')",
                 "import time; time.sleep(600)")  # fmt: skip
    jobs, late = plan([path]), tmp_path / "late"
    late_once(late, monkeypatch)
    monkeypatch.setattr(cluster, "time", runner.time)
    client.run(late_there, str(late))
    try:
        with Cluster(client.scheduler.address, jobs) as place:
            (entry,) = runner.run(
                jobs, tmp_path / "out", place=place, timeout=500,
                progress=lambda job: late.touch() if job.cell == 5 else None,
            )["notebooks"]  # fmt: skip
    finally:
        client.run(late_there, None)
    assert (entry["status"], entry["error"]) == ("timeout", "took longer than 500 s, in cell 5")
    assert "so far" in (tmp_path / "out" / "failed" / "hangs" / "hangs.ipynb").read_text()
    assert not sleepers(odd(7501))


def late_there(path):
    """On a worker: 1000 s pass for what attends to a notebook when the file is made; or no more."""
    import subprocess
    import types

    from gnetlab.report import task

    late = f"""
import os, time, types
from gnetlab.report import task
now = lambda: time.monotonic() + 1000 * os.path.exists({path!r})
task.time = types.SimpleNamespace(monotonic=now)
"""

    def start(command, **options):
        return subprocess.Popen([*command[:-1], late + command[-1]], **options)

    there = types.SimpleNamespace(Popen=start, PIPE=subprocess.PIPE)
    task.subprocess = there if path else subprocess


def test_no_process_outlives_the_one_who_runs_it(client, tmp_path):
    numbers = {odd(7502): signal.SIGINT, odd(7503): signal.SIGKILL}
    running = {}
    for seconds in numbers:
        path = write(tmp_path / f"{seconds}.ipynb", CHILD.format(seconds), "while True: pass")
        command = [sys.executable, "-m", "gnetlab.cli", "report", str(path), "--output", seconds,
                   "--device", "cpu", "--scheduler", client.scheduler.address]  # fmt: skip
        running[seconds] = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=hear_signals,
        )  # fmt: skip
        until(lambda: sleepers(seconds))  # noqa: B023  (the second goes to the idle worker)
    # a worker that executes a notebook is free for the runs that the notebook sends
    assert client.submit(abs, -7, pure=False).result(timeout=300) == 7
    kernels = [psutil.Process(p.ppid()) for s in numbers for p in sleepers(s)]
    for seconds, number in numbers.items():
        running[seconds].send_signal(number)
    interrupted, killed = running.values()
    assert interrupted.wait(timeout=300) == 130
    killed.wait(timeout=300)
    until(lambda: not any(map(sleepers, numbers)) and not any(k.is_running() for k in kernels))
    (entry,) = json.loads((tmp_path / odd(7502) / "manifest.json").read_text())["notebooks"]
    assert entry["status"] == "cancelled"


def test_a_worker_executes_one_notebook_at_a_time(monkeypatch):
    states = types.SimpleNamespace(tasks={"key": types.SimpleNamespace(state="long-running")})
    states.nthreads = 1
    worker = types.SimpleNamespace(
        state=states, status=distributed.Status.running, local_directory="", log_event=print,
        scheduler=types.SimpleNamespace(address="there"),
    )  # fmt: skip
    monkeypatch.setattr(distributed, "get_worker", lambda: worker)
    monkeypatch.setattr(distributed, "secede", lambda: None)
    monkeypatch.setattr(task, "_attended", lambda work, *_: work["environment"])
    order = pickle.dumps({"needed": {}, "environment": {}})
    assert task.execute("key", "topic", order)["GNETLAB_SCHEDULER"] == "there"
    with task._ONE_AT_A_TIME, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(task.execute, "key", "topic", order)
        time.sleep(1.2)
        assert not waits.done()
        states.tasks["key"].state = "cancelled"
        assert waits.result(timeout=300) is None


def test_one_whose_workers_end_again_and_again_has_died(client, tmp_path, monkeypatch):
    sent_to = []
    monkeypatch.setattr(cluster.Remote, "_attempt", lambda _, address: sent_to.append(address))
    jobs = plan([write(tmp_path / "n.ipynb", "1")])
    with Cluster(client.scheduler.address, jobs) as place:
        (entry,) = runner.run(jobs, tmp_path / "out", place=place)["notebooks"]
    assert entry["status"] == "died"
    assert entry["error"].startswith("3 workers ended while they executed it")
    assert len(sent_to) == 3


def enter(address, jobs=()):
    with Cluster(address, list(jobs)) as place:
        return place.workers


class TestEntering:
    def test_nobody_answers(self, monkeypatch):
        monkeypatch.setattr(cluster, "PATIENCE", 1)
        dask = pytest.importorskip("dask")
        begun = time.monotonic()
        with dask.config.set({"distributed.comm.timeouts.connect": "900 s"}):  # but for PATIENCE
            with pytest.raises(ReportError, match="no Dask scheduler answers there"):
                enter("tcp://127.0.0.1:9")
            with pytest.raises(ReportError, match="--scheduler what:ever asked"):
                enter("what:ever")
        assert time.monotonic() - begun < 600

    def test_there_is_no_worker(self, monkeypatch):
        check = Cluster._check

        def hurried(place):  # the scheduler has answered; for a worker it would wait in vain
            monkeypatch.setattr(cluster, "PATIENCE", 1)
            check(place)

        monkeypatch.setattr(Cluster, "_check", hurried)
        with (
            distributed.LocalCluster(n_workers=0, dashboard_address=":0", processes=False,
                                     protocol="tcp") as empty,
            pytest.raises(ReportError, match="no worker is there; start some"),
        ):  # fmt: skip
            enter(empty.scheduler_address)

    def test_a_worker_has_another_source(self, client, monkeypatch):
        monkeypatch.setattr(cache, "_source", lambda: "another")
        with pytest.raises(ReportError, match=r"gnetlab's source .*, here another"):
            enter(client.scheduler.address)

    def test_a_worker_has_other_packages(self, client, monkeypatch):
        versions = machine.versions()
        monkeypatch.setattr(machine, "versions", lambda: versions | {"torch": "1.0"})
        with pytest.raises(ReportError, match=r"torch \d.*, here 1.0. Install the same"):
            enter(client.scheduler.address)

    def test_a_worker_has_no_gnetlab(self, client, monkeypatch):
        module = types.ModuleType("only_here")
        exec("def about(asked, dask_worker): return '', False", module.__dict__)
        monkeypatch.setitem(sys.modules, "only_here", module)
        monkeypatch.setattr(task, "about", module.about)
        with pytest.raises(ReportError, match=r"differs from here: .*only_here"):
            enter(client.scheduler.address)

    def test_cuda_is_asked_where_no_worker_offers_a_gpu(self, client, tmp_path, monkeypatch):
        jobs = plan([write(tmp_path / "n.ipynb")])
        jobs[0].parameters["device"] = "cuda"
        assert enter(client.scheduler.address, jobs) == 2
        look = Cluster._look
        monkeypatch.setattr(
            Cluster,
            "_look",
            lambda self: {a: (differs, False) for a, (differs, _) in look(self).items()},
        )
        for device in ("cuda", "cuda:1"):
            jobs[0].parameters["device"] = device
            with pytest.raises(ReportError, match=rf"--device {device} asked, but no .*GPU=1"):
                enter(client.scheduler.address, jobs)

    def test_distributed_is_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "distributed", None)
        with pytest.raises(ReportError, match=r"pip install 'gnetlab\[cluster\]'"):
            enter("tcp://127.0.0.1:9")


def test_nothing_of_dask_is_imported_without_an_address(tmp_path):
    (tmp_path / "n.ipynb").write_text("no notebook")
    code = """
import sys
import gnetlab.report.cluster
from gnetlab.cli import app
from gnetlab.measure.training import local_executor
local_executor("cpu").shutdown()
try:
    app(["report", "n.ipynb", "--output", "out"])
except SystemExit as left:
    print(left.code, [name for name in sys.modules if name.startswith(("dask", "distributed"))])
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "1 []"


def test_unpacking_writes_nothing_elsewhere(tmp_path):
    for name in ("../outside", "a/../../outside", str(tmp_path / "outside")):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        (tmp_path / "inside").mkdir(exist_ok=True)
        if name.startswith("/"):  # becomes a name below
            task.unpack(packed.getvalue(), tmp_path / "inside")
        else:
            with pytest.raises(tarfile.FilterError):
                task.unpack(packed.getvalue(), tmp_path / "inside")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
