"""What goes wrong in a notebook, or to who runs it, is told truly, and nothing is left over."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from test_report import FIGURE, PARAMETERS, plan, write

from gnetlab.measure.training import local_executor
from gnetlab.net import data, datasets
from gnetlab.report import cache, kernel, machine, page, runner, worker
from gnetlab.report import manifest as manifests
from gnetlab.report import plan as planning

# Marks that can be looked for from outside: a kernel's child that sleeps for an odd time.
CHILD = "import subprocess; child = subprocess.Popen(['sleep', '{}'], start_new_session=True)"


def odd(seconds: int) -> str:
    """A time that no other process that runs these tests here takes."""
    return f"{seconds}.{os.getpid()}"


def sleepers(seconds: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == ["sleep", seconds]:
            found.append(process)
    return found


def hear_signals():
    """In a process to be: whoever runs the tests may have these ignored, as nohup does."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def until(condition, seconds=300.0):
    """The limit is for what never comes: a busy machine may take minutes to start a kernel."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


# that a notebook has to itself
THREADS = os.environ.get("OMP_NUM_THREADS", str(machine.available_cores()))


def run(paths, output, parameters=None, **options):
    jobs = plan(paths, parameters)
    manifest = runner.run(jobs, output, **options)
    return {entry["name"]: entry for entry in manifest["notebooks"]}


def late_once(path: Path, monkeypatch) -> None:
    """Let 1000 s pass for the runner when the file is made: no test waits, nor is late itself."""
    late = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000 * path.exists())
    monkeypatch.setattr(runner, "time", late)


class TestIncremental:
    @pytest.fixture
    def done(self, tmp_path):
        claim = "import os, pathlib; os.mkdir('claims'); pathlib.Path('claims/x.json').touch()"
        page = "pathlib.Path('explorer.html').touch()"
        path = write(tmp_path / "n.ipynb", FIGURE, claim, page)
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

    def test_a_manifest_that_could_not_be_written_leaves_no_older_one_in_its_place(
        self, done, monkeypatch
    ):
        path, out = done
        old = json.loads((out / "manifest.json").read_text())["notebooks"][0]
        with monkeypatch.context() as full:
            full.setattr(runner, "_now", lambda: datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))
            full.setattr(manifests, "make", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(runner.ReportFailed, match="disk full"):
                run([path], out, force=True)
        new = run([path], out)["n"]
        assert new["status"] == "cached"
        assert new["started"].startswith("2026-01-02") != old["started"].startswith("2026-01-02")

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
            (lambda n: (n / "explorer.html").unlink(), "result changed or lost: explorer.html"),
            (lambda n: (n / "claims" / "x.json").unlink(),
             f"result changed or lost: {Path('claims') / 'x.json'}"),
            (lambda n: (n / cache.RECORD).write_text("{"),
             "run.json of the last result cannot be read"),
            (lambda n: (n / cache.RECORD).unlink(), "first run"),
        ],
    )  # fmt: skip
    def test_why_a_notebook_runs(self, done, change, reason):
        path, out = done
        change(out / "n")
        (job,) = plan([path])
        cache.restore(job, out, False, THREADS)
        assert (job.status, job.reason) == ("queued", reason)

    def test_a_changed_parameter_is_named(self, done):
        path, out = done
        (job,) = plan([path], {"seed": "1"})
        cache.restore(job, out, False, THREADS)
        assert job.reason == "parameters changed: seed 0 → 1"

    @pytest.mark.parametrize(
        ("part", "reason"),
        [
            ((cache, "_source"), "source of gnetlab changed"),
            ((cache, "_devices"), "devices changed"),
            ((machine, "available_cores"), "threads changed: {} → other"),
            ((machine, "versions"), "packages changed: python {} → 9"),
        ],
    )
    def test_a_change_of_what_runs_it_is_noticed(self, done, part, reason, monkeypatch):
        path, out = done
        old = machine.versions()
        changed = {**old, "python": "9"} if part[1] == "versions" else "other"
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        (job,) = plan([path])
        monkeypatch.setattr(*part, lambda: changed)
        cache.restore(job, out, False, runner.Here(1).threads(job))
        before = old["python"] if part[1] == "versions" else THREADS
        assert job.reason == reason.format(before)

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
        assert before.keys() == {"image", "data", "data sets"}
        picture.write_text("two")
        (folder / "a.jpg").write_text("x")
        after = cache._inputs(parameters)
        assert before["image"] != after["image"]
        assert before["data"] != after["data"]

    def test_a_path_in_a_parameter_is_found_however_it_is_written(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        picture = tmp_path / "at 12:30.png"
        picture.write_text("one")
        parameters = {"one": f"folder:{picture}", "home": "~/at 12:30.png",
                      "many": [str(picture)], "by_name": {"a": (str(picture),)}}  # fmt: skip
        before = cache._inputs(parameters)
        assert list(before) == ["one", "home", "many.0", "by_name.a.0"]
        picture.write_text("two")
        assert not before.items() & cache._inputs(parameters).items()

    def test_what_is_removed_from_a_folder_while_it_is_listed_is_not_in_it(
        self, tmp_path, monkeypatch
    ):
        (tmp_path / "a.jpg").touch()
        walked = [(str(tmp_path), [], ["gone.jpg", "a.jpg"])]
        monkeypatch.setattr(cache.os, "walk", lambda *_, **__: walked)
        monkeypatch.setattr(cache.Path, "is_file", lambda _: True)  # as it was a moment ago
        (line,) = cache._listing(tmp_path)
        assert line.startswith("a.jpg 0 ")

    def test_class_folders_that_are_links_are_looked_into(self, tmp_path):
        data, real = tmp_path / "data", tmp_path / "real"
        data.mkdir()
        real.mkdir()
        (data / "cats").symlink_to(real)
        (real / "back").symlink_to(real)
        before = cache._listing(data)
        (real / "a.jpg").write_text("x")
        assert before == []
        assert [line.split()[0] for line in cache._listing(data)] == [str(Path("cats/a.jpg"))]

    def test_a_picture_attached_to_text_is_part_of_its_cell(self, tmp_path):
        path, keys = write(tmp_path / "n.ipynb", ""), []
        for content in ("YQ==", "Yg=="):
            notebook = nbformat.read(path, 4)
            text = nbformat.v4.new_markdown_cell("![](attachment:a.png)")
            text["attachments"] = {"a.png": {"image/png": content}}
            notebook.cells[1:] = [text]
            nbformat.write(notebook, path)
            keys.append(cache._key(plan([path])[0], "1")["cells"])
        assert keys[0] != keys[1]

    def test_named_data_sets_are_looked_into_where_they_lie(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cache, "DATA_FOLDERS", (str(tmp_path), str(tmp_path / "none")))
        (tmp_path / "images").write_text("one")
        before = cache._inputs({"data": "fashion-mnist"})
        assert before == cache._inputs({"data": "fashion-mnist"})
        (tmp_path / "images").write_text("other")
        assert before != cache._inputs({"data": "fashion-mnist"})
        assert cache._inputs({"data": "photocrops"}) == {}
        monkeypatch.undo()
        for place in (*data.FASHION_MNIST_FOLDERS, datasets.ROOT):
            assert place.startswith(cache.DATA_FOLDERS)

    def test_imagenet_weights_that_were_fetched_meanwhile_are_noticed(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        assert cache._inputs({"weights": "auto"}) == {"ImageNet weights": "none"}
        place = tmp_path / "hub" / "checkpoints"
        place.mkdir(parents=True)
        (place / "googlenet-1378be20.pth").touch()
        assert cache._inputs({"weights": "auto"})["ImageNet weights"] == "googlenet-1378be20.pth"
        assert cache._inputs({"weights": "bundled"}) == {}

    def test_weights_that_may_be_fetched_now_are_others_than_offline(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        offline = cache._inputs({"weights": "auto"})
        monkeypatch.delenv("GNETLAB_OFFLINE")
        assert cache._inputs({"weights": "auto"}) != offline


class TestFaults:
    def test_nothing_is_left_running_whatever_goes_wrong_here(self, tmp_path):
        seconds = odd(7391)
        path = write(tmp_path / "n.ipynb", CHILD.format(seconds), "import time; time.sleep(600)")

        def progress(job):
            if job.cell == 3:
                until(lambda: sleepers(seconds))
                raise RuntimeError("of the one who draws it")

        with pytest.raises(RuntimeError, match="who draws it"):
            runner.run(plan([path]), tmp_path / "out", progress=progress)
        assert not sleepers(seconds)
        assert not list((tmp_path / "out").glob(".part-*"))

    def test_a_result_that_became_a_link_is_replaced_again_and_again(self, tmp_path):
        path, out = write(tmp_path / "n.ipynb", "1"), tmp_path / "out"
        run([path], out)
        (out / "n").rename(tmp_path / "elsewhere")
        (out / "n").symlink_to(tmp_path / "elsewhere")
        for _ in range(2):
            assert run([path], out, force=True)["n"]["status"] == "done"
        assert not (out / "n").is_symlink()
        assert (tmp_path / "elsewhere" / "n.ipynb").is_file()
        assert not list(out.glob(".part-*"))

    def test_a_notebook_that_hangs_and_ignores_interrupts_is_ended_at_its_deadline(
        self, tmp_path, monkeypatch
    ):
        late_once(tmp_path / "late", monkeypatch)
        stubborn = (
            "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            f"open({str(tmp_path / 'late')!r}, 'w').close(); time.sleep(600)"
        )
        hangs = write(tmp_path / "hangs.ipynb", CHILD.format(odd(7301)), stubborn)
        good = write(tmp_path / "good.ipynb", "1")
        entries = run([hangs, good], tmp_path / "out", timeout=100)
        assert entries["hangs"]["status"] == "timeout"
        assert entries["hangs"]["error"] == "took longer than 100 s, in cell 4"  # of those that ran
        assert entries["good"]["status"] == "done"
        assert not sleepers(odd(7301))
        assert entries["hangs"]["seconds"] < 1300

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
        path = write(tmp_path / "n.ipynb", CHILD.format(odd(7302)), kills)
        entry = run([path], tmp_path / "out")["n"]
        assert entry["status"] == "died"
        assert "its process ended with -9" in entry["error"]
        assert not sleepers(odd(7302))

    def test_what_a_notebook_leaves_running_is_ended_with_it(self, tmp_path):
        path = write(tmp_path / "n.ipynb", CHILD.format(odd(7303)))
        assert run([path], tmp_path / "out")["n"]["status"] == "done"
        assert not sleepers(odd(7303))

    def test_two_reports_into_one_folder_are_one_too_many(self, tmp_path):
        from filelock import FileLock

        path = write(tmp_path / "n.ipynb", "1")
        (tmp_path / "out").mkdir()
        with (
            FileLock(tmp_path / "out" / ".lock"),
            pytest.raises(planning.ReportError, match="another report is being written"),
        ):
            run([path], tmp_path / "out")
        assert run([path], tmp_path / "out")["n"]["status"] == "done"

    def test_a_cell_that_never_lets_go_of_python_is_ended_too(self, tmp_path, monkeypatch):
        late_once(tmp_path / "late", monkeypatch)
        holds = (
            f"import ctypes; open({str(tmp_path / 'late')!r}, 'w').close()\n"
            "ctypes.PyDLL(None).sleep(600)"  # PyDLL keeps the lock
        )
        path = write(tmp_path / "n.ipynb", "print('be' + 'fore')", holds)
        entry = run([path], tmp_path / "out", timeout=100)["n"]
        assert entry["status"] == "timeout"
        kept = (tmp_path / "out" / "failed" / "n" / "n.ipynb").read_text()
        assert "before" in kept
        assert entry["seconds"] < 1300

    def test_only_a_large_notebook_is_saved_less_often(self, tmp_path, monkeypatch):
        clock = iter(range(1000))
        monkeypatch.setattr(worker.time, "monotonic", lambda: next(clock))  # a save takes 1 s
        path = tmp_path / "n.ipynb"
        for size, often in ((10, 30), (2_000_000, 2)):
            path.write_bytes(bytes(size))
            saved: list[int] = []
            save = worker._now_and_then(lambda saved=saved: saved.append(1), str(path))
            for _ in range(30):
                save()
            assert len(saved) == often

    def test_a_notebook_ended_while_it_is_saved_keeps_what_was_saved_before(
        self, tmp_path, monkeypatch
    ):
        from papermill.iorw import papermill_io

        monkeypatch.setattr(papermill_io, "_handlers", list(papermill_io._handlers))
        path = tmp_path / "n.ipynb"
        worker._engine(str(path))
        papermill_io.write("before", str(path))
        monkeypatch.setattr(manifests.os, "replace", lambda *_paths: 1 / 0)  # killed half-way
        with pytest.raises(ZeroDivisionError):
            papermill_io.write("after", str(path))
        assert path.read_text() == "before"

    def test_too_little_memory_is_a_failure_with_its_name(self, tmp_path):
        limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))"
        path = write(tmp_path / "n.ipynb", limit, "block = bytearray(2**34)")
        entry = run([path], tmp_path / "out")["n"]
        assert (entry["status"], entry["error"]) == ("failed", "MemoryError: ")

    def test_what_was_only_forked_is_ended_as_well(self, tmp_path):
        # no exec, so no mark in its environment; and in the second case no session of the kernel's
        name = f"forked-{os.getpid()}"
        forks = (
            "import ctypes, os, time\n"
            "for own_session in (False, True):\n"
            "    if os.fork() == 0:\n"
            "        if own_session: os.setsid()\n"
            f"        ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"
            "        time.sleep(600)\n"
            "        os._exit(0)\n"
        )
        path = write(tmp_path / "n.ipynb", forks)
        assert run([path], tmp_path / "out")["n"]["status"] == "done"
        found = [p.info for p in psutil.process_iter(["name", "status"])]  # asked at once: they go
        left = [one["status"] for one in found if one["name"] == name]
        assert set(left) <= {psutil.STATUS_ZOMBIE}  # whose parent was us

    def test_a_second_call_goes_on_where_the_first_failed(self, tmp_path):
        good = write(tmp_path / "good.ipynb", "1")
        bad = write(tmp_path / "bad.ipynb", "1 / 0")
        out = tmp_path / "out"
        assert run([good, bad], out)["bad"]["status"] == "failed"
        write(bad, "1")
        entries = run([good, bad], out)
        assert [e["status"] for e in entries.values()] == ["cached", "done"]
        assert not (out / "failed" / "bad").exists()

    def test_a_study_goes_on_from_the_runs_that_a_failed_notebook_finished(self, tmp_path):
        study = """
