"""benchmarks/gpu.py: its parts, limits, results and wheels; scripts play the notebooks here."""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from test_faults import until

import gnetlab as gl
from gnetlab.measure import devices

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Plays `gnetlab report`: each notebook is done, and a manifest says so of those asked for.
REPORT = """
import json, sys
from pathlib import Path
output, *names = sys.argv[1:]
names = [name for name in names if name[0] == "0"]
for name in names:
    (Path(output) / name).mkdir(parents=True, exist_ok=True)
    (Path(output) / name / "run.json").write_text("{}")
entries = [{"name": name, "status": "done", "seconds": 7.5} for name in names]
claims = [{"id": "c", "verdict": "supported", "reason": "so", "notebook": name} for name in names]
(Path(output) / "manifest.json").write_text(json.dumps({"notebooks": entries, "claims": claims}))
print("asked:", *sys.argv[2:])
"""
NUMBER = 'print(\'{"what": "a", "value": 1, "unit": "s"}\', flush=True)'


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module; what it changes for its own process is changed back."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    terminate = signal.getsignal(signal.SIGTERM)
    yield importlib.import_module("gpu")
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture
def run(gpu, tmp_path, monkeypatch):
    """A function that calls the script and returns exit status and results, notebooks faked."""

    def report(options, *arguments):
        return [sys.executable, "-c", REPORT, str(options.output), *arguments]

    monkeypatch.setattr(gpu, "report", report)

    def call(*arguments):
        places = ["--results", str(tmp_path), "--output", str(tmp_path / "report")]
        status = gpu.main(["--device", "cpu", "--quick", *places, *arguments])
        (found,) = tmp_path.glob("*-quick.json")
        return status, json.loads(found.read_text())

    return call


def scripts(gpu, monkeypatch, **sources):
    """Let every part but the report consist of these, as steps."""
    steps = [
        gpu.Step(name, lambda _, source=source: [sys.executable, "-c", source])
        for name, source in sources.items()
    ]
    monkeypatch.setattr(gpu, "steps", lambda *_: steps)


def statuses(results, part):
    return {name: entry["status"] for name, entry in results["parts"][part].items()}


