"""Experiments: what decides a run, what is kept of it, and what is read off the results."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import queue
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp

import gnetlab as gl
from gnetlab.measure import devices, training
from gnetlab.measure.gradients import GradientRecorder, gradient_flow
from gnetlab.measure.loop import METRICS, train
from gnetlab.measure.training import (
    Experiment,
    escape_steps,
    escape_summary,
    generalization,
    local_executor,
    paired_difference,
    study,
)
from gnetlab.net.model import INITS

TINY = {"size": 16, "width": 0.1, "batch_size": 4, "steps": 2}
real_run, real_load = training.run, training.load


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    """PhotoCrops with 32 test images in place of 1024; also forgets what earlier tests loaded."""

    @functools.lru_cache
    def load(name, size, device):
        data = real_load(name, size=size, device=device)
        data.test_size = 32
        return data

    monkeypatch.setattr(training, "_data", load)


def record(experiment, stopped=None, parts=1, **columns):
    """A record that needs no training: the loss is the seed."""
    columns = {"step": [1], "split": ["train"], "source": ["main"], "loss": [experiment.seed * 1.0],
               "accuracy": [None]} | columns  # fmt: skip
    facts = {"stopped": stopped, "parts": parts, "seconds": 1.0}
    lines = [
        {"experiment": dataclasses.asdict(experiment), **facts},
        {"frame": "metrics", "columns": columns},
        {"frame": "gradients", "columns": {"step": [], "module": []}},
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def ran(monkeypatch):
    """Runs are faked and counted: the seeds in the order in which they ran."""
    seeds = []

    def run(experiment, device="cpu"):
        assert device == "cpu"
        seeds.append(experiment.seed)
        return record(experiment)

    monkeypatch.setattr(training, "run", run)
    return seeds


def fails_at(monkeypatch, seed, error):
    def run(experiment, device="cpu"):  # noqa: ARG001
        if experiment.seed == seed:
            raise error
        return record(experiment)

    monkeypatch.setattr(training, "run", run)


def records_in(folder):
    return [json.loads(p.read_text().splitlines()[0])["experiment"] for p in folder.glob("*.jsonl")]


def seeds_in(folder):
    # a run that goes on beside the one that failed may be writing just now
    assert all(path.suffix == ".jsonl" or path.name.startswith(".") for path in folder.iterdir())
    return sorted(one["seed"] for one in records_in(folder))


@pytest.mark.parametrize(
    ("field", "value", "known"),
    [
        ("norm", "batchnorm", ["none", "lrn", "batch"]),
        ("norm", None, ["none", "lrn", "batch"]),
        ("heads", "aux1", ["none", "lower", "upper", "both"]),
        ("optimizer", "rmsprop", ["sgd", "adam"]),
        ("init", "he", ["default", *INITS, "gain 0.6"]),
        ("init", "gain", ["default", "gain 0.6"]),
        ("init", "gain -1", ["default", "gain 0.6"]),
        ("init", "gain 0.6 ", ["default", "gain 0.6"]),
    ],
)  # fmt: skip
def test_an_experiment_refuses_unknown_names_and_lists_the_known(field, value, known):
    with pytest.raises(ValueError, match="asked; choose one of") as caught:
        Experiment(**{field: value})
    assert f"{field}={value!r}" in str(caught.value)
    assert all(name in str(caught.value).partition("choose one of")[2] for name in known)


@pytest.mark.parametrize("init", ["default", "caffe", "kaiming", "gain 0.6", "gain 2", "gain 1."])
def test_an_experiment_takes_every_initialization(init):
    Experiment(init=init)


OTHERS = {
    "data": "cifar10", "size": 33, "stem": "paper", "width": 0.5, "extra_modules": 1,
    "norm": "batch", "init": "xavier", "heads": "none", "head_weight": 0.31, "heads_until": 0.5,
    "optimizer": "adam", "learning_rate": 0.051, "weight_decay": 1e-4, "cosine": True,
    "clip": None, "batch_size": 33, "steps": 301, "test_every": 1, "train_batches": 1,
    "gradients_every": 1, "mixed_precision": True, "deterministic": True, "seed": 1,
}  # fmt: skip


def test_every_field_changes_the_key():
    assert list(OTHERS) == [field.name for field in dataclasses.fields(Experiment)]
    changed = [Experiment(**{name: value}) for name, value in OTHERS.items()]
    keys = [one.key("cpu") for one in [Experiment(), *changed]]
    assert len(set(keys)) == len(OTHERS) + 1
    assert all(len(key) >= 16 and key.isalnum() for key in keys)


def test_the_key_depends_on_device_and_code_and_nothing_else(monkeypatch):
    one, other = Experiment(**OTHERS), Experiment(**OTHERS)
    key = one.key("cpu")
    assert other.key("cpu") == key
    assert one.key("cuda") != key
    monkeypatch.setattr(training, "_code", lambda: "another code")
    assert one.key("cpu") != key
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert one.key("cpu") != key


def test_equal_experiments_have_equal_keys_though_the_types_of_their_numbers_differ():
    assert Experiment(learning_rate=1) == Experiment(learning_rate=1.0)
    assert Experiment(learning_rate=1).key("cpu") == Experiment(learning_rate=1.0).key("cpu")


def test_the_code_is_digested_file_by_file(tmp_path, monkeypatch):
    names = ["measure/loop.py", "measure/steps.py", "measure/gradients.py", "net/model.py",
             "net/architecture.py", "net/data.py", "net/datasets.py"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(training, "__file__", str(tmp_path / "measure/training.py"))
    digests = {training._code.__wrapped__()}
    for name in names:
        (tmp_path / name).write_text("changed")
        digests.add(training._code.__wrapped__())
    assert len(digests) == len(names) + 1


def test_the_network_is_as_the_experiment_says():
    options = {"stem": "compact", "width": 0.1, "extra_modules": 1, "seed": 3}
    for fields, arguments in [
        ({"norm": "batch", "heads": "lower"}, {"norm": "batch", "aux": "aux1"}),
        ({"norm": "lrn", "init": "gain 0.6"}, {"norm": "lrn", "init": ("gain", 0.6), "aux": True}),
        ({"heads": "upper", "init": "caffe"}, {"norm": None, "init": "caffe", "aux": "aux2"}),
        ({"heads": "none"}, {"norm": None, "aux": False}),
    ]:
        found = Experiment(**fields, **options).network(7, 1)
        direct = gl.googlenet(**arguments, **options, num_classes=7, in_channels=1)
        assert found.architecture == direct.architecture
        state = direct.state_dict()
        assert state.keys() == found.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())


def test_heads_do_not_shift_what_the_trunk_draws():
    options = {"width": 0.1, "init": "xavier"}
    alone, both = (Experiment(heads=heads, **options).network(4, 3) for heads in ("none", "both"))
    state = both.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in alone.state_dict().items())


def body(text):
    first, *rest = map(json.loads, text.splitlines())
    return {key: value for key, value in first.items() if key != "seconds"}, rest


def test_equal_experiments_give_equal_records():
    options = TINY | {"gradients_every": 1, "train_batches": 1, "test_every": 1}
    one, other = (body(training.run(Experiment(**options, seed=s))) for s in (5, 5))
    assert one == other
    facts, (metrics, gradients) = one
    assert facts["experiment"] == dataclasses.asdict(Experiment(**options, seed=5))
    assert facts["stopped"] is None
    assert facts["parts"] == 1
    assert (metrics["frame"], gradients["frame"]) == ("metrics", "gradients")
    _, other_seed = body(training.run(Experiment(**options, seed=6)))
    assert other_seed[0]["columns"]["loss"] != metrics["columns"]["loss"]


def test_a_run_is_train_of_the_network_with_every_option():
    experiment = Experiment(
        size=16, width=0.1, norm="batch", heads_until=0.5, head_weight=0.7, optimizer="adam",
        learning_rate=0.01, weight_decay=0.1, cosine=True, clip=0.5, batch_size=4, steps=4,
        test_every=3, train_batches=1, gradients_every=2, mixed_precision=True, seed=3,
    )  # fmt: skip
    data = training._data("photocrops", 16, "cpu")
    model = experiment.network(16, 3)
    recorder = GradientRecorder(model, every=2)
    metrics = train(
        model, data, head_weight=0.7, heads_until=0.5, optimizer="adam", learning_rate=0.01,
        weight_decay=0.1, cosine=True, clip=0.5, batch_size=4, steps=4, test_every=3,
        train_batches=1, gradients=recorder, mixed_precision=True, seed=3, channels_last=True,
        progress=False,
    )  # fmt: skip
    _, (found, gradients) = body(training.run(experiment))
    pd.testing.assert_frame_equal(pd.DataFrame(found["columns"]), metrics, check_exact=True)
    split = pd.DataFrame(gradients["columns"])
    pd.testing.assert_frame_equal(split, recorder.splits(), check_exact=True)
    assert set(split.step) == {0, 2}


def test_a_study_is_a_frame_of_all_runs(tmp_path):
    grid = {"heads": ["none", "both"], "seed": range(2)}
    folder = tmp_path / "deeper" / "still"
    frame = study(grid, folder=folder, device="cpu", progress=False, **TINY)
    assert list(frame.columns) == [*METRICS, "run", "stopped", "steps", "heads", "seed"]
    assert frame.index.equals(pd.RangeIndex(len(frame)))
    runs = frame.drop_duplicates("run")
    expected = list(itertools.product(["none", "both"], [0, 1]))
    assert list(zip(runs.heads, runs.seed, strict=True)) == expected
    keys = [Experiment(heads=h, seed=s, **TINY).key("cpu") for h, s in expected]
    assert runs.run.tolist() == keys
    assert {p.name for p in folder.iterdir()} == {f"{key}.jsonl" for key in keys}
    assert (frame.stopped == "").all()
    for heads, seed in expected:
        experiment = Experiment(heads=heads, seed=seed, **TINY)
        alone = train(
            experiment.network(16, 3), training._data("photocrops", 16, "cpu"), steps=2,
            batch_size=4, clip=1.0, seed=seed, channels_last=True, progress=False,
        )  # fmt: skip
        rows = frame[(frame.heads == heads) & (frame.seed == seed)][list(METRICS)]
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), alone, check_exact=True)


def test_a_study_of_the_gradients(tmp_path):
    options = TINY | {"device": "cpu", "folder": tmp_path, "progress": False}
    grid = {"seed": [4], "gradients_every": 1}
    found = study(grid, frame="gradients", **options)
    model = Experiment(**TINY, seed=4).network(16, 3)
    batch = training._data("photocrops", 16, "cpu").train_batch(0, 4, 4)
    torch.manual_seed(4)
    flow = gradient_flow(model.to(memory_format=torch.channels_last), *batch)
    assert list(found.columns) == [
        "step", *flow.columns, "run", "stopped", "steps", "seed", "gradients_every",
    ]  # fmt: skip
    assert sorted(set(found.step)) == [0, 1]
    first = found[found.step == 0][flow.columns]
    pd.testing.assert_frame_equal(first, flow, rtol=1e-4, atol=1e-9)
    without = study({"seed": [4]}, frame="gradients", **options)
    assert len(without) == 0
    both = study({"seed": [4], "gradients_every": [0, 1]}, frame="gradients", **options)
    pd.testing.assert_frame_equal(both, found)


@pytest.mark.parametrize(
    ("grid", "shared", "expected"),
    [
        ({"seed": [2, 0, 1]}, {}, [{"seed": s} for s in (2, 0, 1)]),
        ({"seed": 7}, {"norm": "batch"}, [{"seed": 7, "norm": "batch"}]),
        ({"norm": "lrn", "seed": (1, 2)}, {}, [{"norm": "lrn", "seed": s} for s in (1, 2)]),
        (
            {"clip": [None, 0.5], "seed": iter([1, 0])},
            {"steps": 5},
            [{"clip": c, "seed": s, "steps": 5} for c in (None, 0.5) for s in (1, 0)],
        ),
        (
            [{"norm": "batch", "seed": [0, 1]}, {"heads": "none", "seed": [1]}, {"seed": 9}],
            {"width": 0.1},
            [
                {"norm": "batch", "seed": 0, "width": 0.1},
                {"norm": "batch", "seed": 1, "width": 0.1},
                {"heads": "none", "seed": 1, "width": 0.1},
                {"seed": 9, "width": 0.1},
            ],
        ),
        (({"seed": s} for s in (1, 0, 1)), {}, [{"seed": 1}, {"seed": 0}]),
        ({"seed": [1, 2], "steps": 5}, {"steps": 9}, [{"seed": s, "steps": 5} for s in (1, 2)]),
    ],
)
def test_what_a_grid_means(tmp_path, ran, grid, shared, expected):
    frame = study(grid, folder=tmp_path, device="cpu", progress=False, **shared)
    experiments = [Experiment(**fields) for fields in expected]
    assert ran == [e.seed for e in experiments]
    assert frame.run.tolist() == [e.key("cpu") for e in experiments]
    assert {json.dumps(e) for e in records_in(tmp_path)} == {
        json.dumps(dataclasses.asdict(e)) for e in experiments
    }


def test_columns_of_several_grids(tmp_path, ran):
    grids = [{"norm": "batch", "seed": [0, 1]}, {"heads": "none", "seed": 1}]
    frame = study(grids, folder=tmp_path, device="cpu", progress=False, width=0.1)
    assert list(frame.columns) == [*METRICS, "run", "stopped", "steps", "norm", "seed", "heads"]
    assert frame.norm.tolist() == ["batch", "batch", "none"]
    assert frame.heads.tolist() == ["both", "both", "none"]
    assert len(ran) == 3


def test_a_study_runs_only_what_is_missing(tmp_path, ran, monkeypatch):
    options = {"folder": tmp_path, "device": "cpu", "progress": False}
    first = study({"seed": [1, 0]}, **options)
    assert first.dtypes[["loss", "accuracy"]].eq("float64").all()  # though all are missing
    assert study({"seed": [1, 0]}, **options).equals(first)
    assert ran == [1, 0]
    more = study({"seed": [3, 1, 2, 0]}, **options)
    assert ran == [1, 0, 3, 2]
    assert more.loss.tolist() == [3, 1, 2, 0]
    assert more.seed.tolist() == [3, 1, 2, 0]
    monkeypatch.setattr(training, "_code", lambda: "another code")
    study({"seed": [1]}, **options)
    assert ran == [1, 0, 3, 2, 1]


def test_a_run_in_half_batches_is_told_of_whenever_it_is_read(tmp_path, monkeypatch, recwarn):
    options = {"folder": tmp_path, "device": "cpu", "progress": False}
    monkeypatch.setattr(training, "run", lambda e, _: record(e, parts=1 + e.seed))
    study({"seed": [0]}, **options)
    assert not recwarn.list
    for _ in "when it runs", "when it is read":
        training.tell.cache_clear()
        with pytest.warns(UserWarning, match=r"^\w+\.jsonl was run in half batches") as said:
            study({"seed": [0, 1]}, **options)
        assert len(said) == 1


def test_a_run_in_half_batches_says_so_in_its_record(monkeypatch):
    def halved(*given, **options):
        metrics = train(*given, **options)
        metrics.attrs["parts"] = 2
        return metrics

    monkeypatch.setattr(training, "train", halved)
    experiment = Experiment(steps=1, batch_size=8, width=0.125, size=16)
    assert json.loads(training.run(experiment).splitlines()[0])["parts"] == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError("no `metrics`")])
def test_an_interrupted_study_keeps_what_is_done_and_goes_on(tmp_path, monkeypatch, error):
    options = {"folder": tmp_path, "device": "cpu", "progress": False}
    fails_at(monkeypatch, 2, error)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        study({"seed": range(4)}, **options)
    assert seeds_in(tmp_path) == [0, 1]
    again = []
    monkeypatch.setattr(training, "run", lambda e, _: again.append(e.seed) or record(e))
    assert study({"seed": range(4)}, **options).seed.tolist() == [0, 1, 2, 3]
    assert again == [2, 3]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_record_is_whole_or_absent(tmp_path, monkeypatch, ran, error):
    def broken(*_):
        raise error("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(error, match="no space left"):
        study({"seed": [0]}, folder=tmp_path, device="cpu", progress=False)
    assert ran == [0]
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_not_there_before_it_is_whole(tmp_path, monkeypatch, ran):
    replace, moved = os.replace, []

    def watched(source, target):
        moved.append((target.exists(), source.parent == target.parent, source.read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    study({"seed": [0]}, folder=tmp_path, device="cpu", progress=False)
    assert moved == [(False, True, record(Experiment()))]
    assert ran == [0]


@pytest.mark.parametrize("kept", [0, 30, 0.5, 0.8, -2, "garbage\n", '{"a": 1}\n', "[]\n[]\n[]\n"])
def test_a_damaged_record_is_an_error_that_names_the_file(tmp_path, ran, kept):
    options = {"folder": tmp_path, "device": "cpu", "progress": False}
    study({"seed": [0, 1]}, **options)
    path = tmp_path / f"{Experiment(seed=1).key('cpu')}.jsonl"
    whole = path.read_text()
    cut = int(kept * len(whole)) if isinstance(kept, float) else kept
    content = cut if isinstance(cut, str) else whole[:cut]
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is not a whole record.*delete it") as caught:
        study({"seed": [0, 1]}, frame="gradients" if kept == -2 else "metrics", **options)
    assert str(path) in str(caught.value)
    assert path.read_text() == content
    assert ran == [0, 1]


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ({"seeds": [0]}, {}, "unknown field 'seeds'; an Experiment has data, size,.*, seed"),
        ([{"seed": [0]}, {"seed": [1], "nrom": 1}], {}, "unknown field 'nrom'"),
        ({"seed": [0]}, {"stepz": 3}, "unknown field 'stepz'"),
        ({"seed": []}, {}, "no experiments"),
        ({"seed": [0, 1], "norm": ()}, {}, "no experiments"),
        ([], {}, "no experiments"),
        ({"seed": [0], "norm": ["none", "group"]}, {}, "norm='group'"),
        ({"norm": ["none", "lrn"]}, {"stem": "cifar"}, "would be that of norm='none'"),
        ({"seed": [0]}, {"init": "zeros"}, "init='zeros'"),
        ({"seed": [0]}, {"frame": "norms"}, "frame='norms' asked; choose metrics or gradients"),
        ({"seed": [0]}, {"device": "tpu"}, "device='tpu'"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_runs(tmp_path, ran, grid, options, message):
    with pytest.raises(ValueError, match=message):
        study(grid, folder=tmp_path, progress=False, **{"device": "cpu"} | options)
    assert ran == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"stem": "small"}, {"data": "mnist3"}, {"heads_until": 2.0}, {"width": 0.0}], ids=str
)
def test_every_unknown_value_is_refused_before_anything_runs(tmp_path, wrong):
    grids = [{"seed": [0]}, wrong]
    with pytest.raises(ValueError, match=r"asked|unknown"):
        study(grids, folder=tmp_path, device="cpu", progress=False, **TINY | {"steps": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": 0.0}, "seed=0.0 asked; give int"),
        ({"steps": 0}, "steps=0 asked; give at least 1"),
        ({"batch_size": 8.0}, "give int"),
        ({"learning_rate": -1}, "give more than 0"),
        ({"learning_rate": math.nan}, "give more than 0"),
        ({"learning_rate": "0.1"}, "give float"),
        ({"weight_decay": -1}, "give at least 0"),
        ({"clip": 0}, "give more than 0"),
        ({"clip": "1"}, "give float or None"),
        ({"test_every": 0}, "give at least 1"),
        ({"cosine": 1}, "give bool"),
        ({"init": None}, "give str"),
        ({"heads": [["aux1"]]}, "choose one of none, lower"),
        ({"data": "folder:/nowhere"}, "not a folder"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_before_anything_runs(tmp_path, wrong, message):
    options = TINY | {"folder": tmp_path, "device": "cpu", "progress": False}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        study([{"seed": [0]}, wrong], **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_runs(tmp_path, ran):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*choose another folder"):
        study({"seed": 0}, folder=tmp_path / "file" / "runs", device="cpu", progress=False)
    assert ran == []


def test_numbers_that_are_equal_are_one_experiment():
    for one, other in (({"clip": 1}, {"clip": 1.0}), ({"init": "gain 1"}, {"init": "gain 1.00"})):
        assert Experiment(**one).key("cpu") == Experiment(**other).key("cpu")
    assert Experiment(init="gain 1e-05").network(4, 3) is not None


def test_images_that_changed_are_another_experiment(tmp_path):
    (tmp_path / "train").mkdir()
    experiment = Experiment(data=f"folder:{tmp_path}")
    before = experiment.key("cpu")
    assert experiment.key("cpu") == before
    (tmp_path / "train" / "a.png").write_text("x")
    assert experiment.key("cpu") != before


def test_runs_that_end_after_an_interrupt_are_kept(tmp_path, monkeypatch):
    begun, release = threading.Event(), threading.Event()

    def run(experiment, device="cpu"):  # noqa: ARG001
        if experiment.seed:
            begun.set()
            assert release.wait(300)
        return record(experiment)

    class Interrupted(queue.Queue):
        def get(self, *_):
            assert begun.wait(300)
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(training.queue, "Queue", Interrupted)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        with pytest.raises(KeyboardInterrupt):
            study({"seed": [0, 1, 2]}, folder=tmp_path, device="cpu", executor=threads,
                  progress=False)  # fmt: skip
        release.set()
    assert set(seeds_in(tmp_path)) == {0, 1}  # what had begun, and not what had not


def test_generalization_keeps_the_order_of_the_runs():
    runs = pd.concat([run_of([1.0], run=name, heads=name) for name in ("c", "a", "b")])
    assert generalization(runs).run.tolist() == ["c", "a", "b"]


def test_a_grid_of_numpy_integers(tmp_path, ran):
    frame = study({"seed": np.arange(2)}, folder=tmp_path, device="cpu", progress=False)
    assert frame.seed.tolist() == ran == [0, 1]


def test_a_loss_that_is_not_finite_is_a_result(tmp_path):
    options = TINY | {"steps": 25, "folder": tmp_path, "device": "cpu", "progress": False}
    options |= {"init": "kaiming", "clip": None, "test_every": 1}
    grid = {"learning_rate": [1e9, 1e-3], "gradients_every": 1}
    frame = study(grid, **options)
    wild, tame = (rows for _, rows in frame.groupby("learning_rate", sort=False))
    assert wild.stopped.str.fullmatch(r"the \w+ loss became (nan|inf) at step \d+").all()
    step = int(wild.stopped.iloc[0].split()[-1])
    assert wild.step.max() == step < 25
    assert wild[wild.step < step].loss.notna().all()
    assert not np.isfinite(wild[wild.step == step].loss).all()
    assert str(frame.loss.dtype) == str(frame.accuracy.dtype) == "float64"
    assert (tame.stopped == "").all()
    assert tame.step.max() == 25
    assert tame.loss.notna().all()
    gradients = study(grid, frame="gradients", **options)
    assert gradients.groupby("learning_rate").step.max()[1e-3] == 24
    assert set(gradients[gradients.learning_rate == 1e9].stopped) == set(wild.stopped)


class ThreadedFuture:
    """Has no more than a Dask client's futures must have."""

    def __init__(self, inner):
        self._inner = inner
        self.result, self.cancel = inner.result, inner.cancel

    def add_done_callback(self, called):
        self._inner.add_done_callback(lambda _: called(self))


