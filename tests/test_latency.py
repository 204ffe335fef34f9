"""What is timed is a forward pass in eval mode, or a training step; never how long they take."""

import copy
import itertools
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import gnetlab as gl
from gnetlab.measure.devices import device_name
from gnetlab.measure.latency import measure_latency
from gnetlab.measure.layers import layer_times, variant_times
from gnetlab.net.model import GoogLeNetOutput

COLUMNS = [
    "model", "device", "dtype", "memory_format", "mode", "step", "batch_size", "threads", "seconds",
    "iqr", "runs", "images_per_second", "peak_memory",
]  # fmt: skip
INPUT = (3, 8, 8)


class Notes(list):
    """What a model noted; its copies write into the same notes."""

    def __deepcopy__(self, memo):
        return self


def is_real(x):
    """Not the stand-in by which the memory of a batch is predicted."""
    return isinstance(x, torch.Tensor) and not x.is_meta


class Probe(nn.Sequential):
    """A tiny network that remembers what it was asked to do."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.notes = Notes()

    @property
    def seen(self):
        return set(self.notes)

    def forward(self, x):
        if not is_real(x):
            return super().forward(x)
        fast = {t.is_contiguous(memory_format=torch.channels_last) for t in (x, self[0].weight)}
        modes = self.training, torch.is_inference_mode_enabled()
        self.notes.append((tuple(x.shape), x.dtype, self[0].weight.dtype, *fast, *modes))
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
        "device": "cpu", "dtype": "float32", "memory_format": "contiguous", "mode": "eager",
        "step": "forward",
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


def test_every_combination_is_a_row():
    models = {"one": Probe(), "other": Probe()}
    dtypes, steps = (torch.float32, torch.float64), ("forward", "training")
    frame = measure(
        models, batch_sizes=(2, 1), rounds=1, dtype=iter(dtypes), step=steps,
        channels_last=(False, True, False),
    )  # fmt: skip
    keys = ["batch_size", "dtype", "memory_format", "step", "model"]
    assert frame[keys].to_records(index=False).tolist() == [*itertools.product(
        (2, 1), ("float32", "float64"), ("contiguous", "channels_last"), steps, models
    )]  # fmt: skip
    for model in models.values():
        assert model.seen == {
            ((n, *INPUT), dtype, dtype, fast, step == "training", step == "forward")
            for n, dtype, fast, step in itertools.product((1, 2), dtypes, (False, True), steps)
        }


def test_models_and_settings_take_turns():
    calls, steps = [], ("forward", "training")
    models = {name: Probe() for name in ("one", "other")}
    for name, model in models.items():
        model.register_forward_hook(
            lambda module, inputs, _, n=name: calls.append((n, module.training, len(inputs[0])))
        )
    measure(models, batch_sizes=(1, 2), rounds=3, step=steps)
    turns = [turn for turn, _ in itertools.groupby(calls)]
    assert turns == [
        (name, step == "training", size)
        for size in (1, 2) for _ in range(1 + 3) for step in steps for name in models
    ]  # fmt: skip


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


class Heads(nn.Module):
    """Two classifiers and an absent one; notes its input, and gradients before they are cleared."""

    def __init__(self):
        super().__init__()
        self.main, self.aux = nn.Linear(192, 5), nn.Linear(192, 4)
        self.notes = Notes()

    def forward(self, x):
        if is_real(x):
            self.notes.append(x)
        return GoogLeNetOutput(self.main(x.flatten(1)), None, self.aux(x.flatten(1)))

    def zero_grad(self, set_to_none=True):
        self.notes.append([p.grad for p in self.parameters()])
        super().zero_grad(set_to_none)


def test_a_training_step_is_the_loss_of_every_output_and_its_gradients():
    model = Heads()
    sum(p.sum() for p in model.parameters()).backward()  # not to be added to
    with torch.no_grad():  # of the caller, and no business of the step
        measure(model, batch_sizes=(3,), step="training")
    assert len(model.notes) > 4
    for x, found in zip(model.notes[::2], model.notes[1::2], strict=True):
        losses = [F.cross_entropy(part(x.flatten(1)), torch.zeros(3, dtype=torch.long))
                  for part in (model.main, model.aux)]  # fmt: skip
        expected = torch.autograd.grad(sum(losses), list(model.parameters()))
        assert all(map(torch.allclose, found, expected))  # of this step alone


def test_outputs_by_name_take_part_in_a_training_step():
    class Named(Heads):
        def forward(self, x):
            output = super().forward(x)
            return {"out": output.logits, "aux": output.aux2, "nothing": None}

    model = Named()
    measure(model, batch_sizes=(3,), step="training")
    assert all(p is not None for p in model.notes[1])


def test_googlenet_trains_with_its_heads():
    model = gl.googlenet("torchvision", width=0.1, num_classes=3)
    ran = []
    model.aux1.register_forward_hook(lambda *_: ran.append("aux1"))
    frame = measure(model, input_size=(3, 64, 64), batch_sizes=(2,), step="training", rounds=1)
    assert frame.step.tolist() == ["training"]
    assert len(ran) >= 2


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64, "channels_last": True},
        {"channels_last": True},
        {"step": ("forward", "training")},
        {},
    ],
)
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_the_models_and_the_random_state_stay(given, options):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model.to(memory_format=given)[1].eval()
    model(torch.randn(2, *INPUT)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    before, random_state = copy.deepcopy(model), torch.get_rng_state()
    measure(model, **options)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)
    for old, new in zip(before.state_dict().values(), model.state_dict().values(), strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(old, new)
        assert old.stride() == new.stride()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, r"dtype='float32' asked; choose .*torch\.float32, torch\.bfloat16"),
        ({"dtype": torch.int64}, r"dtype=torch\.int64 asked"),
        ({"dtype": ()}, r"dtype=\(\) asked"),
        ({"channels_last": "yes"}, r"channels_last='yes' asked; .*\(False, True\)"),
        ({"mode": ("eager", "jit")}, r"mode=\('eager', 'jit'\) asked; .*'compile:reduce-overhead'"),
        ({"mode": "compile:fast"}, "mode='compile:fast' asked"),
        ({"step": "backward"}, "step='backward' asked; .*'forward', 'training'"),
        ({"batch_sizes": (1, 0)}, r"batch_sizes=\[1, 0\]"),
        ({"batch_sizes": ()}, r"batch_sizes=\[\]"),
        ({"batch_sizes": (1.5,)}, r"batch_sizes=\[1\.5\]"),
        ({"rounds": 0}, "rounds=0"),
        ({"min_run_time": 0}, "min_run_time=0"),
        ({"device": "gpu"}, "device='gpu' asked"),
    ],
)
def test_bad_values_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        measure(Probe(), **options)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match=r"models=\[\]"):
        measure({})


def test_training_a_frozen_network_is_an_error():
    models = {"open": Probe(), "frozen": Probe().requires_grad_(False)}
    with pytest.raises(ValueError, match="no weight of 'frozen' takes a gradient"):
        measure(models, step="training")


@pytest.fixture
def compiling(monkeypatch):
    """torch.compile with a backend that generates no code; every graph and call is noted."""
    calls, graphs, compile_ = [], [], torch.compile

    def remember(model, *, mode, dynamic):
        def backend(graph, inputs):  # noqa: ARG001
            graphs.append(graph)
            return graph.forward

        calls.append((mode, dynamic))
        return compile_(model, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", remember)
    return calls, graphs


@pytest.mark.usefixtures("compiling")
def test_a_copy_is_made_only_where_something_changes(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    copies, deepcopy = [], copy.deepcopy

    def remember(x, *memo):
        copies.extend([x] * (x is model))
        return deepcopy(x, *memo)

    monkeypatch.setattr(copy, "deepcopy", remember)
    measure(model)
    assert copies == []
    measure(model, dtype=(torch.float32, torch.bfloat16), batch_sizes=(1, 2))
    assert len(copies) == 1
    measure(model, step=("forward", "training"), batch_sizes=(1, 2), mode=("eager", "compile"))
    assert len(copies) == 2


def test_modes_are_compared(compiling):
    calls, graphs = compiling
    modes = ("eager", "compile", "compile:reduce-overhead")
    frame = measure(nn.Conv2d(3, 4, 3), mode=modes, rounds=1)
    assert frame["mode"].tolist() == [*modes]
    assert calls == [(None, False), ("reduce-overhead", False)]
    assert len(graphs) == 2


def test_no_network_falls_back_to_eager_unseen(compiling):
    """torch.compile gives up after 8 graphs of the same source, without an error."""
    models = {str(width): nn.Sequential(nn.Conv2d(3, width, 3)) for width in range(1, 7)}
    measure(models, batch_sizes=(1, 2), mode="compile", rounds=1)
    assert len(compiling[1]) == 6 * 2


def test_a_compiler_that_fails_is_an_error(monkeypatch):
    def backend(graph, inputs):  # noqa: ARG001
        raise FileNotFoundError("no g++ here")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend=backend))
    with pytest.raises(
        RuntimeError, match=r"(?s)mode='compile' asked.*no g\+\+ here.*mode='eager'"
    ):
        measure(nn.Conv2d(3, 4, 3), mode=("eager", "compile"))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler, g++")
def test_compiled_for_real():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU())
    frame = measure(model, mode=("eager", "compile"), step=("forward", "training"), rounds=1)
    assert frame["mode"].tolist() == ["eager", "compile"] * 2
    assert frame.step.tolist() == ["forward"] * 2 + ["training"] * 2
    assert (frame.seconds > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["forward", "training"])
def test_peak_memory_on_cuda(step):
    model = nn.Conv2d(3, 64, 3)
    options = {"batch_sizes": (1, 8), "device": "cuda", "input_size": (3, 64, 64)}
    frame = measure(model, step=step, **options)
    assert frame.device.tolist() == ["cuda", "cuda"]
    small, large = (int(peak) for peak in frame.peak_memory)
    assert large > small >= 64 * 62 * 62 * 4  # at least the output
    assert next(model.parameters()).device.type == "cpu"
    assert torch.cuda.get_device_name() == device_name("cuda")


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_variants_leave_the_models_format_to_it(given):
    model = gl.googlenet("cifar", width=0.1).eval().to(memory_format=given)
    before = [p.stride() for p in model.parameters()]
    variant_times(model, torch.randn(1, 3, 16, 16), rounds=1)
    assert [p.stride() for p in model.parameters()] == before


class Attends(nn.Module):
    """Attention of an image's pixels to each other."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, x):
        pixels = x.flatten(2).mT
        return self.attention(pixels, pixels, pixels)[0]


def test_layer_times_of_attention_say_that_it_cannot_be_timed():
    with pytest.raises(RuntimeError, match=r"one by one \(attention"):
        layer_times(Attends().eval(), torch.randn(1, 3, 4, 4), rounds=1)
