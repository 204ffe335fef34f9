"""Batches that fit, and what happens to those that do not; memory runs out where tests say so."""

import functools
import itertools
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

import gnetlab as gl
from gnetlab.measure import devices, latency, layers, memory
from gnetlab.measure.activations import branch_summary
from gnetlab.measure.loop import evaluate
from gnetlab.measure.memory import (
    MARGIN,
    fitting_batch_size,
    free_bytes,
    halving,
    in_parts,
    predicted_bytes,
)
from gnetlab.measure.sweeps import early_inception

# What PyTorch and its allocators say, word for word.
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of "
    "which 1.06 GiB is free. Including non-PyTorch memory, this process has 6.72 GiB memory in use."
)
CPU_FULL = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
WINDOWS_FULL = "DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000000 bytes."
MPS_FULL = "MPS backend out of memory (MPS allocated: 5.56 GB, max allowed: 6.80 GB)."
SAYS_FULL = [
    torch.OutOfMemoryError(FULL),
    RuntimeError(CPU_FULL),
    RuntimeError(WINDOWS_FULL),
    RuntimeError(MPS_FULL),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_told():
    devices.tell.cache_clear()


class Tight(nn.Module):
    """A step that more than so many images at a time do not get through."""

    def __init__(self, most):
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, x):
        if isinstance(x, torch.Tensor) and not x.is_meta:
            self.seen.append(len(x))
            if len(x) > self.most:
                raise torch.OutOfMemoryError(FULL)
        return x


def small_network(most=None):
    """A small GoogLeNet in eval mode, in the middle of which memory may run out."""
    model = gl.googlenet(norm="batch", width=0.05, num_classes=5, stem="compact", seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias, 0.1)
    if most is not None:
        branch = model.inception4a.branch3x3
        branch.reduce = nn.Sequential(branch.reduce, Tight(most))
    return model.eval()