from pathlib import Path
runs = Path(output_dir, "runs")
runs.mkdir(parents=True, exist_ok=True)
print("found", *(path.name for path in runs.iterdir()), "and no more")
for name in ("done.jsonl", ".half.jsonl"):
    (runs / name).touch()
"""
        path, out, found = tmp_path / "n.ipynb", tmp_path / "out", []
        for last, force, folder in (("1 / 0", False, "failed/n"), ("2 / 0", False, "failed/n"),
                                    ("1", True, "n")):  # fmt: skip
            run([write(path, study, last)], out, force=force)
            found.append("found done.jsonl and no more" in (out / folder / path.name).read_text())
        assert found == [False, True, False]  # forced, it begins anew

    def test_a_notebook_in_the_report_is_not_replaced_by_its_own_result(self, tmp_path):
        run([write(tmp_path / "n.ipynb", "1")], tmp_path / "out")
        executed = tmp_path / "out" / "n" / "n.ipynb"
        before = executed.read_bytes()
        with pytest.raises(planning.ReportError, match="which a result would replace"):
            run([executed], tmp_path / "out")
        assert executed.read_bytes() == before
        (tmp_path / "mine").mkdir()  # below the report's folder, but nothing of its
        below = write(tmp_path / "mine" / "m.ipynb", "1")
        assert run([below], tmp_path)["m"]["status"] == "done"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("n/data.txt", "is not a result of an earlier report"),
            ("failed/n/data.txt", "is not a result of an earlier report"),
            ("index.html", "not a report's"),
        ],
    )
    def test_what_is_not_a_report_s_is_not_replaced(self, name, message, tmp_path):
        path = write(tmp_path / "n.ipynb", "1")
        mine = tmp_path / name
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(planning.ReportError, match=message):
            run([path], tmp_path)
        assert mine.read_text() == "mine"

    def test_published_figures_replace_nothing_else(self, tmp_path, monkeypatch):
        (tmp_path / "notebooks").mkdir()
        path = write(tmp_path / "notebooks" / "n.ipynb", "1")
        monkeypatch.chdir(tmp_path)
        manifest = runner.run(plan([path]), tmp_path / "out")
        (tmp_path / "figures").mkdir()
        (tmp_path / "figures" / "mine.png").touch()
        with pytest.raises(planning.ReportError, match="holds no published figures"):
            manifests.publish(manifest, tmp_path / "out", tmp_path / "figures")
        assert (tmp_path / "figures" / "mine.png").exists()

    def test_a_full_disk_is_said_and_costs_nothing_that_was_good(self, tmp_path):
        """On a file system of 1 MB of its own; the notebook writes 2."""
        write(tmp_path / "n.ipynb", "print('good')")
        write(tmp_path / "fills.ipynb", "open('big', 'wb').write(bytes(2_000_000))")
        (tmp_path / "out").mkdir()
        report = f"{sys.executable} -m gnetlab.cli report --output out"
        script = (
            "mount -t tmpfs -o size=1m none out || exit 77\n"
            f"{report} n.ipynb; echo first $?\n"
            "sha256sum out/n/n.ipynb > before\n"
            f"{report} n.ipynb fills.ipynb; echo second $?\n"
            "ls out/failed/fills\n"
            "dd if=/dev/zero of=out/fill bs=4k 2> /dev/null\n"
            f"{report} n.ipynb --force; echo third $?\n"
            "sha256sum -c before; rm out/fill\n"
            f"{report} n.ipynb; echo fourth $?\n"
        )
        command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        if ran.returncode == 77 or "unshare:" in ran.stderr:
            pytest.skip(f"no file system of its own can be mounted here: {ran.stderr[:200]}")
        _first, second, third, fourth = re.split(r"(?:first|second|third) \d\n", ran.stdout)
        full = "[Errno 28] No space left on device"
        assert f"fills failed: OSError: {full}" in second
        assert "fills.ipynb" in third.splitlines()  # kept, if only as it was before it ran
        assert "Report:" in second  # there was room for it again
        assert "n: nothing changed" in second
        assert f"n failed: OSError: {full}" in third
        assert f"the report could not be written to {tmp_path / 'out'}: {full}" in ran.stderr
        assert re.findall(r"(\w+) (\d)\n", ran.stdout) == [
            ("first", "0"), ("second", "1"), ("third", "1"), ("fourth", "0"),
        ]  # fmt: skip
        assert "out/n/n.ipynb: OK" in fourth
        assert "n: nothing changed since the last run" in fourth
        assert "Traceback" not in ran.stderr

    def test_what_a_killed_run_left_is_cleared_away(self, tmp_path):
        (tmp_path / "out" / ".part-old").mkdir(parents=True)
        run([write(tmp_path / "n.ipynb", "1")], tmp_path / "out")
        assert not list((tmp_path / "out").glob(".part-*"))

    @pytest.mark.parametrize(
        "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
    )
    def test_no_process_outlives_the_one_who_runs_it(self, number, tmp_path):
        seconds = odd(7310 + int(number))
        spins = "while True: pass"
        path = write(tmp_path / "n.ipynb", CHILD.format(seconds), spins)
        command = [sys.executable, "-m", "gnetlab.cli", "report", str(path), "--output", "out"]
        running = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=hear_signals,
        )  # fmt: skip
        until(lambda: sleepers(seconds))
        kernels = [p.parent() for p in sleepers(seconds)]
        running.send_signal(number)
        status = running.wait(timeout=300)
        until(lambda: not sleepers(seconds) and not any(k.is_running() for k in kernels))
        if number == signal.SIGKILL:
            return
        assert status == 130
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["notebooks"][0]["status"] == "cancelled"

    def test_a_hangup_is_ignored_under_nohup(self, tmp_path):
        path = write(tmp_path / "n.ipynb", CHILD.format(odd(7305)), "import time; time.sleep(5)")
        command = [sys.executable, "-m", "gnetlab.cli", "report", str(path), "--output", "out"]
        running = subprocess.Popen(["nohup", *command], cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        until(lambda: sleepers(odd(7305)))
        running.send_signal(signal.SIGHUP)
        assert running.wait(timeout=300) == 0


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
        monkeypatch.setattr(machine, "available_cores", lambda: 6)
        parameters = 'profile = "fast"\ndevice = "auto"\nseed = {}\noutput_dir = "output"'
        paths = [
            write(tmp_path / f"{i}.ipynb", meet, parameters=parameters.format(i)) for i in (1, 2)
        ]
        entries = run(paths, tmp_path / "out", workers=2, timeout=600)
        assert [entry["status"] for entry in entries.values()] == ["done", "done"]
        assert '"3 3\\n"' in (tmp_path / "out" / "1" / "1.ipynb").read_text()

    def test_a_study_takes_its_notebooks_share_of_the_cores(self, monkeypatch):
        monkeypatch.setenv("GNETLAB_CORES", "3")
        with local_executor("cpu") as pool:  # starts nothing until something is submitted
            assert pool._max_workers == 3

    def test_a_notebook_that_measures_times_runs_alone(self, tmp_path):
        plain, alone = (
            planning.Job("a", Path(), "", {"device": "cpu"}, 1, alone=flag)
            for flag in (False, True)
        )

        def fits(job, beside, workers):
            running = runner._Run(tmp_path, lambda _: None, runner.Here(workers), None)
            running.running = [runner._Slot(job, Path(), None) for job in beside]
            return running.fits(job)

        assert fits(plain, [plain], 2)
        assert not fits(plain, [plain], 1)
        assert not fits(alone, [plain], 2)
        assert not fits(plain, [alone], 2)
        assert fits(alone, [], 1)

    def test_a_gpu_has_one_notebook_at_a_time(self, monkeypatch, tmp_path):
        monkeypatch.setattr(machine, "gpus", lambda: [{"id": "GPU-a"}, {"id": "GPU-b"}])
        on_gpu = [planning.Job(n, Path(), "", {"device": "auto"}, 1) for n in "abc"]
        on_cpu = planning.Job("d", Path(), "", {"device": "cpu"}, 1)
        given = []

        def start(_self, job, _part, environment, _timeout):
            given.append((job.name, environment.get("CUDA_VISIBLE_DEVICES")))

        monkeypatch.setattr(runner.Here, "start", start)
        running = runner._Run(tmp_path, lambda _: None, runner.Here(4), None)
        for job in on_gpu[:2]:
            assert running.fits(job)
            running.begin(job)
        assert given == [("a", "GPU-a"), ("b", "GPU-b")]
        assert not running.fits(on_gpu[2])
        assert running.fits(on_cpu)
        running.begin(on_cpu)
        assert given[-1] == ("d", None)
        running.running.clear()
        running.free_gpus.append("GPU-a")

        def full(*_args):
            raise OSError("no space")

        monkeypatch.setattr(runner.Here, "start", full)
        running.begin(on_gpu[2])
        assert (on_gpu[2].status, running.free_gpus) == ("failed", ["GPU-a"])  # given back
        monkeypatch.setattr(machine, "available_cores", lambda: 64)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**11))
        borne = {device: machine.bearable_workers(device) for device in ("auto", "cuda", "cuda:1")}
        assert borne == {"auto": 2, "cuda": 2, "cuda:1": 1}
        assert (machine.bearable_workers("cpu"), machine.bearable_workers("mps")) == (4, 1)

    def test_a_gpu_by_its_number_is_that_one(self, monkeypatch, tmp_path):
        """The number counts all GPUs that the user lets be seen, so they all stay visible."""
        monkeypatch.setattr(machine, "gpus", lambda: [{"id": "GPU-a"}, {"id": "GPU-b"}])
        devices = {"a": "cuda:1", "b": "cuda:1", "c": "auto", "d": "mps", "e": "cuda:7"}
        jobs = {n: planning.Job(n, Path(), "", {"device": d}, 1) for n, d in devices.items()}
        given = {}

        def start(_self, job, _part, environment, _timeout):
            given[job.name] = environment

        monkeypatch.setattr(runner.Here, "start", start)
        running = runner._Run(tmp_path, lambda _: None, runner.Here(8), None)
        running.begin(jobs["a"])
        assert running.free_gpus == ["GPU-a"]
        assert not running.fits(jobs["b"])
        for name in "cde":  # the last fails where it runs, and says why
            assert running.fits(jobs[name])
            running.begin(jobs[name])
        visible = {name: found.get("CUDA_VISIBLE_DEVICES") for name, found in given.items()}
        assert visible == {"a": None, "c": "GPU-a", "d": None, "e": None}
        assert given["d"]["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
        assert running.free_gpus == []

    def test_little_memory_bears_one_notebook(self, monkeypatch):
        monkeypatch.setattr(machine, "available_cores", lambda: 64)
        little = SimpleNamespace(available=5 * 10**9)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
        assert machine.bearable_workers("cpu") == 1

    def test_the_notebooks_that_measure_times_say_so(self):
        jobs = plan(planning.find_notebooks([]))
        assert {job.name for job in jobs if job.alone} == {"01_compute_cost", "04_sparse_vs_dense"}


def test_peak_memory_and_cores_are_known(tmp_path):
    path = write(tmp_path / "n.ipynb", "block = bytearray(300_000_000)")
    entry = run([path], tmp_path / "out")["n"]
    assert entry["peak_bytes"] > 300_000_000
    assert machine.available_cores() <= os.cpu_count()


class TestOtherLoad:
    BURNS = "import time\nwhile time.process_time() < 1: pass\nprint('burnt', flush=True)"

    def test_it_is_what_the_cores_worked_but_for_oneself(self, monkeypatch):
        for name, values in {"_busy_seconds": (100, 107), "_own_seconds": (10, 13)}.items():
            monkeypatch.setattr(machine, name, iter(values).__next__)
        clock = iter((50, 60)).__next__
        monkeypatch.setattr(machine, "time", SimpleNamespace(monotonic=clock))
        monkeypatch.setattr(machine, "available_cores", lambda: 2)
        assert machine.OtherLoad().share() == 0.2

    def test_children_that_have_ended_and_those_alive_are_ones_own(self):
        busy, own = machine._busy_seconds(), machine._own_seconds()
        subprocess.run([sys.executable, "-c", self.BURNS], check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, "-c", self.BURNS + "; time.sleep(600)"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as alive:
            alive.stdout.readline()
            own, busy = machine._own_seconds() - own, machine._busy_seconds() - busy
            alive.kill()
        assert own > 1.9
        assert busy > 1.5  # counted in ticks

    def test_it_stands_in_the_manifest_and_is_kept(self, tmp_path):
        path, other = (write(tmp_path / f"{name}.ipynb", "1") for name in ("n", "other"))
        first, again = (run(p, tmp_path / "out")["n"] for p in ([path], [path, other]))
        assert again["status"] == "cached"
        assert 0 <= first["other_load"] <= 1
        assert again["other_load"] == first["other_load"]

    @pytest.mark.parametrize(
        ("other_load", "timing", "disturbed"),
        [(0.5, True, True), (0.5, False, False), (0.05, True, False), (None, True, False)],
    )
    def test_only_times_are_disturbed(self, other_load, timing, disturbed):
        entry = {"other_load": other_load, "figures": [{"timing": False}, {"timing": timing}]}
        assert manifests.is_disturbed(entry) is disturbed


class TestKernels:
    CELLS = (
        "import os, sys, torch, matplotlib, pandas",
        "print(os.getsid(0) == os.getpid(), hash('a'), matplotlib.get_backend(), __name__)",
        "import matplotlib.pyplot as plt; plt.plot([1, 2]);",
        "pandas.DataFrame({'a': [1.5]}).style.hide()",
        "print(torch.get_num_threads() == len(os.sched_getaffinity(0)))",
        "print(os.environ['GNETLAB_BATCH'], os.path.basename(os.getcwd()))",
        "import concurrent.futures as c, multiprocessing as m\n"
        "with c.ProcessPoolExecutor(1, m.get_context('spawn')) as pool:\n"
        "    print(pool.submit(len, 'abc').result())",
        "input_failed = False\ntry: input()\nexcept Exception as e: print(type(e).__name__)",
    )

    HOW = "open('how', 'w').write(open('/proc/self/cmdline').read());"

    def outputs(self, tmp_path, name):
        path = tmp_path / "n.ipynb"
        assert run([path], tmp_path / name)["n"]["status"] == "done"
        how = (tmp_path / name / "n" / "how").read_text()
        return (tmp_path / name / "n" / "n.ipynb").read_text(), "forkserver" in how

    @pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
    def test_a_forked_kernel_is_as_good_as_a_cold_one(self, tmp_path, monkeypatch):
        write(tmp_path / "n.ipynb", *self.CELLS, self.HOW)
        forked, is_forked = self.outputs(tmp_path, "forked")
        # In the environment it would come too late: workers have that of the first report here.
        monkeypatch.setitem(worker._FROM_THE_START, kernel.COLD, "1")
        cold, is_not = self.outputs(tmp_path, "cold")
        assert (is_forked, is_not) == (True, False)
        assert forked == cold
        assert '"True ' in forked
        assert "matplotlib_inline" in forked

    @pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
    def test_kernels_are_forked_here(self, tmp_path):
        path = write(tmp_path / "n.ipynb", "print(open('/proc/self/cmdline').read())")
        run([path], tmp_path / "out")
        assert "forkserver" in (tmp_path / "out" / "n" / "n.ipynb").read_text()

    @pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
    def test_a_forked_kernel_needs_no_port_that_another_may_take_first(self, tmp_path):
        asks = "from ipykernel.connect import get_connection_info\nprint(get_connection_info())"
        run([write(tmp_path / "n.ipynb", asks)], tmp_path / "out")
        (output,) = nbformat.read(tmp_path / "out" / "n" / "n.ipynb", 4).cells[-1].outputs
        assert json.loads(output.text)["transport"] == "ipc"

    def test_a_pool_that_is_left_open_is_nobody_s_concern(self, tmp_path):
        opens = (
            "import concurrent.futures as c, multiprocessing as m\n"
            "pool = c.ProcessPoolExecutor(1, m.get_context('spawn'))\n"
            "pool.submit(len, 'abc').result()"
        )
        path = write(tmp_path / "n.ipynb", opens)
        command = [sys.executable, "-m", "gnetlab.cli", "report", str(path), "--output", "out"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ran.stderr == ""  # nor about semaphores that leaked

    def test_cuda_before_the_fork_means_a_cold_kernel(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        assert not kernel.can_fork()

    def test_a_kernel_of_a_user_s_own_starts_as_its_specification_says(self, tmp_path):
        folder = tmp_path / "share" / "kernels" / "python3"
        folder.mkdir(parents=True)
        wrapper = tmp_path / "python-of-mine"
        wrapper.write_text(f'#!/bin/sh\nMINE=1 exec {sys.executable} "$@"\n')
        wrapper.chmod(0o755)
        spec = {"argv": [str(wrapper), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "mine", "language": "python"}  # fmt: skip
        (folder / "kernel.json").write_text(json.dumps(spec))
        path = write(tmp_path / "n.ipynb", "import os; print('mine:', os.environ.get('MINE'))")
        command = [sys.executable, "-m", "gnetlab.cli", "report", str(path), "--output", "out"]
        environment = {**os.environ, "JUPYTER_PATH": str(tmp_path / "share")}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert "mine: 1" in (tmp_path / "out" / "n" / "n.ipynb").read_text()

    def test_a_kernel_that_cannot_be_started_is_named(self, tmp_path):
        folder = tmp_path / "share" / "kernels" / "python3"
        folder.mkdir(parents=True)
        spec = {"argv": ["/nowhere/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "gone", "language": "python"}  # fmt: skip
        (folder / "kernel.json").write_text(json.dumps(spec))
        path = write(tmp_path / "n.ipynb", "1")
        command = [sys.executable, "-m", "gnetlab.cli", "report", str(path), "--output", "out"]
        environment = {**os.environ, "JUPYTER_PATH": str(tmp_path / "share")}
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 1
        assert "n failed: FileNotFoundError: [Errno 2] No such file or directory" in ran.stdout
        assert "/nowhere/python" in ran.stdout
        assert (tmp_path / "out" / "failed" / "n" / "n.ipynb").is_file()


class TestReproducible:
    def test_what_a_notebook_has_computed_is_not_touched(self, tmp_path):
        said = "process 12345 of 0xdeadbeef at line 100; T_12345"
        path = write(tmp_path / "n.ipynb", f"print({said!r})")
        run([path], tmp_path / "out")
        assert said in (tmp_path / "out" / "n" / "n.ipynb").read_text().split("outputs")[-1]

    def test_a_folder_that_only_begins_like_home_is_not_home(self, monkeypatch):
        monkeypatch.setenv("HOME", "/people/ann")
        text = '"/people/ann/w.pt /people/anna/w.pt /people/ann"'
        assert manifests.without_home(text) == '"~/w.pt /people/anna/w.pt ~"'

    def test_two_runs_give_the_same_bytes(self, tmp_path):
        varying = (
            "print(object(), id); import warnings; warnings.warn('careful')",
            "import pandas; pandas.DataFrame({'a': [1]}).style",
            "import uuid; display(pandas.DataFrame({'b': [2]}).style)",
        )
        path = write(tmp_path / "n.ipynb", FIGURE, *varying)
        found = []
        for _ in range(2):
            run([path], tmp_path / "out", force=True)
            folder = tmp_path / "out" / "n"
            page.write_notebook(folder / "n.ipynb")
            names = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != cache.RECORD}
            found.append(names)
        assert {"n.ipynb", "n.html", "line.png", "line.svg", "line.pdf", "line.csv"} <= set(names)
        for name in found[0]:
            assert found[0][name] == found[1][name], name

    def test_what_is_printed_in_pieces_is_kept_as_one_text(self, tmp_path):
        """Where a kernel cuts it depends on how busy the machine is."""
        printing = (
            "import sys, time",
            "for i in range(3):",
            "    print('err', i, file=sys.stderr, flush=True); print('out', i, flush=True)",
            "    time.sleep(0.3)",
            "display(1)",
            "print('last')",
        )
        path = write(tmp_path / "n.ipynb", "\n".join(printing))
        run([path], tmp_path / "out")
        executed = nbformat.read(tmp_path / "out" / "n" / "n.ipynb", as_version=4)
        outputs = executed.cells[-1].outputs
        assert [out.get("name", out.output_type) for out in outputs] == [
            "stdout", "stderr", "display_data", "stdout"
        ]  # fmt: skip
        texts = [out.text for out in outputs if out.output_type == "stream"]
        assert texts == ["out 0\nout 1\nout 2\n", "err 0\nerr 1\nerr 2\n", "last\n"]

    def test_nothing_tells_whose_machine_it_was(self, tmp_path):
        """The home folder is in the parameters, the command, an error and what a cell prints."""
        home = tmp_path / "home-of-somebody"
        home.mkdir()
        (home / "w.pt").touch()
        parameters = PARAMETERS + '\nweights = "auto"'
        good = write(home / "good.ipynb", "print(weights)", "import os; os.getcwd()",
                     "import warnings; warnings.warn(weights)", parameters=parameters)  # fmt: skip
        bad = write(home / "bad.ipynb", "os = __import__('os'); os.write(2, weights.encode())",
                    "raise ValueError(weights)", parameters=parameters)  # fmt: skip
        command = [sys.executable, "-m", "gnetlab.cli", "report", str(good), str(bad),
                   "-p", f"weights={home}/w.pt", "--output", f"{home}/out"]  # fmt: skip
        environment = {**os.environ, "HOME": str(home)}

        def report():
            return subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True
            )

        ran = report()
        assert ran.returncode == 1, ran.stderr
        files = [path for path in (home / "out").rglob("*") if path.is_file()]
        assert len(files) >= 9
        for path in files:
            content = path.read_bytes()
            assert b"home-of-somebody" not in content, path
        manifest = json.loads((home / "out" / "manifest.json").read_text())
        assert manifest["notebooks"][0]["parameters"]["weights"] == "~/w.pt"
        again = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert "good: nothing changed since the last run" in again.stdout

    def test_long_output_is_cut_in_the_middle(self, tmp_path):
        path = write(tmp_path / "n.ipynb", "print('begin'); print('x' * 3_000_000); print('end')")
        run([path], tmp_path / "out")
        (output,) = nbformat.read(tmp_path / "out" / "n" / "n.ipynb", 4).cells[-1].outputs
        assert len(output.text) < 1_001_000
        assert output.text.startswith("begin")
        assert output.text.endswith("end\n")
        assert "characters left out" in output.text
