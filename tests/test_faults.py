"""What goes wrong in a notebook, or to who runs it, is told truly, and nothing is left over."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_report import FIGURE, plan, write

from gnetlab.measure.training import local_executor
from gnetlab.report import cache, runner, worker

# Marks that can be looked for from outside: a kernel and its child that sleep for an odd time.
CHILD = "import subprocess; child = subprocess.Popen(['sleep', '{}'], start_new_session=True)"


def sleepers(seconds: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == ["sleep", seconds]:
            found.append(process)
    return found


def until(condition, seconds=40.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def run(paths, output, parameters=None, **options):
    jobs = plan(paths, parameters)
    manifest = runner.run(jobs, output, **options)
    return {entry["name"]: entry for entry in manifest["notebooks"]}


class TestIncremental:
    @pytest.fixture
    def done(self, tmp_path):
        claim = "import os, pathlib; os.mkdir('claims'); pathlib.Path('claims/x.json').touch()"
        path = write(tmp_path / "n.ipynb", FIGURE, claim)
        assert run([path], tmp_path / "out")["n"]["status"] == "done"
        return path, tmp_path / "out"

    def test_what_has_not_changed_is_not_run_again(self, done, monkeypatch):
        path, out = done
        monkeypatch.setattr(worker, "start", None)  # nothing may start
        before = {p: p.read_bytes() for p in (out / "n").glob("*.*")}
        (job,) = jobs = plan([path])
        (entry,) = runner.run(jobs, out)["notebooks"]
        assert (job.status, job.reason) == ("cached", "nothing changed")
        assert [figure["name"] for figure in entry["figures"]] == ["line"]
        assert job.seconds > 0
        assert {p: p.read_bytes() for p in (out / "n").glob("*.*")} == before

    def test_a_report_in_which_nothing_changed_stays_as_it_is(self, done):
        path, out = done
        before = (out / "manifest.json").read_bytes()
        manifest = runner.run(plan([path]), out, command="another")
        assert json.loads(before) == manifest
        assert (out / "manifest.json").read_bytes() == before
        other = write(path.with_name("m.ipynb"), "1")
        manifest = runner.run(plan([path, other]), out, command="another")
        assert [n["status"] for n in manifest["notebooks"]] == ["cached", "done"]
        assert json.loads((out / "manifest.json").read_text()) == manifest
        alone = runner.run(plan([path]), out, command="a third")  # of other notebooks: made anew
        assert [n["name"] for n in alone["notebooks"]] == ["n"]
        assert alone["command"] == "a third"

    def test_a_page_beside_the_result_does_not_matter(self, done, monkeypatch):
        path, out = done
        (out / "n" / "n.html").write_text("a page")
        monkeypatch.setattr(worker, "start", None)
        (job,) = jobs = plan([path])
        runner.run(jobs, out)
        assert job.status == "cached"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda n: write(n.parents[1] / "n.ipynb", FIGURE + "\n1"), "cells changed"),
            (lambda n: (n / "line.png").write_text("x"), "result changed or lost: line.png"),
            (lambda n: (n / "line.csv").unlink(), "result changed or lost: line.csv"),
            (lambda n: (n / "claims" / "x.json").unlink(),
             f"result changed or lost: {Path('claims') / 'x.json'}"),
            (lambda n: (n / cache.RECORD).write_text("{"),
             "run.json of the last result cannot be read"),
            (lambda n: (n / cache.RECORD).unlink(), "no result yet"),
        ],
    )  # fmt: skip
    def test_why_a_notebook_runs(self, done, change, reason):
        path, out = done
        change(out / "n")
        (job,) = plan([path])
        cache.restore(job, out, force=False)
        assert (job.status, job.reason) == ("queued", reason)

    def test_a_changed_parameter_is_named(self, done):
        path, out = done
        (job,) = plan([path], {"seed": "1"})
        cache.restore(job, out, force=False)
        assert job.reason == "parameters changed: seed 0 → 1"

    @pytest.mark.parametrize(
        ("part", "reason"),
        [
            ("_source", "source of gnetlab changed"),
            ("_devices", "devices changed"),
            ("_versions", "packages changed: python {} → 9"),
        ],
    )
    def test_a_change_of_what_runs_it_is_noticed(self, done, part, reason, monkeypatch):
        path, out = done
        old = cache._versions()
        changed = {**old, "python": "9"} if part == "_versions" else "other"
        monkeypatch.setattr(cache, part, lambda: changed)
        (job,) = plan([path])
        cache.restore(job, out, force=False)
        assert job.reason == reason.format(old["python"])

    def test_force_runs_it_all_the_same(self, done):
        path, out = done
        entry = run([path], out, force=True)["n"]
        assert (entry["status"], entry["reason"]) == ("done", "forced")

    def test_files_that_parameters_name_are_looked_into(self, tmp_path):
        picture, folder = tmp_path / "mine.png", tmp_path / "data"
        folder.mkdir()
        picture.write_text("one")
        parameters = {"image": str(picture), "data": f"folder:{folder}", "seed": 3}
        before = cache._inputs(parameters)
        assert before.keys() == {"image", "data"}
        picture.write_text("two")
        (folder / "a.jpg").write_text("x")
        after = cache._inputs(parameters)
        assert before["image"] != after["image"]
        assert before["data"] != after["data"]

    def test_imagenet_weights_that_were_fetched_meanwhile_are_noticed(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        assert cache._inputs({"weights": "auto"}) == {"ImageNet weights": "none"}
        place = tmp_path / "hub" / "checkpoints"
        place.mkdir(parents=True)
        (place / "googlenet-1378be20.pth").touch()
        assert cache._inputs({"weights": "auto"})["ImageNet weights"] == "googlenet-1378be20.pth"
        assert cache._inputs({"weights": "bundled"}) == {}


class TestFaults:
    def test_a_notebook_that_hangs_and_ignores_interrupts_is_ended_at_its_deadline(self, tmp_path):
        stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        hangs = write(tmp_path / "hangs.ipynb", CHILD.format("7301"),
                      stubborn + "time.sleep(600)")  # fmt: skip
        good = write(tmp_path / "good.ipynb", "1")
        entries = run([hangs, good], tmp_path / "out", timeout=8)
        assert entries["hangs"]["status"] == "timeout"
        assert entries["hangs"]["error"] == "took longer than 8 s, in cell 4"  # of those that ran
        assert entries["good"]["status"] == "done"
        assert not sleepers("7301")
        assert entries["hangs"]["seconds"] < 20

    def test_a_kernel_that_is_killed_is_said_to_have_died(self, tmp_path):
        dies = write(tmp_path / "dies.ipynb", "import os; os.kill(os.getpid(), 9)", "1")
        entry = run([dies], tmp_path / "out")["dies"]
        assert entry["status"] == "died"
        assert "out of memory?" in entry["error"]
        assert (tmp_path / "out" / "failed" / "dies" / "dies.ipynb").is_file()

    def test_what_a_failing_kernel_says_is_kept_and_a_good_one_s_is_not(self, tmp_path, capfd):
        says = "import os; os.write(2, b'last words')"
        bad = write(tmp_path / "bad.ipynb", says, "1 / 0")
        good = write(tmp_path / "good.ipynb", says)
        run([bad, good], tmp_path / "out")
        assert "last words" in (tmp_path / "out" / "failed" / "bad" / "log.txt").read_text()
        assert not (tmp_path / "out" / "good" / "log.txt").exists()
        assert capfd.readouterr().err == ""

    def test_a_worker_that_is_killed_is_noticed_and_leaves_nothing(self, tmp_path):
        kills = "import os, psutil; psutil.Process(os.getppid()).kill()"
        path = write(tmp_path / "n.ipynb", CHILD.format("7302"), kills)
        entry = run([path], tmp_path / "out")["n"]
        assert entry["status"] == "died"
        assert "its process ended with -9" in entry["error"]
        assert not sleepers("7302")

    def test_what_a_notebook_leaves_running_is_ended_with_it(self, tmp_path):
        path = write(tmp_path / "n.ipynb", CHILD.format("7303"))
        assert run([path], tmp_path / "out")["n"]["status"] == "done"
        assert not sleepers("7303")

    def test_two_reports_into_one_folder_are_one_too_many(self, tmp_path):
        from filelock import FileLock

        path = write(tmp_path / "n.ipynb", "1")
        (tmp_path / "out").mkdir()
        with (
            FileLock(tmp_path / "out" / ".lock"),
            pytest.raises(runner.ReportError, match="another report is being written"),
        ):
            run([path], tmp_path / "out")
        assert run([path], tmp_path / "out")["n"]["status"] == "done"

    def test_what_a_killed_run_left_is_cleared_away(self, tmp_path):
        (tmp_path / "out" / ".part-old").mkdir(parents=True)
        run([write(tmp_path / "n.ipynb", "1")], tmp_path / "out")
        assert not list((tmp_path / "out").glob(".part-*"))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_no_process_outlives_the_one_who_runs_it(self, number, tmp_path):
        seconds = f"74{int(number):02d}"
        spins = "while True: pass"
        path = write(tmp_path / "n.ipynb", CHILD.format(seconds), spins)
        command = [sys.executable, "-m", "gnetlab.cli", "report", str(path), "--output", "out"]
        running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        until(lambda: sleepers(seconds))
        kernels = [p.parent() for p in sleepers(seconds)]
        running.send_signal(number)
        status = running.wait(timeout=30)
        until(lambda: not sleepers(seconds) and not any(k.is_running() for k in kernels), 10)
        if number == signal.SIGKILL:
            return
        assert status == 130
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["notebooks"][0]["status"] == "cancelled"


class TestParallel:
    def test_two_at_a_time_share_the_cores(self, tmp_path, monkeypatch):
        # each waits until it sees the other: one after the other they would wait for ever
        meet = (
            "import os, pathlib, time\n"
            "folder = pathlib.Path('..').resolve()\n"
            "(folder / f'{seed}.here').touch()\n"
            "while len(list(folder.glob('*.here'))) < 2: time.sleep(0.05)\n"
            "print(os.environ['OMP_NUM_THREADS'], os.environ['GNETLAB_CORES'])"
        )
        monkeypatch.setattr(runner, "available_cores", lambda: 6)
        parameters = 'profile = "fast"\ndevice = "auto"\nseed = {}\noutput_dir = "output"'
        paths = [
            write(tmp_path / f"{i}.ipynb", meet, parameters=parameters.format(i)) for i in (1, 2)
        ]
        entries = run(paths, tmp_path / "out", workers=2, timeout=60)
        assert [entry["status"] for entry in entries.values()] == ["done", "done"]
        assert '"3 3\\n"' in (tmp_path / "out" / "1" / "1.ipynb").read_text()

    def test_a_study_takes_its_notebooks_share_of_the_cores(self, monkeypatch):
        monkeypatch.setenv("GNETLAB_CORES", "3")
        with local_executor("cpu") as pool:  # starts nothing until something is submitted
            assert pool._max_workers == 3

    def test_a_notebook_that_measures_times_runs_alone(self):
        plain, alone = (runner.Job("a", Path(), "", {}, 1, alone=flag) for flag in (False, True))

        def slot(job):
            return runner._Slot(job, Path(), None, 0.0)

        assert runner._fits(plain, [slot(plain)], 2)
        assert not runner._fits(plain, [slot(plain)], 1)
        assert not runner._fits(alone, [slot(plain)], 2)
        assert not runner._fits(plain, [slot(alone)], 2)
        assert runner._fits(alone, [], 1)

    def test_the_notebooks_that_measure_times_say_so(self):
        jobs = plan(runner.find_notebooks([]))
        assert {job.name for job in jobs if job.alone} == {"01_compute_cost", "04_sparse_vs_dense"}


def test_peak_memory_and_cores_are_known(tmp_path):
    path = write(tmp_path / "n.ipynb", "block = bytearray(300_000_000)")
    entry = run([path], tmp_path / "out")["n"]
    assert entry["peak_bytes"] > 300_000_000
    assert runner.available_cores() <= os.cpu_count()