class DaskLike:
    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(1)

    def submit(self, function, *arguments):
        return ThreadedFuture(self._pool.submit(function, *arguments))

    def shutdown(self):
        self._pool.shutdown()


@pytest.fixture(params=[lambda: concurrent.futures.ThreadPoolExecutor(1), DaskLike])
def executor(request):
    made = request.param()
    yield made
    made.shutdown()


def test_an_executor_changes_nothing(tmp_path, executor):
    grid = {"seed": [1, 0], "norm": ["none", "batch"]}
    options = {"device": "cpu", "progress": False} | TINY
    here = study(grid, folder=tmp_path / "here", **options)
    there = study(grid, folder=tmp_path / "there", executor=executor, **options)
    pd.testing.assert_frame_equal(there, here, check_exact=True)


def test_threads_do_not_disturb_each_other(tmp_path):
    options = {"device": "cpu", "progress": False} | TINY | {"steps": 6}
    here = study({"seed": range(4)}, folder=tmp_path / "here", **options)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        there = study({"seed": range(4)}, folder=tmp_path / "there", executor=threads, **options)
    pd.testing.assert_frame_equal(there, here, check_exact=True)


def test_an_executor_gets_only_what_is_missing(tmp_path, executor, ran):
    options = {"folder": tmp_path, "device": "cpu", "progress": False}
    study({"seed": [1]}, **options)
    frame = study({"seed": [2, 1, 0]}, executor=executor, **options)
    assert ran == [1, 2, 0]
    assert frame.seed.tolist() == [2, 1, 0]


