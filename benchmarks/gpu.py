"""Everything that needs a GPU, in one short stay: notebooks at the full profile, and benchmarks.

    python benchmarks/gpu.py [--part costs|branches|heads|benchmarks] [--wheels FOLDER] [--publish]
    python benchmarks/gpu.py --device cpu --quick        # the same steps, small, anywhere
    python benchmarks/gpu.py --download-wheels FOLDER    # where there is a network, for --wheels

A machine without a network needs PyTorch, torchvision and pip; the rest comes from `--wheels`, into
an environment of its own (see wheels.py). Each part has `--limit` seconds and consists of steps,
each a process that is ended when they are over: its status is then "out of time", what it has
measured stays, and steps that could not begin are "not measured: out of time". A second call of a
part replaces that part's results, with `--only` those of the steps named. Results are written to
benchmarks/results/DEVICE.json (with --quick, reports/DEVICE-quick.json) whenever there is a new
one; a step that reads "running" was killed together with this script. At the end one report is made
of all notebooks that are done, in this call or before; `--publish` copies its figures to figures/.

Exit status: 0 all was measured that can be here, 1 something failed or ran out of time, 2 wrong
usage or no such device (nothing was run), 130 interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Up to `enter` there may be nothing but the standard library: other imports are in functions.
sys.path.insert(0, str(Path(__file__).parent))
import wheels

ROOT = wheels.ROOT
NOTEBOOKS = {  # the short one first
    "costs": ("04_sparse_vs_dense", "01_compute_cost"),
    "branches": ("02_branch_activations",),
    "heads": ("03_auxiliary_heads",),
}
PARTS = (*NOTEBOOKS, "benchmarks")
SCRIPTS = {  # benchmarks that take a device: settings, and those of --quick
    "fuse": ("--rounds 7", "--rounds 1"),
    "roofline": ("--rounds 7", "--rounds 1"),
    "hooks": ("--rounds 7", "--rounds 1"),
    "attribution": ("--rounds 3", "--rounds 1 --steps 1"),
    "visualize": ("--rounds 3", "--rounds 1 --steps 1 --size 64"),
    "gradients": ("--rounds 5", "--rounds 1 --steps 1"),
}
LEAST = 5  # seconds that it takes to begin a step
LONGEST = 150  # of a benchmark, so that one that hangs leaves time for the others
LINES = 60  # of a step's output are kept
DONE, OUT_OF_TIME, NOT_MEASURED, LEFT_OUT = "done", "out of time", "not measured: ", "left out: "
Number = dict[str, Any]  # what, value, unit


class Step(NamedTuple):
    """A process that measures something.

    command  of the seconds it has; prints numbers as lines of JSON, among other lines
    read     gives numbers that are elsewhere, once it has ended, and its status
    longest  seconds that it gets at most
    lacking  why it cannot be run here, if so
    """

    name: str
    command: Callable[[float], list[str]]
    read: Callable[[], tuple[list[Number], str]] = lambda: ([], DONE)
    longest: float = float("inf")
    lacking: str = ""


def steps(part: str, options: argparse.Namespace) -> list[Step]:
    if part in NOTEBOOKS:
        return [notebook(name, options) for name in NOTEBOOKS[part]]
    from gpu_sections import ON_CUDA_ONLY, SECTIONS

    device, quick, found = options.device, ["--quick"] * options.quick, [tests(options)]
    for name in SECTIONS:
        command = benchmark("gpu_sections", name, *quick, "--device", device)
        lacking = "it needs CUDA" if name in ON_CUDA_ONLY and device == "cpu" else ""
        if name == "compiled" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            lacking = "no C++ compiler (g++, c++, clang++) is here"
        found.append(Step(name, lambda _, c=command: c, longest=LONGEST, lacking=lacking))
    for name, settings in SCRIPTS.items():
        command = benchmark(name, *settings[options.quick].split(), "--device", device)
        found.append(Step(f"{name}.py", lambda _, c=command: c, longest=LONGEST))
    return found


def benchmark(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *arguments]


def report(options: argparse.Namespace, *arguments: str) -> list[str]:
    # One at a time, always: how many cores a result had is part of what it depends on.
    profile, place = "fast" if options.quick else "full", options.output
    if place.is_relative_to(ROOT):
        place = place.relative_to(ROOT)  # the command is published with the figures
    return [sys.executable, "-m", "gnetlab.cli", "report", "--profile", profile, "--device",
            options.device, "--output", str(place), "-j", "1", *arguments]  # fmt: skip


def notebook(name: str, options: argparse.Namespace) -> Step:
    def command(seconds: float) -> list[str]:
        return report(options, name, "--timeout", f"{max(1, seconds - 2 * LEAST):.0f}")

    def read() -> tuple[list[Number], str]:
        manifest = json.loads((options.output / "manifest.json").read_text(encoding="utf-8"))
        entry = next(entry for entry in manifest["notebooks"] if entry["name"] == name)
        status = {"timeout": OUT_OF_TIME, "cached": DONE}.get(entry["status"], entry["status"])
        if status != DONE:
            return [], status
        numbers = [{"what": name, "value": entry["seconds"], "unit": "s"}]
        numbers += [{"what": claim["id"], "value": claim["verdict"], "unit": "",
                     "reason": claim["reason"]}
                    for claim in manifest["claims"] if claim["notebook"] == name]  # fmt: skip
        return numbers, status

    return Step(name, command, read)


def page(options: argparse.Namespace) -> Step:
    """One report of all notebooks that are done: nothing has changed, so none is run again."""
    names = sorted(itertools.chain(*NOTEBOOKS.values()))
    done = [name for name in names if (options.output / name / "run.json").is_file()]
    arguments, status = [*done, "--timeout", str(LEAST)], DONE
    if options.publish and done == names:
        arguments.append("--publish")
    elif options.publish:
        status = f"not published, for want of {', '.join(sorted({*names} - {*done}))}"
    lacking = "" if done else "no notebook is done"
    return Step(
        "page", lambda _: report(options, *arguments), lambda: ([], status), lacking=lacking
    )


def tests(options: argparse.Namespace) -> Step:
    """The tests marked gpu, from the files that have some: others may need more packages."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py"))
             if "@pytest.mark.gpu\n" in path.read_text(encoding="utf-8")]  # fmt: skip
    found = options.output.with_name(f"{options.output.name}-tests.xml")
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
               "--junitxml", str(found), *map(str, files)]  # fmt: skip

    def read() -> tuple[list[Number], str]:
        suite = next(ElementTree.parse(found).iter("testsuite"))
        kinds = ("tests", "failures", "errors", "skipped")
        counts = {kind: int(suite.get(kind, 0)) for kind in kinds}
        numbers = [{"what": kind, "value": count, "unit": ""} for kind, count in counts.items()]
        return numbers, "failed" if counts["failures"] or counts["errors"] else DONE

    return Step("tests", lambda _: command, read, longest=LONGEST)


