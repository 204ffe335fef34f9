"""What is timed is a forward pass in eval mode; how long it takes is never asserted."""

import itertools
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.benchmark import Timer

import gnetlab as gl
from gnetlab.measure.latency import device_name, measure_latency, resolve_device

COLUMNS = [
    "model", "device", "dtype", "memory_format", "batch_size", "threads", "seconds", "iqr", "runs",
    "images_per_second", "peak_memory",
]  # fmt: skip
INPUT = (3, 8, 8)


class Probe(nn.Sequential):
    """A tiny network that remembers what it was asked to do."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.seen = set()

    def forward(self, x):
        fast = {t.is_contiguous(memory_format=torch.channels_last) for t in (x, self[0].weight)}
        modes = self.training, torch.is_inference_mode_enabled()
        self.seen.add((tuple(x.shape), x.dtype, self[0].weight.dtype, *fast, *modes))
        return super().forward(x)


def measure(models, **options):
    defaults = {"input_size": INPUT, "min_run_time": 0.01, "rounds": 2}
    return measure_latency(models, **(defaults | options))


def test_frame_is_as_documented():
    frame = measure({"one": Probe(), "other": Probe()}, batch_sizes=iter((4, 1)))
    assert list(frame.columns) == COLUMNS
    assert frame.index.equals(pd.RangeIndex(4))
    assert frame.batch_size.tolist() == [4, 4, 1, 1]
    assert frame.model.tolist() == ["one", "other"] * 2
    for column, value in {
        "device": "cpu", "dtype": "float32", "memory_format": "contiguous",
        "threads": torch.get_num_threads(),
    }.items():  # fmt: skip
        assert (frame[column] == value).all()
    assert (frame.seconds > 0).all()
    assert (frame.iqr >= 0).all()
    assert (frame.runs >= 1).all()
    assert (frame.images_per_second * frame.seconds - frame.batch_size).abs().max() < 1e-9
    assert str(frame.peak_memory.dtype) == "Int64"
    assert frame.peak_memory.isna().all()  # known on CUDA only


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed(channels_last, dtype):
    model = Probe()
    frame = measure(model, batch_sizes=(1, 2), channels_last=channels_last, dtype=dtype)
    assert model.seen == {((n, *INPUT), dtype, dtype, channels_last, False, True) for n in (1, 2)}
    assert set(frame.dtype) == {str(dtype).removeprefix("torch.")}
    assert set(frame.memory_format) == {"channels_last" if channels_last else "contiguous"}


def test_models_take_turns():
    calls = []
    models = {name: Probe() for name in ("one", "other")}
    for name, model in models.items():
        model.register_forward_hook(lambda _, inputs, __, n=name: calls.append((n, len(inputs[0]))))
    measure(models, batch_sizes=(1, 2), rounds=3)
    turns = [turn for turn, _ in itertools.groupby(calls)]
    assert turns == [(name, size) for size in (1, 2) for _ in range(1 + 3) for name in models]


def test_it_runs_for_as_long_as_asked(monkeypatch):
    asked, measured = [], Timer.blocked_autorange

    def remember(timer, *, min_run_time):
        asked.append(min_run_time)
        return measured(timer, min_run_time=0.001)

    monkeypatch.setattr(Timer, "blocked_autorange", remember)
    measure(Probe(), min_run_time=6.0, rounds=4)
    assert asked == [1.5] * 4


@pytest.mark.parametrize("rounds", [1, 3])
def test_median_and_spread_are_over_all_rounds(monkeypatch, rounds):
    times = [[2.0, 4.0, 6.0], [8.0], [1.0, 1.0, 3.0]]
    rest = iter(times)

    def pretend(_timer, *, min_run_time):  # noqa: ARG001
        return SimpleNamespace(times=next(rest), number_per_run=10)

    monkeypatch.setattr(Timer, "blocked_autorange", pretend)
    frame = measure(Probe(), batch_sizes=(4,), rounds=rounds)
    seen = pd.Series([t for sample in times[:rounds] for t in sample])
    assert frame.seconds[0] == pytest.approx(seen.median())
    assert frame.iqr[0] == pytest.approx(seen.quantile(0.75) - seen.quantile(0.25))
    assert frame.runs[0] == 10 * len(seen)
    assert frame.images_per_second[0] == pytest.approx(4 / seen.median())


def test_googlenet_is_measured_under_its_own_name():
    frame = measure(gl.googlenet(width=0.1, num_classes=3), input_size=(3, 32, 32))
    assert frame.model.tolist() == ["GoogLeNet"]


@pytest.mark.parametrize("input_size", [INPUT, (5, 8, 8)])
@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False), (False, True)])
def test_the_mode_is_restored(modes, input_size):
    model = Probe()
    model.train(modes[0])
    model[1].train(modes[1])  # a frozen batch norm
    try:
        measure({"first": Probe(), "second": model}, input_size=input_size)
    except RuntimeError:
        assert input_size != INPUT
    assert (model.training, model[1].training) == modes


def test_batch_norm_is_not_moved():
    model = Probe().train()
    measure(model)
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("available", [False, True])
def test_auto_takes_cuda_where_it_works(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto") == torch.device("cuda" if available else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_device_that_is_no_device_is_an_error():
    with pytest.raises(ValueError, match="'gpu' asked; choose 'auto', 'cpu' or 'cuda'"):
        resolve_device("gpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_absent_cuda_is_an_error(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"'{device}' asked, but PyTorch finds no CUDA device"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_another_absent_device_is_an_error(device):
    if getattr(torch, device).is_available():
        pytest.skip(f"{device} is there")
    with pytest.raises(ValueError, match=f"'{device}' asked"):
        resolve_device(device)


def test_an_absent_cuda_index_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="'cuda:7' asked"):
        resolve_device("cuda:7")


def test_the_name_of_the_cpu_says_the_threads():
    threads = torch.get_num_threads()
    assert device_name("cpu").endswith(f"({threads} thread{'s' if threads > 1 else ''})")
    assert device_name(torch.device("cpu")) == device_name("cpu")


@pytest.mark.gpu
def test_peak_memory_on_cuda():
    frame = measure(nn.Conv2d(3, 64, 3), batch_sizes=(1, 8), device="cuda", input_size=(3, 64, 64))
    assert frame.device.tolist() == ["cuda", "cuda"]
    small, large = (int(peak) for peak in frame.peak_memory)
    assert large > small >= 64 * 62 * 62 * 4  # at least the output
    assert torch.cuda.get_device_name() == device_name("cuda")