def test_a_run_is_kept_when_it_is_done_though_an_earlier_one_goes_on(tmp_path, monkeypatch):
    def run(experiment, device="cpu"):  # noqa: ARG001
        until = time.monotonic() + 300
        while experiment.seed == 0 and not list(tmp_path.glob("*.jsonl")):
            assert time.monotonic() < until
            time.sleep(0.01)
        return record(experiment)

    monkeypatch.setattr(training, "run", run)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        options = {"folder": tmp_path, "device": "cpu", "progress": False}
        frame = study({"seed": [0, 1]}, executor=threads, **options)
    assert frame.seed.tolist() == [0, 1]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt("stop")])
def test_an_error_in_a_worker_ends_the_study_and_finished_runs_are_kept(
    tmp_path, monkeypatch, executor, error
):
    fails_at(monkeypatch, 2, error)
    options = {"folder": tmp_path, "device": "cpu", "progress": False}
    with pytest.raises(type(error), match=str(error)):
        study({"seed": range(5)}, executor=executor, **options)
    assert {0, 1} <= set(seeds_in(tmp_path)) <= {0, 1, 3, 4}
    fails_at(monkeypatch, None, error)
    frame = study({"seed": range(5)}, executor=executor, **options)
    assert frame.seed.tolist() == [0, 1, 2, 3, 4]


