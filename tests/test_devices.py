"""Devices that are there, that are not, and that are there and do not work; all of them played."""

import contextlib
import traceback
import warnings
from types import SimpleNamespace

import pytest
import torch
from test_loop import Blobs, small
from torch import nn
from torch.backends import cudnn
from torch.utils import deterministic as filling
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gnetlab as gl
from gnetlab.measure import devices, gradients, latency, layers, loop, receptive
from gnetlab.measure.devices import (
    as_current,
    deterministic,
    device_name,
    float64,
    fork_random,
    resolve_device,
    wait,
)
from gnetlab.measure.sparsity import sparse_speed

# What PyTorch says, word for word.
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: "
    "http://www.nvidia.com/Download/index.aspx Alternatively, go to: https://pytorch.org to "
    "install a PyTorch version that has been compiled with your version of the CUDA driver."
)
NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed "
    "a driver from http://www.nvidia.com/Download/index.aspx"
)
NOT_COMPILED = "Torch not compiled with CUDA enabled"
NO_GPUS = "No CUDA GPUs are available"
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 7.79 GiB of "
    "which 1.06 MiB is free."
)


@pytest.fixture(autouse=True)
def nothing_told():
    devices.tell.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """`machine(cuda=..., mps=...)`: None where the device works, else the error it raises."""
    real = torch.ones

    absent = AssertionError(NOT_COMPILED)

    def play(cuda=absent, mps=False):
        def ones(*size, device):
            if torch.device(device).type == "cuda" and cuda:
                raise cuda
            return real(*size)  # on the CPU, where a device works

        monkeypatch.setattr(torch, "ones", ones)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return play


@pytest.mark.parametrize(
    ("found", "device"),
    [
        ({"cuda": None, "mps": False}, "cuda"),
        ({"cuda": None, "mps": True}, "cuda"),
        ({"mps": True}, "mps"),
        ({"cuda": RuntimeError(NO_DRIVER), "mps": True}, "mps"),
        ({"cuda": RuntimeError(NO_DRIVER)}, "cpu"),
        ({"cuda": RuntimeError(NO_GPUS)}, "cpu"),
        ({}, "cpu"),
    ],
)
def test_auto_takes_what_is_there_and_says_nothing(machine, found, device):
    machine(**found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device("auto") == torch.device(device)
        assert resolve_device() == torch.device(device)
        assert resolve_device("cpu") == torch.device("cpu")
        without_mps = "cpu" if device == "mps" else device
        assert resolve_device("auto", sparse=True) == torch.device(without_mps)


@pytest.fixture
def old_driver(monkeypatch):
    """As PyTorch behaves: asked whether CUDA is there it warns, the first use raises."""

    def is_available():
        warnings.warn(f"CUDA initialization: {TOO_OLD}", stacklevel=2)
        return False

    def init():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "_lazy_init", init)


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA works here")
@pytest.mark.usefixtures("old_driver")
class TestOldDriver:
    def test_auto_falls_back_and_says_so_once(self):
        with pytest.warns(UserWarning, match="CUDA") as said:
            assert [resolve_device().type for _ in range(3)] == ["cpu"] * 3
        assert len(said) == 1
        text = str(said[0].message)
        assert "there is a CUDA device, but it does not work" in text
        assert "too old (found version 11040)" in text
        assert "newer NVIDIA driver, or a build of PyTorch for this driver" in text

    @pytest.mark.parametrize("device", ["cuda", "cuda:1"])
    def test_cuda_asked_is_an_error_with_the_cause(self, device):
        with pytest.raises(ValueError, match=rf"'{device}' asked.*too old \(found version 11040\)"):
            resolve_device(device)

    def test_what_measures_goes_on_with_auto(self):
        with pytest.warns(UserWarning, match="too old"):
            frame = gl.measure_latency(
                nn.Flatten(), input_size=(1, 2, 2), device="auto", min_run_time=0.001, rounds=1
            )
        assert frame.device.tolist() == ["cpu"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with"),
        RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"),
        torch.OutOfMemoryError(FULL),
        torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization with error"),
    ],
)
def test_a_gpu_that_does_not_work_is_passed_over(machine, error):
    machine(cuda=error)
    cause = str(error).partition("\n")[0].partition(". ")[0]
    with pytest.warns(UserWarning, match=cause) as said:
        assert resolve_device().type == "cpu"
    assert "Compile with" not in str(said[0].message)
    with pytest.raises(ValueError, match=f"'cuda' asked.*{cause}"):
        resolve_device("cuda")


