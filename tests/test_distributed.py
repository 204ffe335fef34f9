"""Several processes under torchrun train what one process trains, and go on after one is killed.

As a script, which torchrun starts, this file is what each of them does.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from test_loop import Blobs, run, small, smooth

from gnetlab.measure import devices, loop, training
from gnetlab.measure.distributed import ALONE, Processes, own_device, processes
from gnetlab.measure.gradients import GradientRecorder
from gnetlab.measure.training import study


class Double(Blobs):
    """For networks in float64: batch norm over few pixels blows rounding up."""

    def _draw(self, count, seed):
        images, labels = super()._draw(count, seed)
        return images.double(), labels


class LastIsNaN(Blobs):
    """The last image of a batch, which the last process takes, is NaN in the third step."""

    def train_batch(self, step, batch_size, seed=0):
        images, labels = super().train_batch(step, batch_size, seed)
        images[-1] *= float("nan") if step == 2 else 1
        return images, labels


class Deadly(Blobs):
    """At the third step of a first attempt, the second process is killed."""

    def train_batch(self, step, batch_size, seed=0):
        if step == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL if os.environ["RANK"] == "1" else 0)
        return super().train_batch(step, batch_size, seed)


SHARED = {"steps": 3, "batch_size": 8, "learning_rate": 0.01, "test_every": 2, "seed": 3}
CASES = {  # network, options
    "dropout": (smooth, {"clip": 0.5, "train_batches": 1}),
    "batch norm": (lambda seed: small(seed=seed).double(), {"data": Double(), "nesterov": True}),
    "heads_until": (
        lambda seed: small(norm="lrn", init="xavier", seed=seed),
        {"heads_until": 0.5, "optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.1},
    ),
    "bfloat16": (
        lambda seed: smooth(aux=(), seed=seed),
        {"mixed_precision": True, "channels_last": True, "cosine": True},
    ),
}
RECORDED = ("dropout", "batch norm")


def trained(case, **options):
    """What a case gives: metrics, weights, and the gradients' sizes and sources."""
    network, own = CASES[case]
    model = network(seed=int(os.environ.get("RANK", 0)))  # the first one's weights count
    recorder = GradientRecorder(model, every=2) if case in RECORDED else None
    weights, metrics = run(model, gradients=recorder, **SHARED | own | options)
    frames = [recorder.totals(), recorder.splits()] if recorder else []
    return {"frames": [metrics, *frames], "weights": dict(weights)}