class Done:
    """A future that is done when it is made."""

    def __init__(self, function, *arguments):
        self.cancelled = False
        try:
            self._result, self._error = function(*arguments), None
        except Exception as error:
            self._error = error

    def add_done_callback(self, called):
        called(self)

    def result(self):
        if self._error:
            raise self._error
        return self._result

    def cancel(self):
        self.cancelled = True


class AtOnce:
    def __init__(self):
        self.futures = []

    def submit(self, function, *arguments):
        self.futures.append(Done(function, *arguments))
        return self.futures[-1]


def test_runs_that_finished_beside_one_that_failed_are_kept(tmp_path, monkeypatch):
    fails_at(monkeypatch, 0, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        study({"seed": [0, 1]}, folder=tmp_path, device="cpu", executor=AtOnce(), progress=False)
    assert seeds_in(tmp_path) == [1]


def test_what_has_not_started_is_cancelled_after_an_error(tmp_path, monkeypatch):
    fails_at(monkeypatch, 1, ValueError("wrong"))
    executor = AtOnce()
    with pytest.raises(ValueError, match="wrong"):
        study({"seed": [0, 1, 2]}, folder=tmp_path, device="cpu", executor=executor, progress=False)
    assert executor.futures[2].cancelled


def test_a_process_that_died_is_an_error_that_says_where_the_rest_is(tmp_path, monkeypatch):
    fails_at(monkeypatch, 2, BrokenProcessPool("a child process terminated abruptly"))
    with pytest.raises(
        RuntimeError, match=r"abruptly.*Out of memory.*fewer processes.*__main__.*new executor"
    ) as caught:
        study({"seed": range(3)}, folder=tmp_path, device="cpu", executor=AtOnce(), progress=False)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value.__cause__, BrokenProcessPool)
    assert not isinstance(caught.value, BrokenProcessPool)
    assert seeds_in(tmp_path) == [0, 1]