def test_a_device_that_is_no_device_is_an_error():
    with pytest.raises(ValueError, match="'gpu' asked; choose 'auto', 'cpu', 'cuda', 'cuda:1'"):
        resolve_device("gpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("text", [NO_DRIVER, NO_GPUS, NOT_COMPILED])
def test_absent_cuda_is_an_error(machine, device, text):
    machine(cuda=RuntimeError(text))
    with pytest.raises(ValueError, match=rf"'{device}' asked.*{text[:30]}.*'auto' or 'cpu'"):
        resolve_device(device)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_another_absent_device_is_an_error(device):
    if getattr(torch, device, None) and getattr(torch, device).is_available():
        pytest.skip(f"{device} is there")
    with pytest.raises(ValueError, match=f"'{device}' asked, but PyTorch cannot use"):
        resolve_device(device)


def test_an_absent_cuda_index_is_an_error(machine):
    machine(cuda=RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range"))
    with pytest.raises(ValueError, match=r"'cuda:7' asked.*invalid device ordinal\. Try"):
        resolve_device("cuda:7")


def test_the_name_of_the_cpu_says_the_threads():
    threads = torch.get_num_threads()
    assert device_name("cpu").endswith(f"({threads} thread{'s' if threads > 1 else ''})")
    assert device_name(torch.device("cpu")) == device_name("cpu")


class TestMPS:
    """Apple's GPU, played; none of this was run on one."""

    DEVICE = torch.device("mps")

    def test_it_is_named(self, monkeypatch):
        monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M9")
        assert device_name("mps") == "Apple M9 (MPS)"

    def test_clocks_wait_for_it(self, monkeypatch):
        waited = []
        monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
        wait(torch.device("cpu"))
        assert waited == []
        wait(self.DEVICE)
        watch = layers._Stopwatch(nn.Flatten(), self.DEVICE)
        assert isinstance(watch.mark(), float)
        assert waited == [self.DEVICE] * 2

    def test_doubles_lie_on_the_cpu(self):
        there = SimpleNamespace(device=self.DEVICE, cpu=lambda: torch.ones(2))  # else no method
        assert float64(there).dtype == torch.float64
        assert float64(torch.ones(2)).dtype == torch.float64

    def test_its_random_state_is_as_before(self, monkeypatch):
        states = {"mps": torch.tensor([1])}
        monkeypatch.setattr(torch.mps, "get_rng_state", lambda _: states["mps"])
        monkeypatch.setattr(torch.mps, "set_rng_state", lambda new, _: states.update(mps=new))
        before = torch.get_rng_state()
        with fork_random(self.DEVICE):
            states["mps"] = torch.tensor([2])
            torch.rand(1)
        assert states["mps"] == 1
        assert torch.equal(torch.get_rng_state(), before)

    def test_sparse_matrices_are_not_asked_of_it(self, machine):
        machine(mps=True)
        with torch.device("meta"):
            model = gl.googlenet("naive", aux=False)
        with pytest.raises(ValueError, match=r"'mps' asked.*no sparse matrices.*'cpu'"):
            sparse_speed(model, device="mps")

    def test_what_would_end_the_process_is_left_out(self):
        asked = latency._settings(torch.float32, (False, True), ("forward", "training"), "eager")
        assert latency._possible(asked, torch.device("cpu")) == asked
        with pytest.warns(UserWarning, match="on MPS training steps are not measured in channels"):
            possible = latency._possible(asked, self.DEVICE)
        assert [(s.channels_last, s.step) for s in possible] == [
            (False, "forward"), (False, "training"), (True, "forward"),
        ]  # fmt: skip
        only = latency._settings(torch.float32, True, "training", "eager")
        with pytest.raises(ValueError, match="channels_last=True, step='training' asked on MPS"):
            latency._possible(only, self.DEVICE)


def test_a_gpu_is_the_current_one_in_a_block(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(device))
    with as_current(torch.device("cuda:1")) as found:
        assert found == torch.device("cuda:1")
    with as_current(torch.device("cpu")) as found:
        assert found is None


@pytest.mark.parametrize("module", [latency, layers, loop])
def test_what_times_or_captures_does_so_on_the_device(monkeypatch, module):
    current, seen = [], []

    @contextlib.contextmanager
    def note(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(module, "as_current", note)
    model, data = small(), Blobs()
    model.avgpool.register_forward_hook(lambda *_: seen.append(list(current)))
    {
        latency: lambda: gl.measure_latency(
            model, input_size=(3, 16, 16), device="cpu", min_run_time=0.001, rounds=1
        ),
        layers: lambda: layers.layer_times(model, data.train_batch(0, 2)[0], rounds=1),
        loop: lambda: gl.train(model, data, steps=1, batch_size=4, progress=False),
    }[module]()
    assert seen
    assert all(found == [torch.device("cpu")] for found in seen)
    assert current == []


class WithoutDoubles(TorchDispatchMode):
    """The CPU as if it were MPS: nothing becomes double but through `float64`, nor meets float."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim()}
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            made = torch.float64 not in given
            inside = any(frame.name == "float64" for frame in traceback.extract_stack())
            assert inside or not made, f"{function} makes doubles"
        assert not {torch.float32, torch.float64} <= given, f"{function} has both on a device"
        return result


def measured(name, model, images):
    labels = torch.arange(len(images))
    batch = images, labels
    return {
        "branch_statistics": lambda: gl.branch_statistics(model, images),
        "branch_correlation": lambda: gl.branch_correlation(model, images, permutations=2),
        "branch_ablation": lambda: gl.branch_ablation(model, [batch]),
        "conductance": lambda: gl.branch_attribution(model, images, method="conductance", steps=1),
        "visualize_channel": lambda: gl.visualize_channel(
            model, "inception3a.branch1x1", 0, steps=1, size=32
        ),
        "receptive": lambda: receptive.effective_receptive_fields(model, images),
        "gradient_flow": lambda: gl.gradient_flow(model, *batch),
        "output_flow": lambda: gradients.output_flow(model, *batch),
        "gradient_noise": lambda: gradients.gradient_noise(model, [batch, batch]),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "branch_statistics", "branch_correlation", "branch_ablation", "conductance",
        "visualize_channel", "receptive", "gradient_flow", "output_flow", "gradient_noise",
    ],
)  # fmt: skip
def test_no_double_is_made_where_there_is_none(name):
    model = gl.googlenet(norm="batch", width=0.05, num_classes=3, stem="compact", seed=0)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with WithoutDoubles():
        measured(name, model.eval(), images)


def state():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        filling.fill_uninitialized_memory,
        cudnn.benchmark,
    )


@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_deterministic_lasts_as_long_as_its_block(monkeypatch, benchmark, strict):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # to be put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(cudnn, "benchmark", benchmark)
    torch.use_deterministic_algorithms(strict)
    try:
        before = state()
        with deterministic(False):
            assert state() == before
        with contextlib.suppress(KeyboardInterrupt), deterministic():
            assert state() == (True, True, False, False)
            assert devices.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise KeyboardInterrupt
        assert state() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_workspace_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic():
        assert devices.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.gpu
def test_the_same_bits_on_a_gpu():
    model = gl.googlenet(norm="batch", num_classes=10, seed=0).cuda()
    images, labels = torch.randn(16, 3, 224, 224).cuda(), torch.arange(16).cuda() % 10
    with deterministic():
        found = [gradients.split_gradients(model, images, labels) for _ in range(3)]
    for again in found[1:]:
        for layer, by_source in found[0].items():
            assert all(torch.equal(g, again[layer][source]) for source, g in by_source.items())


@pytest.mark.gpu
def test_cuda_works_where_it_does():
    assert resolve_device() == torch.device("cuda")
    assert resolve_device("cuda:0").index == 0
    assert torch.cuda.get_device_name() == device_name("cuda")