def pictures(count=5):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def peak_by_torch(build, batch_size, training):
    """Bytes, by PyTorch's own memory tracker, of tensors without memory."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, images = build().train(training), torch.randn(batch_size, 3, 224, 224)
        tracker = MemTracker()
        tracker.track_external(model, images)
        with tracker, torch.set_grad_enabled(training):
            output = model(images)
            if training:
                outputs = [output] if isinstance(output, torch.Tensor) else output
                losses = [F.cross_entropy(o, torch.zeros(len(o)).long()) for o in outputs]
                sum(losses).backward()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


@pytest.mark.parametrize(("preset", "training"), [("paper", False), ("torchvision", True)])
def test_the_prediction_is_what_torch_tracks(preset, training):
    def build():
        return gl.googlenet(preset, init=None)

    with torch.device("meta"):
        predicted = predicted_bytes(build(), (3, 224, 224), 16, training=training)
    tracked = peak_by_torch(build, 16, training)
    # Too much in training, where not all gradients are there at the peak.
    assert 0.97 <= predicted / tracked <= (1.15 if training else 1.03)


def test_half_precision_takes_half():
    model = gl.googlenet("paper", aux=False, width=0.1)
    full = predicted_bytes(model, (3, 64, 64), 4)
    assert predicted_bytes(model.half(), (3, 64, 64), 4) == full / 2


@pytest.mark.parametrize("wanted", [1, 7, 64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("room", [1e6, 3e7, 1e8, 1e9])
def test_the_rule(monkeypatch, room, training, wanted):
    monkeypatch.setattr(memory, "free_bytes", lambda _: room)
    models = [gl.googlenet("paper", width=w, aux=False) for w in (0.1, 0.3)]
    weights = sum(p.numel() * 4 for model in models for p in model.parameters())

    def fits(size):
        needed = [predicted_bytes(m, (3, 64, 64), size, training=training) for m in models]
        own = [sum(p.numel() * 4 for p in model.parameters()) for model in models]
        return all(n - w <= MARGIN * room for n, w in zip(needed, own, strict=True))

    halves = [wanted >> i for i in range(wanted.bit_length())]
    expected = next((size for size in halves if fits(size)), 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [
            fitting_batch_size(models, (3, 64, 64), wanted, device=CPU, training=training)
            for _ in range(2)
        ]
    assert found == [expected] * 2
    assert len(said) == (expected < wanted)  # once
    assert all(f"batch size {wanted} asked" in str(s.message) for s in said)
    # Weights that do not lie on the device yet take their room there too.
    with torch.device("meta"):
        away = [gl.googlenet("paper", width=w, aux=False) for w in (0.1, 0.3)]
    monkeypatch.setattr(memory, "free_bytes", lambda _: room + weights / MARGIN)
    options = {"device": CPU, "training": training}
    assert fitting_batch_size(away, (3, 64, 64), wanted, **options) == expected


def test_what_cannot_be_predicted_is_tried(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 0)

    class Looks(nn.Module):
        def forward(self, x):
            return x * float(x.sum())  # no value on stand-ins

    assert fitting_batch_size(Looks(), (3, 8, 8), 8, device=CPU) == 8


def test_free_memory_of_each_device(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5))
    assert free_bytes(CPU) == 5
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10)
    assert free_bytes(torch.device("cuda")) == 120  # what is cached can be used again
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 50)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 20)
    assert free_bytes(torch.device("mps")) == 30


class TestHalving:
    @pytest.mark.parametrize("error", SAYS_FULL, ids=lambda e: str(e)[:20])
    def test_once_with_half(self, error):
        tried = []

        def measure(size):
            tried.append(size)
            if size > 4:
                raise error
            return size

        with pytest.warns(UserWarning, match="out of memory at batch size 8 .* with 4") as said:
            assert [halving(measure, 8), halving(measure, 8)] == [4, 4]
        assert tried == [8, 4] * 2
        assert len(said) == 1

    @pytest.mark.parametrize(("size", "tried"), [(8, [8, 4]), (1, [1])])
    @pytest.mark.filterwarnings("ignore:out of memory")
    def test_then_an_error_from_the_original(self, size, tried):
        seen = []

        def measure(size):
            seen.append(size)
            raise torch.OutOfMemoryError(FULL)

        asked = f"batch size {', then '.join(map(str, tried))} asked.*Tried to allocate 2.00 GiB"
        with pytest.raises(RuntimeError, match=f"{asked}.*smaller batch.*device='cpu'") as raised:
            halving(measure, size)
        assert seen == tried
        assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)

    @pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
    def test_other_errors_pass(self, error):
        tried = []

        def measure(size):
            tried.append(size)
            raise error

        with pytest.raises(type(error)) as raised:
            halving(measure, 8)
        assert raised.value is error
        assert tried == [8]

    @pytest.mark.filterwarnings("ignore:out of memory")
    def test_what_did_not_fit_is_gone_before_the_second_try(self, monkeypatch):
        emptied, kept = [], []
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        for device in ("cuda", "mps"):
            module = getattr(torch, device)
            monkeypatch.setattr(module, "empty_cache", lambda d=device: emptied.append(d))

        def measure(size):
            if size == 8:
                images = nn.Identity()
                images.itself = images  # as networks with cycles do
                kept.append(weakref.ref(images))
                raise torch.OutOfMemoryError(FULL)
            return kept[0](), list(emptied)

        assert halving(measure, 8) == (None, ["cuda", "mps"])

    @pytest.mark.filterwarnings("ignore:out of memory")
    def test_a_build_of_torch_without_accelerators(self, monkeypatch):
        def absent():  # what such a build says, word for word
            raise RuntimeError("Cannot access accelerator device when none is available.")

        monkeypatch.setattr(torch._C, "_accelerator_isAllocatorInitialized", absent)

        def measure(size):
            if size == 8:
                raise RuntimeError(CPU_FULL)
            return size

        assert halving(measure, 8) == 4

    @pytest.mark.filterwarnings("ignore:out of memory")
    @pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
    @pytest.mark.parametrize("most", [4, 8])
    def test_parts_are_the_whole(self, count, most):
        def run(part):
            found = list(range(count))[part]
            if len(found) > most:
                raise torch.OutOfMemoryError(FULL)
            return found

        parts = in_parts(run, count)
        assert list(itertools.chain(*parts)) == list(range(count))
        assert max(map(len, parts)) <= most


QUICK = {"input_size": (3, 8, 8), "min_run_time": 0.001, "rounds": 1}


class TestLatency:
    def test_the_row_says_what_was_measured(self):
        models = {"wide": Tight(8), "narrow": Tight(3)}
        with pytest.warns(UserWarning, match="batch size 6 .*going on with 3, for all models"):
            frame = gl.measure_latency(models, batch_sizes=(1, 6), **QUICK)
        assert frame.batch_size.tolist() == [1, 1, 3, 3]
        assert frame.model.tolist() == ["wide", "narrow"] * 2
        assert (frame.images_per_second * frame.seconds - frame.batch_size).abs().max() < 1e-9

    @pytest.mark.filterwarnings("ignore:out of memory")
    @pytest.mark.parametrize(("sizes", "rows"), [((3, 6), [3]), ((6, 3), [3]), ((2, 2), [2])])
    def test_nothing_is_measured_twice(self, monkeypatch, sizes, rows):
        timed, take_turns = [], latency._take_turns

        def remember(runs, size, *options):
            found = take_turns(runs, size, *options)
            timed.append(size)
            return found

        monkeypatch.setattr(latency, "_take_turns", remember)
        frame = gl.measure_latency(Tight(4), batch_sizes=sizes, **QUICK)
        assert frame.batch_size.tolist() == timed == rows

    @pytest.mark.filterwarnings("ignore:out of memory")
    def test_what_is_larger_than_what_did_not_fit_is_left_out(self):
        with pytest.warns(UserWarning, match="batch size 64 asked; 8 did not fit already: it is"):
            frame = gl.measure_latency(Tight(4), batch_sizes=(1, 8, 64, 2), **QUICK)
        assert frame.batch_size.tolist() == [1, 4, 2]

    @pytest.mark.filterwarnings("ignore:out of memory")
    def test_a_half_that_is_too_much_is_an_error(self):
        with pytest.raises(RuntimeError, match="batch size 64, then 32 asked, and out of memory"):
            gl.measure_latency(Tight(4), batch_sizes=(64,), **QUICK)

    @pytest.mark.parametrize("step", ["forward", "training"])
    def test_the_rule_comes_first(self, monkeypatch, step):
        model = nn.Sequential(Tight(100), nn.Conv2d(3, 16, 3), nn.Flatten())
        training = step == "training"
        room = predicted_bytes(model, (3, 8, 8), 2, training=training) / MARGIN
        monkeypatch.setattr(memory, "free_bytes", lambda _: room)
        with pytest.warns(UserWarning, match="batch size 8 asked; by prediction .*: it is 2 here"):
            frame = gl.measure_latency(model, batch_sizes=(8,), step=step, **QUICK)
        assert frame.batch_size.tolist() == [2]
        assert set(model[0].seen) <= {2}

    def test_early_inception_says_it_too(self, monkeypatch):
        monkeypatch.setattr(memory, "free_bytes", lambda _: 0)
        with pytest.warns(UserWarning, match="it is 1 here"):
            frame = early_inception(32, device="cpu", batch_size=2, min_run_time=0.01)
        assert frame.batch_size.tolist() == [1, 1]


MESSAGE = pytest.mark.filterwarnings("ignore:out of memory")


@MESSAGE
@pytest.mark.parametrize(
    "measure",
    [
        gl.branch_statistics,
        branch_summary,
        functools.partial(gl.branch_correlation, permutations=3),
    ],
)
@pytest.mark.parametrize("batches", [1, 2])
def test_statistics_of_a_batch_in_halves(measure, batches):
    given = [pictures(), pictures(2)][:batches]
    tight = small_network(most=2)
    halves = [part for batch in given for part in batch.split(2)]
    expected = measure(small_network(), halves)
    pd.testing.assert_frame_equal(measure(tight, given), expected, check_exact=True)
    assert tight.inception4a.branch3x3.reduce[1].seen[:4] == [5, 2, 2, 1]


@MESSAGE
@pytest.mark.parametrize("split", ["test", "train"])
def test_an_evaluation_of_a_batch_in_halves(split):
    images, labels = pictures(256), torch.arange(256) % 5
    data = SimpleNamespace(
        test_batches=lambda: [(images[:5], labels[:5]), (images[5:8], labels[5:8])],
        train_batch=lambda _step, count, _seed: (images[:count], labels[:count]),
    )
    tight = small_network(most={"test": 3, "train": 128}[split])
    found, expected = (evaluate(m, data, split=split, batches=1) for m in (tight, small_network()))
    sizes = {"test": [5, 2, 2, 1, 3], "train": [256, 128, 128]}[split]
    assert tight.inception4a.branch3x3.reduce[1].seen == sizes
    assert found == pytest.approx(expected, rel=1e-6)


@MESSAGE
@pytest.mark.parametrize("method", ["grad_cam", "gradient_x_activation", "conductance"])
def test_attributions_of_a_batch_in_halves(method):
    # The classes are given: to find them the whole batch goes through.
    images, labels, options = pictures(), torch.arange(5), {"method": method, "steps": 2}
    found = gl.branch_attribution(small_network(most=3), images, labels, **options)
    halves = [
        gl.branch_attribution(small_network(), *part, **options)
        for part in zip(images.split(2), labels.split(2), strict=True)
    ]
    assert len(found) == 36
    for name, maps in found.items():
        np.testing.assert_array_equal(maps, np.concatenate([half[name] for half in halves]))
    if method == "conductance":
        expected = np.concatenate([half.difference for half in halves])
        np.testing.assert_array_equal(found.difference, expected)
    assert found.targets.tolist() == labels.tolist()


@MESSAGE
def test_channels_at_a_time_give_the_same_images():
    options = {"channels": range(4), "steps": 2, "size": 32}
    found = gl.visualize_channel(small_network(most=2), "inception4b.branch1x1", **options)
    expected = gl.visualize_channel(small_network(), "inception4b.branch1x1", **options)
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1  # rounding
    pd.testing.assert_frame_equal(found.frame, expected.frame, rtol=1e-4)


@pytest.mark.parametrize(
    ("measure", "why"),
    [
        (lambda m, x: gl.gradient_flow(m, x, torch.arange(len(x))), "batch norm and the mean loss"),
        (lambda m, x: layers.layer_times(m, x), "half a batch takes another time"),
    ],
)
def test_what_cannot_be_halved_says_why(measure, why):
    model = small_network(most=3)
    with pytest.raises(RuntimeError, match=f"batch size 5 asked.*not halved, as {why}.*Try") as e:
        measure(model, pictures())
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("preset", ["paper", "torchvision"])
def test_the_prediction_leaves_room_on_a_gpu(preset, training):
    model = gl.googlenet(preset, aux=training, seed=0).cuda()
    weights = sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))
    frame = gl.measure_latency(
        model, batch_sizes=(32,), device="cuda", min_run_time=0.1, rounds=1,
        step="training" if training else "forward",
    )  # fmt: skip
    images = 32 * 3 * 224 * 224 * 4
    found = int(frame.peak_memory[0]) + weights + images  # the column leaves them out
    predicted = predicted_bytes(model, (3, 224, 224), 32, training=training)
    assert MARGIN * found <= predicted <= 1.5 * found


@pytest.mark.gpu
def test_a_gpu_that_is_really_full():
    free = free_bytes(torch.device("cuda"))
    filled = torch.empty(int(0.9 * free), dtype=torch.uint8, device="cuda")
    room = free - filled.nbytes

    def measure(size):
        return len(torch.empty(size, room // 6, dtype=torch.uint8, device="cuda"))

    with pytest.warns(UserWarning, match="out of memory at batch size 8 .*: going on with 4"):
        assert halving(measure, 8) == 4
    with pytest.raises(RuntimeError, match="batch size 64, then 32 asked, and out of memory"):
        halving(measure, 64)
