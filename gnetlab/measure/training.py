"""Experiments: trainings on a grid of settings, kept on disk, and what to read off them.

`Experiment`   everything that decides a training run
`study()`      run what is missing of a grid, and return all of it as one frame
`local_executor()`  processes on this machine that share its cores, or its GPU
`escape_steps()`, `escape_summary()`  when runs left the plateau at chance
`generalization()`, `paired_difference()`  the gap between training and test images

The loop itself is `gnetlab.measure.loop`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import queue
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from gnetlab.measure.devices import device_name, resolve_device, tell
from gnetlab.measure.distributed import own_device, processes
from gnetlab.measure.gradients import HEAD_WEIGHT, GradientRecorder
from gnetlab.measure.loop import METRICS, check_options, train
from gnetlab.net.architecture import architecture
from gnetlab.net.data import check_name, load
from gnetlab.net.model import INITS, GoogLeNet, googlenet

HEADS = {"none": (), "lower": ("aux1",), "upper": ("aux2",), "both": ("aux1", "aux2")}
NORMS = {"none": None, "lrn": "lrn", "batch": "batch"}
FRAMES = ("metrics", "gradients")
# Accuracy of other people's GoogLeNets on the test set.
PUBLISHED = {
    "fashion-mnist": "93.7% (zalando's README)",
    "cifar10": "89.7% (UvA's tutorial 5, 260k parameters), 92.9% (huyvnphan), 93.6% (conan7882)",
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run: the same experiment gives the same result, on the CPU bit for bit.

    norm           "none", "lrn" or "batch"
    init           "default" (PyTorch's), "gain G" (std G * sqrt(2 / fan_in)), or a name that
                   `gnetlab.net.model.initialize` knows
    heads          "none", "lower" (aux1), "upper" (aux2) or "both"
    heads_until    fraction of the steps after which the heads' losses no longer count
    train_batches  batches of 256 training images evaluated beside each test
    gradients_every  steps between splits of the gradient by its source (0: none)

    The others are those of `googlenet`, `gnetlab.net.data.load` and `gnetlab.measure.loop.train`.
    """

    data: str = "photocrops"
    size: int = 32
    stem: str = "compact"
    width: float = 0.25
    extra_modules: int = 0
    norm: str = "none"
    init: str = "default"
    heads: str = "both"
    head_weight: float = HEAD_WEIGHT
    heads_until: float = 1.0
    optimizer: str = "sgd"
    learning_rate: float = 0.05
    weight_decay: float = 0.0
    cosine: bool = False
    clip: float | None = 1.0
    batch_size: int = 32
    steps: int = 300
    test_every: int | None = None
    train_batches: int = 0
    gradients_every: int = 0
    mixed_precision: bool = False
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _checked(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        for name, known in (("norm", NORMS), ("heads", HEADS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name}={value!r} asked; choose one of {', '.join(known)}")
        if self.stem == "cifar" and self.norm == "lrn":
            raise ValueError(
                "norm='lrn' asked with stem='cifar', which has none of the pools that LRN follows: "
                "the network would be that of norm='none'; ask for that, or for stem='compact'"
            )
        init = _initialization(self.init)
        if isinstance(init, tuple):  # "gain 1" and "gain 1.0" are the same experiment
            object.__setattr__(self, "init", f"gain {init[1]:g}")
        check_name(self.data)
        check_options(self.optimizer, self.heads_until, self.clip)
        architecture(stem=self.stem, width=self.width, extra_modules=self.extra_modules)

    def network(self, classes: int, in_channels: int) -> GoogLeNet:
        """The network before training. Heads do not shift what the trunk draws."""
        return googlenet(
            stem=self.stem, width=self.width, extra_modules=self.extra_modules,
            norm=NORMS[self.norm], init=_initialization(self.init), aux=HEADS[self.heads],
            num_classes=classes, in_channels=in_channels, seed=self.seed,
        )  # fmt: skip

    def key(self, device: str) -> str:
        """Names the record: a digest of the experiment, the kind of device, and the code."""
        content = [dataclasses.asdict(self), device, _code(), torch.__version__]
        if self.data.startswith("folder:"):
            content.append(_listing(Path(self.data.removeprefix("folder:")).expanduser()))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


_LEAST = {
    "seed": 0, "size": 1, "steps": 1, "batch_size": 1, "test_every": 1, "train_batches": 0,
    "gradients_every": 0, "extra_modules": 0, "weight_decay": 0, "head_weight": 0,
}  # fmt: skip


def _checked(name: str, kind: str, value: Any) -> Any:
    """The value of a field, as its type; ValueError if it is of another or out of range."""
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    kind, _, optional = kind.partition(" | ")
    if value is None and optional:
        return None
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)  # 1 and 1.0 are the same experiment
    if type(value) is not kinds[kind] and name not in ("norm", "heads"):  # which list theirs
        raise ValueError(f"{name}={value!r} asked; give {kind}{optional and ' or None'}")
    if kind in ("str", "bool"):
        return value
    least, above = _LEAST.get(name, 0), name in ("learning_rate", "clip", "width")
    if not (least < value if above else least <= value) or value == math.inf:
        raise ValueError(
            f"{name}={value!r} asked; give {'more than' if above else 'at least'} {least}"
        )
    return value


def _listing(folder: Path) -> str:
    """What a folder of images holds, by names, sizes and times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    lines = [f"{p.relative_to(folder)} {s.st_size} {s.st_mtime_ns}" for p, s in stats]
    return hashlib.sha256("\n".join([str(folder.resolve()), *lines]).encode()).hexdigest()


def _initialization(name: str) -> str | tuple[str, float] | None:
    """What `googlenet` takes.

    >>> _initialization("gain 0.6"), _initialization("default")
    (('gain', 0.6), None)
    """
    gain = re.fullmatch(r"gain (\d+\.?\d*(?:e[+-]?\d+)?)", name)
    if not gain and name not in ("default", *INITS):
        raise ValueError(
            f"init={name!r} asked; choose one of default, {', '.join(INITS)}, or as 'gain 0.6'"
        )
    return ("gain", float(gain[1])) if gain else None if name == "default" else name


@functools.cache
def _code() -> str:
    """Digest of the files that decide a result: records of other code are not reused."""
    here = Path(__file__).parent
    names = ("loop.py", "steps.py", "gradients.py", "../net/model.py", "../net/architecture.py",
             "../net/data.py", "../net/datasets.py")  # fmt: skip
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()


def study(
    grid: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    folder: str | Path,
    device: str | torch.device = "auto",
    executor: Any = None,
    frame: str = "metrics",
    progress: bool = True,
    **shared: Any,
) -> pd.DataFrame:
    """Run every experiment of a grid that `folder` has no record of, and return all of them.

    grid      field of `Experiment` -> a value, or a list of values of which every combination is
              run; or several such grids
    folder    gets one file of JSON lines per run, written at its end and whole or not at all: a
              study that was killed loses the runs in flight, and goes on when called again. A
              record is reused for the same experiment, kind of device, torch and gnetlab code
    device    "auto", "cpu", "cuda", "cuda:1" or "mps"
    executor  anything with `submit` whose futures have `add_done_callback`, as those of
              concurrent.futures and a Dask client; None runs here, one after another. Give it
              processes: threads of one process take turns
    frame     "metrics" or "gradients" (of experiments with `gradients_every`)
    progress  a bar, on a terminal and in Jupyter only
    shared    fields that all experiments have in common

    Columns: those of `gnetlab.measure.loop.train`, or `step` (updates made before) and those of
    `gradient_flow`; and `run` (the record's name), `stopped` (why a run ended early, else ""),
    `steps` (as planned), and every field that `grid` names.

    A run whose loss becomes infinite or NaN is a result: its metrics until then are kept. Any other
    error ends the study; finished runs are kept. So they are at Ctrl-C, when an executor's
    processes still end what they have begun.

    Under `torchrun --nproc-per-node N script.py`, whose N processes all call this, each takes every
    N-th of the missing runs, on a GPU of its own, and all return the whole frame. A run is the same
    as without torchrun: small networks gain nothing from sharing a batch. `folder` must be on a
    disk that all see; after a killed process `--max-restarts` goes on from the finished runs.

    Raises ValueError for unknown fields, values, or data
    and for a folder that cannot be written, before anything runs.

    >>> import gnetlab as gl
    >>> grid = {"heads": ["none", "both"], "seed": [0, 1]}
    >>> shared = {"steps": 2, "batch_size": 8, "width": 0.125, "size": 16}
    >>> metrics = gl.study(grid, folder="runs", device="cpu", **shared)
    >>> metrics.groupby("heads").run.nunique().to_dict()
    {'both': 2, 'none': 2}
    >>> again = gl.study(grid, folder="runs", device="cpu", **shared)  # read, not run
    >>> again.equals(metrics)
    True
    """
    if frame not in FRAMES:
        raise ValueError(f"frame={frame!r} asked; choose {' or '.join(FRAMES)}")
    experiments, named = _experiments(grid, shared)
    folder, device = Path(folder), own_device(device)
    among = processes(device)
    if executor and among.size > 1:
        raise ValueError(
            f"executor={executor!r} asked under torchrun, whose {among.size} processes share the "
            "runs already; leave one of the two out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}; choose another folder") from error
    paths = {folder / f"{e.key(device.type)}.jsonl": e for e in experiments}
    missing = {path: e for path, e in paths.items() if not path.exists()}
    for name, size in {(e.data, e.size) for e in missing.values() if e.data != "photocrops"}:
        _data(name, size, str(device))  # data that are not there are noticed here
    if executor:
        _run_elsewhere(missing, str(device), executor, progress, folder)
    else:
        with among.shared_out([path.name for path in missing]) as names:
            mine = {folder / name: paths[folder / name] for name in names}
            _run_here(mine, str(device), progress and among.first)
    frames = []
    for path, experiment in paths.items():
        facts, found = _read_record(path, frame)
        fields = {name: getattr(experiment, name) for name in ("steps", *named)}
        if facts["parts"] > 1:
            tell(f"{path.name} was run in half batches, for lack of memory; batch norm saw these")
        frames.append(found.assign(run=path.stem, stopped=facts["stopped"] or "", **fields))
    frames = [found for found in frames if len(found)] or frames[:1]
    return pd.concat(frames, ignore_index=True)


def _experiments(grid: Any, shared: Mapping[str, Any]) -> tuple[list[Experiment], list[str]]:
    known = [field.name for field in dataclasses.fields(Experiment)]
    grids = [grid] if isinstance(grid, Mapping) else list(grid)
    experiments: dict[Experiment, None] = {}
    named: dict[str, None] = {}
    for fields in grids:
        unknown = [name for name in {**shared, **fields} if name not in known]
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}; an Experiment has {', '.join(known)}")
        many = {
            name: list(value) if isinstance(value, Iterable) and not isinstance(value, str) else
            [value] for name, value in fields.items()
        }  # fmt: skip
        for values in itertools.product(*many.values()):
            chosen = {**shared, **dict(zip(many, values, strict=True))}
            # numpy's and pandas' numbers as Python's
            chosen = {k: v.item() if hasattr(v, "item") else v for k, v in chosen.items()}
            experiments[Experiment(**chosen)] = None
        named |= dict.fromkeys(many)
    if not experiments:
        raise ValueError(f"grid={grid!r} has no experiments; give each field at least one value")
    return list(experiments), list(named)


def _run_here(missing: Mapping[Path, Experiment], device: str, progress: bool) -> None:
    with _bar(missing, progress) as bar:
        for path, experiment in missing.items():
            _write(path, run(experiment, device))
            bar.update()


def _bar(missing: Mapping[Path, Experiment], progress: bool) -> tqdm:
    return tqdm(total=len(missing), unit="run", disable=(not progress or not missing) or None)


def _run_elsewhere(
    missing: Mapping[Path, Experiment], device: str, executor: Any, progress: bool, folder: Path
) -> None:
    bar = _bar(missing, progress)
    finished: queue.Queue = queue.Queue()

    def keep(path: Path, future: Any) -> None:
        # Called where the run ends, also after this study was interrupted.
        try:
            _write(path, future.result())
        except BaseException as error:  # raised again where the study waits
            finished.put(error)
        else:
            finished.put(None)

    futures = []
    try:
        for path, experiment in missing.items():
            futures.append(executor.submit(run, experiment, device))
            futures[-1].add_done_callback(functools.partial(keep, path))
        for _ in futures:
            error = finished.get()
            if error:
                raise error
            bar.update()
    except concurrent.futures.BrokenExecutor as error:
        raise RuntimeError(
            f"a process that ran experiments ended ({error}). Out of memory? Then use fewer "
            "processes. In a script? There `local_executor()` belongs under "
            f"`if __name__ == '__main__':`. Runs that were done are kept in {folder}: call again, "
            "with a new executor, to go on"
        ) from error
    finally:
        bar.close()
        for future in futures:
            future.cancel()


_ONE_AT_A_TIME = threading.Lock()  # runs seed the random state, which threads share


def run(experiment: Experiment, device: str = "cpu") -> str:
    """Run one experiment and return its record, as JSON lines; what a worker does."""
    with _ONE_AT_A_TIME:
        return _run(experiment, device)


def _run(experiment: Experiment, device: str) -> str:
    data = _data(experiment.data, experiment.size, device)
    model = experiment.network(len(data.classes), data.in_channels).to(data.device)
    recorder = GradientRecorder(model, every=experiment.gradients_every)
    start, stopped = time.perf_counter(), None
    names = ("steps", "batch_size", "learning_rate", "optimizer", "weight_decay", "cosine", "clip",
             "head_weight", "heads_until", "test_every", "train_batches", "mixed_precision",
             "deterministic", "seed")  # fmt: skip
    try:
        metrics = train(
            model, data, channels_last=True, progress=False, distributed=False,
            gradients=recorder if experiment.gradients_every else None,
            **{name: getattr(experiment, name) for name in names},
        )  # fmt: skip
    except RuntimeError as error:
        if not hasattr(error, "metrics"):
            raise
        metrics, stopped = error.metrics, str(error).partition(";")[0]
    facts = {
        "seconds": time.perf_counter() - start, "stopped": stopped,
        "parts": metrics.attrs["parts"],
        "device": device_name(torch.device(device)), "torch": torch.__version__,
    }  # fmt: skip
    lines = [{"experiment": dataclasses.asdict(experiment), **facts}]
    for name, table in zip(FRAMES, (metrics, recorder.splits()), strict=True):
        whole = table.astype(object).where(table.notna(), None)
        lines.append({"frame": name, "columns": whole.to_dict("list")})
    return "".join(json.dumps(line) + "\n" for line in lines)


@functools.lru_cache(maxsize=2)
def _data(name: str, size: int, device: str) -> Any:
    return load(name, size=size, device=device)


def _write(path: Path, record: str) -> None:
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.write_text(record)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_record(path: Path, frame: str) -> tuple[dict[str, Any], pd.DataFrame]:
    try:
        facts, *frames = map(json.loads, path.read_text().splitlines())
        columns = next(line["columns"] for line in frames if line["frame"] == frame)
        found = pd.DataFrame(columns).infer_objects()
        for name in ("loss", "accuracy"):
            if name in found:
                found[name] = found[name].astype(float)
        return facts, found
    except (ValueError, KeyError, StopIteration, TypeError) as error:
        raise ValueError(
            f"{path} is not a whole record ({type(error).__name__}: {error}); delete it, and the "
            "run is done again"
        ) from error


def local_executor(
    device: str | torch.device = "auto", workers: int | None = None
) -> concurrent.futures.Executor:
    """Processes for `study`: on the CPU one per core, with a thread each; four on every GPU.

    A small network uses neither two cores nor a whole GPU well: several at once are done sooner.
    "auto" and "cuda" are all GPUs of the machine, "cuda:1" is that one. In a script, call it under
    `if __name__ == "__main__":`, as the processes import the script.

    In a notebook that `gnetlab report --scheduler` has sent to a Dask cluster (it sets
    GNETLAB_SCHEDULER), the workers of that cluster run the experiments, whatever `workers` says.
    """
    found = resolve_device(str(device))
    if address := os.environ.get("GNETLAB_SCHEDULER"):
        return _cluster_executor(address, found.type == "cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = int(os.environ.get("GNETLAB_CORES", cores))  # this notebook's share of them
    gpus = range(torch.cuda.device_count()) if found == torch.device("cuda") else []
    workers = workers or (cores if found.type == "cpu" else 4 * max(1, len(gpus)))
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()  # each process takes one
    for _, gpu in zip(range(workers), itertools.cycle(gpus or [None]), strict=False):
        places.put(gpu)
    threads = max(1, cores // workers)
    return concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (threads, places))


def _cluster_executor(address: str, on_cpu: bool) -> concurrent.futures.Executor:
    from distributed import Client
    from distributed.cfexecutor import ClientExecutor

    class Executor(ClientExecutor):
        def submit(self, function: Any, *arguments: Any) -> concurrent.futures.Future:
            return super().submit(_on_worker, function, *arguments)

    client = Client(address, set_as_default=False)
    on_gpu = not on_cpu and any(client.run(_offers_gpu).values())
    # None is reserved, only a worker with some is asked for: this notebook holds one, perhaps the
    # only one, and waits.
    resources = {"GPU": 0} if on_gpu else None
    return Executor(client, pure=False, resources=resources)


def _offers_gpu(dask_worker: Any) -> bool:
    return "GPU" in dask_worker.state.total_resources


def _on_worker(function: Any, *arguments: Any) -> Any:
    from distributed import get_worker

    torch.set_num_threads(get_worker().state.nthreads)
    return function(*arguments)


def _begin(threads: int, places: Any) -> None:
    """What a worker does first; it ends with its parent, even a killed one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: the pool stays whole
    torch.set_num_threads(threads)
    gpu = places.get()
    if gpu is not None:
        torch.cuda.set_device(gpu)  # which "cuda" is from now on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def escape_steps(
    metrics: pd.DataFrame, classes: int, *, source: str = "main", smooth: int = 10
) -> pd.DataFrame:
    """When each run left the plateau at chance. `metrics` as from `study`.

    Columns: `run` and what else `metrics` says of the runs, `steps` among it; `escape_step`
    (first step at which the training loss of `source`, averaged over `smooth` steps, is below 95%
    of chance, ln classes; NA if it never is), `test_loss` (nats) and `test_accuracy` (fraction) at
    the end, NA for a run that stopped early.
    """
    about = [name for name in metrics if name not in METRICS]
    rows = []
    for _, one in metrics.groupby("run", sort=False):
        chosen = one[(one.split == "train") & (one.source == source)].set_index("step")
        loss = chosen.loss.rolling(smooth).mean()
        below = loss.index[loss < 0.95 * math.log(classes)]
        at_end = (one.step == one.step.max()) & (one.source == "main")
        test = one[at_end & (one.split == "test")]
        rows.append(
            {
                **one.iloc[0][about].to_dict(),
                "escape_step": below[0] if len(below) else pd.NA,
                "test_loss": test.loss.item() if len(test) else np.nan,
                "test_accuracy": test.accuracy.item() if len(test) else np.nan,
            }
        )  # fmt: skip
    return pd.DataFrame(rows).astype({"escape_step": "Int64"})


def escape_summary(
    escapes: pd.DataFrame, by: str | Sequence[str], *, resamples: int = 5000, seed: int = 0
) -> pd.DataFrame:
    """Steps to leave the plateau, over seeds.

    A run that never left, or whose loss became infinite before, counts with the length that was
    planned, so that a mean which reaches it means "none left", and every other one is a lower bound
    where some did not.

    Columns: `by`, `seeds` (runs), `escaped` (of them), `mean_steps`, `low`, `high` (interval of the
    mean by the percentile bootstrap over runs, nominally of 95%; NaN for fewer than three runs and
    where none escaped), `steps` (planned, at most), `test_accuracy` (mean). Of three runs the
    interval is their range, which holds the true mean about three times in four.
    """
    by, random = [by] if isinstance(by, str) else list(by), np.random.default_rng(seed)
    rows = []
    for key, runs in escapes.groupby(by, sort=False, dropna=False):
        values = runs.escape_step.fillna(runs.steps).to_numpy(float)
        escaped, low, high = int(runs.escape_step.notna().sum()), np.nan, np.nan
        if escaped and len(runs) >= 3:
            means = random.choice(values, (resamples, len(values))).mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
        rows.append(
            {
                **dict(zip(by, key, strict=True)), "seeds": len(runs),
                "escaped": escaped, "mean_steps": values.mean(),
                "low": low, "high": high, "steps": int(runs.steps.max()),
                "test_accuracy": runs.test_accuracy.mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def generalization(metrics: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on training and on test images at the end of each run, both in eval mode.

    Runs that stopped early are left out.

    metrics   as from `study` of experiments with `train_batches`
    Columns: `run` and what else `metrics` says of the runs, `train_accuracy`, `test_accuracy`
    (fractions), `gap` (the first less the second).
    """
    about = [name for name in metrics if name not in METRICS]
    scores = metrics[metrics.split.isin(["train_eval", "test"]) & (metrics.source == "main")]
    if "train_eval" not in set(scores.split):
        raise ValueError(
            "no run has an accuracy on training images: run the study with train_batches=8, and "
            "see in the column `stopped` whether they ended early"
        )
    last = scores[scores.step == metrics.groupby("run").step.max()[scores.run].to_numpy()]
    table = last.pivot(index=about, columns="split", values="accuracy")[["train_eval", "test"]]
    table = table.set_axis(["train_accuracy", "test_accuracy"], axis=1).reset_index()
    order = {name: i for i, name in enumerate(dict.fromkeys(metrics.run))}
    table = table.sort_values("run", key=lambda names: names.map(order), ignore_index=True)
    return table.assign(gap=table.train_accuracy - table.test_accuracy)


def paired_difference(
    frame: pd.DataFrame, value: str, by: str, one: Any, other: Any
) -> dict[str, float]:
    """`value` where `by` is `one`, less where it is `other`, within seeds.

    Returns `mean`, `low`, `high` (95% interval by Student's t; NaN for a single seed), `seeds`.
    """
    from scipy.stats import t

    table = frame.pivot(index="seed", columns=by, values=value)
    differences = (table[one] - table[other]).dropna()
    count, mean = len(differences), float(differences.mean())
    reach = float(t.ppf(0.975, count - 1) * differences.sem()) if count > 1 else math.nan
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "seeds": count}