def small_study(folder):
    options = {"folder": folder, "device": "cpu", "progress": False, "size": 16, "width": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_data", lambda *_: Blobs())
        return study({"seed": [0, 1, 2]}, **options, batch_size=4, steps=2, norm="batch")


def refused(folder):
    """What goes wrong in one process, or in all: kind, text and metrics of the error."""
    only_first = folder / f"only-{os.environ['RANK']}.pt"
    if os.environ["RANK"] == "0":
        run(smooth(), steps=1, checkpoint=only_first, distributed=False)
    found = {}
    for name, data, options in [
        ("not finite", LastIsNaN(), {"steps": 25}),
        ("odd", Blobs(), {"batch_size": 7}),
        ("no checkpoint", Blobs(), {"checkpoint": only_first}),
    ]:
        try:
            run(smooth(), data, **options)
        except (ValueError, RuntimeError) as error:
            found[name] = type(error).__name__, str(error), getattr(error, "metrics", None)
    return found


def first_attempt(folder):
    found = {case: trained(case) for case in CASES}
    found["refused"] = refused(folder)
    found["study"] = small_study(folder / "study")
    return found


def main(folder):
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt == "0":
        torch.save(first_attempt(folder), folder / f"first-{rank}.pt")
    else:
        training.run = None  # the study's runs are there
        torch.save(small_study(folder / "study"), folder / f"study-{rank}.pt")
    data, path = Deadly(), folder / "checkpoints" / "run.pt"
    found = trained("dropout", data=data, checkpoint=path, save_every=2)
    torch.save(found | {"asked": data.asked}, folder / f"resumed-{rank}.pt")


def torchrun(*arguments, seconds=900):
    """Run this file in two processes that may be restarted once; nothing of it stays."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    agent = subprocess.Popen(
        [*command, "--max-restarts=1", __file__, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        printed, _ = agent.communicate(timeout=seconds)
    finally:
        if agent.poll() is None:
            for process in [*psutil.Process(agent.pid).children(recursive=True), agent]:
                process.kill()
    assert agent.returncode == 0, printed[-4000:]


def assert_close(found, expected, **tolerance):
    for one, other in zip(found["frames"], expected["frames"], strict=True):
        pd.testing.assert_frame_equal(one, other, **tolerance)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, **tolerance)


def assert_refused(one, other):
    for name in ("not finite", "odd"):
        assert one[name][:2] == other[name][:2]
    kind, text, metrics = one["not finite"]
    assert (kind, text.partition(";")[0]) == ("RuntimeError", "the main loss became nan at step 3")
    assert metrics[metrics.step < 3].loss.notna().all()
    assert metrics.step.max() == 3
    pd.testing.assert_frame_equal(metrics, other["not finite"][2])
    assert one["odd"][0] == "ValueError"
    assert "batch_size=7 asked, for 2 processes" in one["odd"][1]
    for kind, text, _ in (one["no checkpoint"], other["no checkpoint"]):
        assert kind == "ValueError"
        assert "goes on differs between processes: [1, 0]" in text


def test_two_processes_train_as_one_and_go_on_after_one_is_killed(tmp_path):
    torchrun(str(tmp_path))
    first, other = (torch.load(tmp_path / f"first-{i}.pt", weights_only=False) for i in (0, 1))
    for case in CASES:
        assert_close(other[case], first[case], rtol=0, atol=0)
        tolerance = 5e-3 if case == "bfloat16" else 1e-4
        assert_close(first[case], trained(case), rtol=tolerance, atol=tolerance / 10)
    assert_refused(first["refused"], other["refused"])

    alone = small_study(tmp_path / "alone")
    for frame in (first["study"], other["study"], *map(torch_load, tmp_path.glob("study-*.pt"))):
        pd.testing.assert_frame_equal(frame, alone, check_exact=True)

    for path in (tmp_path / "resumed-0.pt", tmp_path / "resumed-1.pt"):
        resumed = torch_load(path)
        assert resumed.pop("asked")[0][0] == 2
        assert_close(resumed, first["dropout"], rtol=0, atol=0)
    assert os.listdir(tmp_path / "checkpoints") == ["run.pt"]
    # One process goes on from what two have saved.
    again = trained("dropout", checkpoint=tmp_path / "checkpoints" / "run.pt", steps=5)
    whole = trained("dropout", steps=5)
    assert_close(again | {"frames": []}, whole | {"frames": []}, rtol=1e-4, atol=1e-5)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    assert not left


def torch_load(path):
    return torch.load(path, weights_only=False)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes(torch.device("cpu")) == ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes(torch.device("cpu")) == ALONE
    model = smooth()
    assert ALONE.wrap(model) is model
    with ALONE.shared_out([1, 2]) as items:
        assert items == [1, 2]


@pytest.fixture
def two_gpus(monkeypatch):
    """As the second of three processes of a machine with two GPUs, of torchrun's eight."""
    monkeypatch.setattr(devices, "_fault", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": 8, "RANK": 5, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("two_gpus")
def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    found = [str(own_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")]
    assert found == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    with pytest.raises(ValueError, match=r"process 1 is on cuda:0.*here cuda:1: .*own_device\(\)"):
        processes(torch.device("cuda:0"))
    monkeypatch.setenv("LOCAL_RANK", "2")  # with CUDA_VISIBLE_DEVICES, each may see one only
    assert own_device() == torch.device("cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert own_device() == torch.device("cuda")


def test_a_step_that_processes_share_is_not_captured(monkeypatch):
    monkeypatch.setattr(loop, "processes", lambda _: Processes(0, 2))
    with pytest.raises(ValueError, match="capture=True asked, with 2 processes"):
        loop._check_capture(True, torch.device("cuda"), Processes(0, 2))
    data = Blobs()
    with pytest.raises(ValueError, match=r"batch_size=9 asked, for 2 .* give a multiple of 2"):
        run(data=data, batch_size=9)
    assert data.asked == []


def test_a_study_takes_an_executor_or_torchrun(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "processes", lambda _: Processes(0, 2))
    with pytest.raises(ValueError, match=r"executor='pool' asked under torchrun, whose 2"):
        study({"seed": 0}, folder=tmp_path, device="cpu", executor="pool")
    assert os.listdir(tmp_path) == []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