def test_a_step_that_there_is_not(gpu, tmp_path, capsys):
    arguments = ["--device", "cpu", "--part", "costs", "--results", str(tmp_path)]
    assert gpu.main([*arguments, "--only", "01_compute_costs"]) == 2
    error = capsys.readouterr().err
    assert "no such step: 01_compute_costs; known: 04_sparse_vs_dense, 01_compute_cost" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_nothing_is_run_and_the_message_says_so(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(devices, "_fault", lambda _: "there is none.")
    assert gpu.main(["--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "device='cuda' asked, but PyTorch cannot use such a device: there is none." in error
    assert "--device cpu --quick" in error
    assert not list(tmp_path.iterdir())


def test_a_gpu_by_its_number_is_that_one(gpu, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "_fault", lambda _: None)
    monkeypatch.setattr(gpu, "steps", lambda _, options: asked.append(options.device) or [])
    arguments = ["--device", "cuda:1", "--part", "costs", "--only", "none"]
    assert gpu.main([*arguments, "--results", str(tmp_path)]) == 2
    assert asked == ["cuda:1"]


def test_parts_one_by_one_then_published(run, capsys):
    status, results = run("--part", "costs")
    assert status == 0
    assert statuses(results, "costs") == {"04_sparse_vs_dense": "done", "01_compute_cost": "done"}
    assert "asked: 01_compute_cost 04_sparse_vs_dense --timeout 5\n" in capsys.readouterr().out
    numbers = results["parts"]["costs"]["01_compute_cost"]["numbers"]
    assert numbers == [
        {"what": "01_compute_cost", "value": 7.5, "unit": "s"},
        {"what": "c", "value": "supported", "unit": "", "reason": "so"},
    ]
    status, results = run("--part", "branches", "--publish")
    assert status == 1
    assert statuses(results, "report") == {"page": "not published, for want of 03_auxiliary_heads"}
    first = results["parts"]["costs"]
    status, results = run("--part", "heads", "--publish")
    assert status == 0
    assert results["parts"]["costs"] == first
    assert set(results["parts"]) == {"costs", "branches", "heads", "report"}
    said = capsys.readouterr().out
    assert "03_auxiliary_heads --timeout 500" in said  # within the limit of the part, 510 s
    assert "04_sparse_vs_dense --timeout 5 --publish\n" in said


def test_the_published_command_has_no_path_of_a_machine(gpu, tmp_path):
    command = gpu.report(gpu.options_of(["--device", "cpu"]), "01")
    assert command[command.index("--output") + 1] == "reports/gpu"
    assert command[command.index("--profile") + 1] == "full"
    assert not any(part.startswith("/") for part in command[1:])
    assert str(tmp_path) in gpu.report(gpu.options_of(["--output", str(tmp_path)]))


def test_the_results_say_on_what(run):
    _, results = run("--part", "costs")
    assert results["system"]["cores"] >= 1
    assert results["packages"]["torch"] in results["on"]
    assert results["device"] in results["parts"]["costs"]["01_compute_cost"]["on"]
    assert results["date"][:4].isdigit()
    assert results["driver"] == "none"


def test_a_notebook_that_failed_or_was_late(gpu, run, tmp_path, monkeypatch):
    for word, status in (("timeout", "out of time"), ("failed", "failed"), ("cached", "done")):
        source = REPORT.replace('"done"', f'"{word}"')
        monkeypatch.setattr(
            gpu, "report",
            lambda o, *a, source=source: [sys.executable, "-c", source, str(o.output), *a],
        )  # fmt: skip
        code, results = run("--part", "heads")
        assert (code, statuses(results, "heads")["03_auxiliary_heads"]) == (
            status != "done",
            status,
        )
    monkeypatch.setattr(gpu, "report", lambda *_: [sys.executable, "-c", "raise SystemExit(2)"])
    (tmp_path / "report" / "manifest.json").unlink()
    _, results = run("--part", "heads")
    assert statuses(results, "heads") == {"03_auxiliary_heads": "failed"}


def test_a_limit_ends_a_step_and_leaves_the_others_out(gpu, run, monkeypatch, tmp_path):
    # 1000 s pass when the step has said what it says: no test waits, nor is late itself.
    said = tmp_path / "said"
    late = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000 * said.exists())
    monkeypatch.setattr(gpu, "time", late)
    child = "import subprocess, time; p = subprocess.Popen(['sleep', '600'])"
    says = f"{NUMBER}; print(p.pid, flush=True); open({str(said)!r}, 'w').close(); time.sleep(600)"
    scripts(gpu, monkeypatch, slow=f"{child}; {says}", never=NUMBER)
    begun = time.monotonic()
    status, results = run("--part", "benchmarks", "--limit", "500")
    assert time.monotonic() - begun < 300
    assert status == 1
    slow, never = results["parts"]["benchmarks"].values()
    assert (slow["status"], never["status"]) == ("out of time", "not measured: out of time")
    assert slow["numbers"] == [{"what": "a", "value": 1, "unit": "s"}]
    assert 1000 <= slow["seconds"] < 1300  # rounded
    assert never["numbers"] == []

    def is_gone():  # or not yet waited for
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(int(slow["output"][-1])).status() == psutil.STATUS_ZOMBIE
        return True

    until(is_gone)  # it was told to


def test_a_step_that_hangs_leaves_time_for_the_others(gpu, run, monkeypatch):
    scripts(gpu, monkeypatch, hangs="import time; time.sleep(60)", next=NUMBER)
    first, second = gpu.steps("benchmarks", None)
    monkeypatch.setattr(gpu, "steps", lambda *_: [first._replace(longest=0.5), second])
    _, results = run("--part", "benchmarks")
    assert statuses(results, "benchmarks") == {"hangs": "out of time", "next": "done"}


def test_a_failure_is_told_and_does_not_stop_the_others(gpu, run, monkeypatch):
    scripts(gpu, monkeypatch, bad="open('/srv/someone/x')", good=NUMBER)
    status, results = run("--part", "benchmarks")
    assert status == 1
    assert statuses(results, "benchmarks") == {"bad": "failed", "good": "done"}
    said = "\n".join(results["parts"]["benchmarks"]["bad"]["output"])
    assert "FileNotFoundError" in said
    assert "/srv" not in said
    scripts(gpu, monkeypatch, bad=NUMBER, good="raise SystemExit('not asked')")
    status, results = run("--part", "benchmarks", "--only", "bad")
    assert (status, statuses(results, "benchmarks")) == (0, {"bad": "done", "good": "done"})


def test_a_part_killed_in_the_middle_leaves_what_it_had(tmp_path):
    driver = f"""
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import gpu
        command = [sys.executable, "-c", {NUMBER!r} + "; import time; time.sleep(600)"]
        gpu.steps = lambda *_: [gpu.Step(name, lambda _: command) for name in ("one", "two")]
        sys.exit(gpu.main(["--device", "cpu", "--quick", "--part", "benchmarks", "--results", "."]))
    """
    command = [sys.executable, "-c", textwrap.dedent(driver)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert any(line.split() == ["a", "1", "s"] for line in process.stdout)
    left = psutil.Process(process.pid).children()
    for one in (process, *left):
        one.kill()
        one.wait(300)
    (found,) = tmp_path.glob("*-quick.json")
    one, two = json.loads(found.read_text())["parts"]["benchmarks"].values()
    assert one["status"] == "running"
    assert one["numbers"] == [{"what": "a", "value": 1, "unit": "s"}]
    assert two["status"] == "not measured: not reached"


def test_an_interrupt_ends_the_step_and_is_told(gpu, run, monkeypatch, tmp_path):
    source = f"""if True:
        import os, pathlib, signal, time
        print(os.getpid(), flush=True)
        {NUMBER}
        (results,) = pathlib.Path({str(tmp_path)!r}).glob("*-quick.json")
        while '"value": 1' not in results.read_text():  # until both were heard
            time.sleep(0.05)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
    """
    scripts(gpu, monkeypatch, one=source)
    status, results = run("--part", "benchmarks")
    assert (status, statuses(results, "benchmarks")) == (130, {"one": "interrupted"})
    (pid,) = results["parts"]["benchmarks"]["one"]["output"]
    assert not psutil.pid_exists(int(pid))


def test_only_files_with_tests_for_a_gpu_are_collected(gpu, tmp_path):
    command = gpu.tests(argparse.Namespace(output=tmp_path / "report")).command(9)
    files = [Path(part).name for part in command if part.endswith(".py")]
    assert {"test_loop.py", "test_sparsity.py"} < set(files)
    assert not {Path(__file__).name, "test_costs.py"} & set(files)


def test_benchmarks_are_really_measured(run):
    status, results = run("--part", "benchmarks", "--only", "tests", "roofline-tf32")
    assert status == 0
    found = results["parts"]["benchmarks"]
    missing = "left out: it needs CUDA"
    assert statuses(results, "benchmarks") == {"tests": "done", "roofline-tf32": missing}
    counts = {number["what"]: number["value"] for number in found["tests"]["numbers"]}
    assert counts["tests"] > 5
    assert counts["failures"] == counts["errors"] == 0
    assert (counts["skipped"] == counts["tests"]) == (not torch.cuda.is_available())


def test_sections_print_numbers(gpu, monkeypatch, capsys):
    sections = importlib.import_module("gpu_sections")
    assert all(benchmark_file(gpu, name).is_file() for name in (*gpu.SCRIPTS, "gpu_sections"))
    small = {"stem": "compact", "norm": "batch", "aux": False, "width": 0.1, "num_classes": 4}
    model = gl.googlenet(**small, seed=0)
    names = ("GoogLeNet", "VGG-16", "ResNet-50")
    monkeypatch.setattr(sections, "networks", lambda: dict.fromkeys(names, model))
    monkeypatch.setattr(sections, "plain", lambda data, size, _: lambda: data.train_batch(0, size))
    monkeypatch.setattr(sections, "ours", lambda *_, **options: lambda: options)
    counts = {"throughput": 32, "training": 5, "roofline-float32": 25, "sparse": 6}
    found = {}
    for name, count in counts.items():
        sections.SECTIONS[name](torch.device("cpu"), True)
        numbers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found[name] = {number["what"]: number["value"] for number in numbers}
        assert len(numbers) == len(found[name]) == count, name
        assert all(number["value"] > 0 for number in numbers if number["unit"])
    assert "GoogLeNet, fused, bfloat16, channels last, eager, batch 2" in found["throughput"]
    assert "gl.train, bfloat16, 32 px, batch 2" in found["training"]
    assert "ResNet-50, batch 1, measured" in found["roofline-float32"]
    assert found["sparse"]["dense 5x5, float32, zeros: 0% none, 3a, batch 1"] == 1


def benchmark_file(gpu, name):
    return Path(gpu.benchmark(name)[1])


def test_paths_are_not_published(gpu):
    line = "/usr/lib/torch/a.py:3: 12 images/s, 1 / 2, https://pytorch.org/docs/x"
    assert gpu.without_paths(line) == ".../a.py:3: 12 images/s, 1 / 2, https://pytorch.org/docs/x"


def test_an_environment_of_wheels_sees_the_packages_of_the_python_outside(
    gpu, tmp_path, monkeypatch
):
    wheels = gpu.wheels
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    monkeypatch.setattr(wheels, "requirements", lambda: ["torch", "gnetlab-nothing"])
    with pytest.raises(SystemExit, match="no wheel is there; --download-wheels"):
        wheels.environment(tmp_path)
    wheels._stub(tmp_path, "gnetlab_nothing")
    (tmp_path / "constraints.txt").write_text("torch<1\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    python = wheels.environment(tmp_path)
    code = (
        "import importlib.metadata as m, importlib.util as u, sys;"
        "print(m.version('gnetlab-nothing'), u.find_spec('torch').origin, sys.prefix)"
    )
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["9999", torch.__file__, str(python.parent.parent)]
    (python.parent.parent / "here").touch()
    assert wheels.environment(tmp_path) == python
    assert (python.parent.parent / "here").exists()  # not made again


def test_wheels_of_what_is_there_are_not_kept(gpu, tmp_path, monkeypatch):
    calls = []

    def pip(command, *arguments, **variables):
        calls.append((command, *map(str, arguments)))
        if command == "download":
            stubs = Path(arguments[arguments.index("--find-links", 3) + 1])
            for path in [*stubs.iterdir()]:
                path.rename(tmp_path / path.name)
            (tmp_path / "captum-0.9-py3-none-any.whl").touch()
            assert variables == {"PIP_CONSTRAINT": os.devnull}

    monkeypatch.setattr(gpu.wheels, "_pip", pip)
    arguments = ["--download-wheels", str(tmp_path), "--python-version", "3.12"]
    assert gpu.main([*arguments, "--there", "torch", "scikit-image"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["captum-0.9-py3-none-any.whl"]
    (first, *_, fvcore, iopath), (second, *rest) = calls
    assert (first, fvcore, iopath, second) == ("wheel", "fvcore", "iopath", "download")
    assert rest[rest.index("--python-version") + 1] == "3.12"
    assert "papermill>=2.6" in rest