# -- running them


def run(command: list[str], seconds: float, each: Callable[[str], None]) -> int | None:
    """The exit status of a command whose lines `each` gets; None if it had to be ended."""
    lines: queue.Queue[str] = queue.Queue()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=lambda: [*map(lines.put, process.stdout)], daemon=True)
    reader.start()
    late = time.monotonic() + seconds
    try:
        while time.monotonic() < late:
            try:
                each(lines.get(timeout=0.2).rstrip())
            except queue.Empty:
                if process.poll() is not None:
                    return process.returncode
        return None
    finally:
        _end(process)
        # Its last lines may still be on their way; but a process that outlives it may hold its
        # output open, and is not waited for.
        reader.join(LEAST)
        for _ in range(lines.qsize()):
            each(lines.get().rstrip())


def _end(process: subprocess.Popen) -> None:
    for number, patience in ((signal.SIGTERM, 2 * LEAST), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def take(step: Step, entry: dict[str, Any], seconds: float, save: Callable[[], None]) -> None:
    """Run a step, and keep in `entry` what comes of it as it comes."""
    if step.lacking or seconds < LEAST:
        entry["status"] = LEFT_OUT + step.lacking if step.lacking else NOT_MEASURED + OUT_OF_TIME
        print(f"\n{step.name}: {entry['status']}", flush=True)
        return

    def each(line: str) -> None:
        if line.startswith('{"what"') and line.endswith("}"):  # not cut off
            entry["numbers"].append(json.loads(line))
            save()
            line = "{:74}{:>28}".format(*shown(entry["numbers"][-1]))
        else:
            entry["output"] = [*entry["output"], without_paths(line)][-LINES:]
        print(f"  {line}", flush=True)

    print(f"\n{step.name}:", flush=True)
    begun, seconds = time.monotonic(), min(seconds, step.longest)
    entry |= {"status": "running", "started": now()}
    save()
    try:
        entry["status"] = _outcome(step, run(step.command(seconds), seconds, each), entry)
    except KeyboardInterrupt:
        entry["status"] = "interrupted"
        raise
    finally:
        entry["seconds"] = round(time.monotonic() - begun, 1)
        save()


def _outcome(step: Step, status: int | None, entry: dict[str, Any]) -> str:
    if status is None:
        return OUT_OF_TIME
    try:
        numbers, word = step.read()
    except (OSError, ValueError, StopIteration, ElementTree.ParseError):
        return "failed"  # it never came to write them
    entry["numbers"] += numbers
    return "failed" if status and word == DONE else word


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def without_paths(line: str) -> str:
    """Results are published; where things lie on a machine is not.

    >>> without_paths("/usr/lib/torch/a.py:3: at 12 images/s, 1 / 2")
    '.../a.py:3: at 12 images/s, 1 / 2'
    """
    return re.sub(r"(?<![\w.:/])/(?:[\w.+@~-]+/)+", ".../", line)


def measure_parts(options: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """Take the steps asked for, and return their entries."""
    from gnetlab.report.manifest import write

    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"parts": {}}
    results |= about(options.device)

    def save() -> None:
        write(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    taken, parts = [], options.part or PARTS
    for part in [*parts, *["report"] * (options.publish or set(parts) != {"benchmarks"})]:
        late = time.monotonic() + options.limit
        chosen = [page(options)] if part == "report" else steps(part, options)
        if options.only and part != "report":
            chosen = [step for step in chosen if step.name in options.only]
        kept = results["parts"].get(part, {}) if options.only else {}
        kept |= {step.name: {"status": NOT_MEASURED + "not reached", "on": results["on"],
                             "seconds": 0.0, "numbers": [], "output": []}
                 for step in chosen}  # fmt: skip
        results["parts"][part] = kept
        for step in chosen:
            take(step, kept[step.name], late - time.monotonic(), save)
            taken.append({"part": part, "step": step.name, **kept[step.name]})
        save()
    return taken


def about(device: str) -> dict[str, Any]:
    """The device and what runs on it; `on` says the most of it in a line."""
    import torch

    import gnetlab
    from gnetlab.measure.devices import device_name
    from gnetlab.report import machine

    system = machine.describe()
    drivers = ["none"] if device == "cpu" else [gpu["driver"] for gpu in system["gpus"]]
    driver = drivers[0] if drivers else "unknown"
    name, version = device_name(device), torch.__version__
    return {
        "device": name, "driver": driver, "date": now(),
        "on": f"{name}, driver {driver}, torch {version}, gnetlab {gnetlab.__version__}",
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "system": system,
        "packages": machine.versions(),
    }  # fmt: skip


def summary(taken: Iterable[dict[str, Any]]) -> None:
    print(f"\n{'what':76}{'number':>28}{'seconds':>9}")
    for entry in taken:
        what = f"{entry['part']}, {entry['step']}: {entry['status']}"
        print(f"{what:104}{entry['seconds']:9.1f}")
        for number in entry["numbers"]:
            print("  {:74}{:>28}".format(*shown(number)))


def shown(number: Number) -> tuple[str, str]:
    value = number["value"]
    text = value if isinstance(value, str) else f"{value:,.4g}"
    return number["what"], f"{text} {number['unit']}".rstrip()


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], fromfile_prefix_chars="@")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all, in order")
    parser.add_argument("--only", nargs="+", metavar="STEP", default=[], help="of those there are")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="fast profile, tiny settings")
    parser.add_argument("--limit", type=float, default=510, help="seconds of each part")
    parser.add_argument("--publish", action="store_true", help="copy the figures to figures/")
    parser.add_argument("--output", type=Path, help="the report (default: reports/gpu[-quick])")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="of DEVICE.json")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install from there")
    parser.add_argument("--download-wheels", type=Path, metavar="FOLDER", help="and do no more")
    parser.add_argument("--python-version", default="{}.{}".format(*sys.version_info))
    parser.add_argument("--there", nargs="+", default=[*wheels.THERE], metavar="PACKAGE",
                        help="of which no wheel is needed; @FILE: one a line")  # fmt: skip
    options = parser.parse_args(arguments)
    reports, quick = ROOT / "reports", options.quick
    options.output = (options.output or reports / f"gpu{'-quick' * quick}").resolve()
    options.results = options.results or (reports if quick else ROOT / "benchmarks" / "results")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    if options.download_wheels:
        wheels.download(options.download_wheels, options.python_version, options.there)
        return 0
    if options.wheels:
        wheels.enter(options.wheels, sys.argv[1:])
        os.environ["GNETLAB_OFFLINE"] = "1"
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.path.insert(0, str(ROOT))
    from gnetlab.measure.devices import device_name, resolve_device

    try:
        options.device = str(resolve_device(options.device))
    except ValueError as error:
        print(f"error: {error}. --device cpu --quick tries the same steps", file=sys.stderr)
        return 2
    known = [step.name for part in options.part or PARTS for step in steps(part, options)]
    if unknown := sorted({*options.only} - {*known}):
        print(
            f"error: no such step: {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr
        )
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", device_name(options.device).lower()).strip("-")
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{name}{'-quick' * options.quick}.json"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        taken = measure_parts(options, path)
    except KeyboardInterrupt:
        return 130
    summary(taken)
    print(f"Results: {path}")
    bad = [e for e in taken if e["status"] != DONE and not e["status"].startswith(LEFT_OUT)]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