def test_a_pool_that_is_broken_already_says_the_same(tmp_path, ran):
    class Broken(AtOnce):
        def submit(self, *step):
            if self.futures:
                raise BrokenProcessPool("the process pool is not usable anymore")
            return super().submit(*step)

    with pytest.raises(RuntimeError, match="fewer processes") as caught:
        study({"seed": range(2)}, folder=tmp_path, device="cpu", executor=Broken(), progress=False)
    assert str(tmp_path) in str(caught.value)
    assert ran == [0]


def test_local_executor_shares_the_cores_out_to_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # what a worker would use unless told
    options = TINY | {"device": "cpu", "progress": False, "steps": 1}
    here = study({"seed": 1}, folder=tmp_path / "here", **options)
    with local_executor("cpu", workers=1) as executor:
        other, threads = executor.submit(os.getpid), executor.submit(torch.get_num_threads)
        there = study({"seed": 1}, folder=tmp_path / "there", executor=executor, **options)
        assert other.result() != os.getpid()
        assert threads.result() == 1
    # the worker tests on all 1024 images
    trained = [frame[frame.split == "train"] for frame in (here, there)]
    pd.testing.assert_frame_equal(*trained, rtol=1e-4)


@pytest.mark.parametrize(
    ("cores", "workers", "processes", "threads"), [(6, None, 6, 1), (6, 2, 2, 3), (2, 5, 5, 1)]
)
def test_how_many_processes_and_threads(monkeypatch, cores, workers, processes, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    asked = []
    monkeypatch.setattr(
        concurrent.futures, "ProcessPoolExecutor", lambda *options: asked.append(options)
    )
    local_executor("cpu", workers)
    (count, context, begin, (found, places)) = asked.pop()
    assert (count, found) == (processes, threads)
    assert context.get_start_method() == "spawn"
    assert begin is training._begin
    assert [places.get() for _ in range(count)] == [None] * count


@pytest.mark.parametrize(
    ("device", "workers", "chosen"),
    [
        ("cuda", None, [0, 1, 2] * 4),
        ("auto", 4, [0, 1, 2, 0]),
        ("cuda:1", None, [None] * 4),
        ("cpu", 2, [None] * 2),
    ],
)
def test_processes_are_spread_over_the_gpus(monkeypatch, device, workers, chosen):
    monkeypatch.setattr(devices, "_fault", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda *options: options)
    count, _, _, (_, places) = local_executor(device, workers)
    assert count == len(chosen)
    set_to = []
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    monkeypatch.setattr(training.threading, "Thread", lambda **_: SimpleNamespace(start=list))
    monkeypatch.setattr(training.signal, "signal", lambda *_: None)
    for _ in chosen:
        training._begin(torch.get_num_threads(), places)
    assert set_to == [gpu for gpu in chosen if gpu is not None]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("progress", [False, True])
def test_progress_counts_runs_on_a_terminal(tmp_path, capsys, monkeypatch, ran, progress, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    study({"seed": [0, 1]}, folder=tmp_path, device="cpu", progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("2/2" in shown.err) == (progress and terminal)
    assert (shown.err == "") != (progress and terminal)
    study({"seed": [0, 1]}, folder=tmp_path, device="cpu", progress=progress)
    assert capsys.readouterr().err == ""  # nothing to do
    assert ran == [0, 1]


def run_of(losses, **columns):
    """Metrics with these main losses in training; everything else lies below chance."""
    rows = [
        {
            "step": step,
            "split": split,
            "source": source,
            "loss": 0.1 * step,
            "accuracy": 0.01 * step,
        }
        for step in range(1, len(losses) + 1)
        for split in ("train", "test", "train_eval")
        for source in ("main", "aux1")
    ]
    frame = pd.DataFrame(rows)
    frame.loc[frame.split == "train_eval", ["loss", "accuracy"]] *= 3
    main = (frame.split == "train") & (frame.source == "main")
    frame.loc[main, "loss"] = losses
    return frame.assign(**columns, steps=len(losses))


@pytest.mark.parametrize(
    ("smooth", "classes", "step"),
    [(1, 4, 5), (4, 4, 5), (8, 4, 8), (9, 4, None), (1, 100, 1), (1, 2, None)],
)
def test_escape_from_chance(smooth, classes, step):
    chance = math.log(4)
    metrics = pd.concat(
        [
            run_of([chance] * 4 + [0.5 * chance] * 4, run="y", variant="b", seed=1),
            run_of([chance] * 5, run="x", variant="b", seed=1),
        ]
    )
    frame = escape_steps(metrics, classes, smooth=smooth)
    assert list(frame.columns) == [
        "run", "variant", "seed", "steps", "escape_step", "test_loss", "test_accuracy",
    ]  # fmt: skip
    assert str(frame.escape_step.dtype) == "Int64"
    assert frame.run.tolist() == ["y", "x"]
    assert frame.variant.tolist() == ["b", "b"]
    assert frame.seed.tolist() == [1, 1]
    assert frame.steps.tolist() == [8, 5]
    assert frame.test_loss.tolist() == pytest.approx([0.8, 0.5])
    assert frame.test_accuracy.tolist() == pytest.approx([0.08, 0.05])
    stuck = 1 if (smooth, classes) == (1, 100) else None
    assert [None if pd.isna(s) else s for s in frame.escape_step] == [step, stuck]


def test_below_chance_means_five_percent_below():
    chance = math.log(4)
    metrics = run_of([0.951 * chance] * 3 + [0.949 * chance], run="a")
    assert escape_steps(metrics, 4, smooth=1).escape_step.tolist() == [4]


def test_escape_of_a_head():
    metrics = run_of([9.0] * 3, run="a")
    assert escape_steps(metrics, 4, smooth=1).escape_step.isna().all()
    assert escape_steps(metrics, 4, smooth=1, source="aux1").escape_step.tolist() == [1]


def test_a_run_that_stopped_early_has_no_test(tmp_path):
    metrics = run_of([2.0, math.nan], run="a", stopped="the main loss became nan at step 2")
    frame = escape_steps(metrics[metrics.split == "train"], 4, smooth=1)
    assert frame.steps.tolist() == [2]
    assert frame.escape_step.isna().all()
    assert frame.test_loss.isna().all()
    assert frame.test_accuracy.isna().all()
    options = TINY | {"init": "kaiming", "clip": None, "learning_rate": 1e9, "steps": 25}
    found = study({"seed": 0}, folder=tmp_path, device="cpu", progress=False, **options)
    frame = escape_steps(found, 16)
    assert frame.stopped.iloc[0].startswith("the ")
    assert found.step.max() < frame.steps.iloc[0] == 25
    (row,) = escape_summary(frame, "seed").itertuples()
    assert (row.escaped, row.mean_steps, row.steps) == (0, 25, 25)  # not faster than others
    assert frame.test_loss.isna().all()


def test_a_run_that_stopped_after_a_test_has_no_test_at_the_end():
    metrics = run_of([2.0] * 3 + [math.nan], run="a", stopped="the main loss became nan at step 4")
    metrics = metrics[(metrics.split == "train") | (metrics.step == 2)]
    frame = escape_steps(metrics, 4, smooth=1)
    assert frame.test_loss.isna().all()
    assert frame.test_accuracy.isna().all()


def escapes(steps, length=100, **columns):
    frame = pd.DataFrame({"escape_step": pd.array(steps, "Int64"), "steps": length})
    frame["test_accuracy"] = [0.1 * i for i in range(len(steps))]
    return frame.assign(**columns)


def test_escape_summary_by_hand():
    one = escapes([20, 40, None, 60], norm="none", heads="both")
    other = escapes([30], norm="batch", heads="both")
    stuck = escapes([None, None], length=70, norm="batch", heads="none")
    frame = escape_summary(pd.concat([one, other, stuck]), ["norm", "heads"])
    assert list(frame.columns) == [
        "norm", "heads", "seeds", "escaped", "mean_steps", "low", "high", "steps", "test_accuracy",
    ]  # fmt: skip
    assert frame.norm.tolist() == ["none", "batch", "batch"]
    assert frame.heads.tolist() == ["both", "both", "none"]
    assert frame.seeds.tolist() == [4, 1, 2]
    assert frame.escaped.tolist() == [3, 1, 0]
    assert frame.mean_steps.tolist() == [(20 + 40 + 100 + 60) / 4, 30, 70]
    assert frame.test_accuracy.tolist() == pytest.approx([0.15, 0.0, 0.05])
    assert frame.low[0] <= frame.mean_steps[0] <= frame.high[0]
    assert frame[["low", "high"]].isna().all(axis=1).tolist() == [False, True, True]
    assert 20 < frame.low[0] < 55 < frame.high[0] < 100


def test_the_interval_is_the_percentile_bootstrap():
    values = np.random.default_rng(1).integers(1, 1000, 400)
    frame = escape_summary(escapes(values, length=1000, norm="none"), "norm")
    reach = 1.96 * values.std() / 20
    assert frame.low[0] == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert frame.high[0] == pytest.approx(values.mean() + reach, abs=0.1 * reach)
    again = escape_summary(escapes(values, length=1000, norm="none"), "norm")
    pd.testing.assert_frame_equal(again, frame, check_exact=True)
    other = escape_summary(escapes(values, length=1000, norm="none"), "norm", seed=1)
    assert other.low[0] != frame.low[0]


def test_of_three_runs_the_interval_is_their_range_and_of_none_that_escaped_there_is_none():
    three = escapes([20, 40, 90], length=100, norm="none")
    never = escapes([None] * 3, length=100, norm="batch")
    frame = escape_summary(pd.concat([three, never]), "norm")
    assert (frame.low[0], frame.high[0]) == (20, 90)
    assert frame.escaped.tolist() == [3, 0]
    assert frame[["low", "high"]].iloc[1].isna().all()


def test_escape_summary_keeps_runs_whose_field_is_none():
    both = pd.concat([escapes([20], clip=1.0), escapes([40], clip=None)])
    assert escape_summary(both, "clip").mean_steps.tolist() == [20, 40]


def test_generalization_by_hand():
    one = run_of([1.0] * 4, run="b", stopped="", seed=1)
    other = run_of([1.0] * 7, run="a", stopped="", seed=0)
    frame = generalization(pd.concat([one, other]))
    assert set(frame.columns) == {
        "run", "stopped", "seed", "steps", "train_accuracy", "test_accuracy", "gap",
    }  # fmt: skip
    assert frame.columns.name is None
    frame = frame.sort_values("seed", ignore_index=True)
    assert frame.run.tolist() == ["a", "b"]
    assert frame.train_accuracy.tolist() == pytest.approx([0.21, 0.12])
    assert frame.test_accuracy.tolist() == pytest.approx([0.07, 0.04])
    assert frame.gap.tolist() == pytest.approx([0.14, 0.08])


def test_the_columns_of_generalization_are_in_the_order_that_is_documented():
    frame = generalization(run_of([1.0], run="a", seed=0))
    assert list(frame.columns) == ["run", "seed", "steps", "train_accuracy", "test_accuracy", "gap"]


def test_generalization_keeps_runs_whose_field_is_none():
    both = pd.concat([run_of([1.0], run="a", clip=1.0), run_of([1.0] * 2, run="b", clip=None)])
    frame = generalization(both)
    assert sorted(frame.run) == ["a", "b"]
    assert sorted(frame.gap) == pytest.approx([0.02, 0.04])


def test_generalization_needs_accuracy_on_training_images():
    metrics = run_of([1.0] * 4, run="a")
    with pytest.raises(ValueError, match="train_batches"):
        generalization(metrics[metrics.split != "train_eval"])


def test_the_study_feeds_what_reads_it(tmp_path):
    options = TINY | {"folder": tmp_path, "device": "cpu", "progress": False, "train_batches": 1}
    metrics = study({"heads": ["none", "both"], "seed": [0, 1]}, test_every=1, **options)
    gaps, steps = generalization(metrics), escape_steps(metrics, 16, smooth=1)
    assert sorted(gaps.run) == sorted(steps.run) == sorted(set(metrics.run))
    merged = gaps.merge(steps, on=["run", "stopped", "heads", "seed"], suffixes=("", "_other"))
    assert len(merged) == 4
    assert (merged.test_accuracy == merged.test_accuracy_other).all()
    assert escape_summary(steps, "heads").seeds.tolist() == [2, 2]
    assert paired_difference(steps, "test_accuracy", "heads", "both", "none")["seeds"] == 2


def test_paired_difference_is_students_interval():
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"seed": [*range(6), *reversed(range(6))], "heads": ["both"] * 6 + ["none"] * 6}
    ).assign(gap=lambda f: random.normal(size=12) + f.seed)
    values = frame.set_index(["heads", "seed"]).gap
    differences = (values["both"] - values["none"]).to_numpy()
    interval = ttest_1samp(differences, 0).confidence_interval(0.95)
    unpaired = frame.sample(frac=1, random_state=0)
    found = paired_difference(unpaired, "gap", "heads", "both", "none")
    assert found == pytest.approx(
        {"mean": differences.mean(), "low": interval.low, "high": interval.high, "seeds": 6}
    )
    other = paired_difference(unpaired, "gap", "heads", "none", "both")
    assert other["mean"] == pytest.approx(-found["mean"])
    # seed 7 has no partner
    more = pd.concat([frame, pd.DataFrame({"seed": [7], "heads": ["both"], "gap": [99.0]})])
    assert paired_difference(more, "gap", "heads", "both", "none") == pytest.approx(found)


def test_the_difference_of_a_single_seed_has_no_interval():
    frame = pd.DataFrame({"seed": [3, 3], "norm": ["none", "batch"], "value": [1.0, 3.0]})
    found = paired_difference(frame, "value", "norm", "batch", "none")
    assert found["mean"] == 2
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])
    assert found["seeds"] == 1
