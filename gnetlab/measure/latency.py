"""How long a forward pass or a training step takes on a device, and what memory it needs.

`measure_latency()`  median time, spread, throughput, peak memory per configuration and batch size
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnetlab.measure.devices import as_current, fork_random, resolve_device, tell
from gnetlab.measure.hooks import in_mode
from gnetlab.measure.memory import fitting_batch_size, halving

KNOWN = {  # what can be compared, beside models and batch sizes
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "channels_last": (False, True),
    "step": ("forward", "training"),
    "mode": ("eager", "compile", "compile:reduce-overhead", "compile:max-autotune",
             "compile:max-autotune-no-cudagraphs"),
}  # fmt: skip

LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
Setting = namedtuple("Setting", KNOWN)  # one choice of each


def measure_latency(
    models: nn.Module | Mapping[str, nn.Module],
    *,
    input_size: tuple[int, ...] = (3, 224, 224),
    batch_sizes: Iterable[int] = (1,),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Iterable[torch.dtype] = torch.float32,
    channels_last: bool | Iterable[bool] = False,
    mode: str | Iterable[str] = "eager",
    step: str | Iterable[str] = "forward",
    min_run_time: float = 1.0,
    rounds: int = 5,
) -> pd.DataFrame:
    """Time of a forward pass or a training step, one row per model, batch size and setting.

    models         a model, or several by name: models and settings take turns, so that what else
                   the machine does falls on all of them and their ratios can be trusted
    input_size     of one image: channels, height, width; batch_sizes: images per batch, several
    device         "auto", "cpu", "cuda", "cuda:1" or "mps"
    dtype          of weights and images; this and the next three: one value, or several to compare
    channels_last  memory format of weights and images (True suits the networks of `fuse()`)
    mode           "eager", "compile" (torch.compile, static shapes), "compile:reduce-overhead", ...
    step           "forward" (eval mode, no gradients) or "training" (training mode, cross-entropy
                   summed over all outputs, auxiliary heads too, backward; no optimizer)
    min_run_time   seconds per row, over all rounds, after warming up and compiling
    rounds         turns that each row takes

    Columns: `model`, `device`, `dtype`, `memory_format`, `mode`, `step`, `batch_size`, `threads`,
    `seconds` (median per batch), `iqr` (interquartile range, seconds), `runs`,
    `images_per_second`, `peak_memory` (bytes beyond weights and images; CUDA only, else NA).

    A batch size that does not fit into memory, for one of the models, is halved for all, as
    `gnetlab.measure.memory` says, and larger ones after it are left out; both are told of.
    `batch_size` is what was measured, each once.

    Models and random state stay as they are: where a model would have to change, a copy is
    measured, one per dtype, format and step. Raises ValueError for a value it does not know,
    RuntimeError where torch.compile finds no compiler or half a batch does not fit either.

    >>> import gnetlab as gl
    >>> model = gl.googlenet("cifar", width=0.125, seed=0)
    >>> networks = {"plain": model, "fused": gl.fuse(model)}
    >>> times = gl.measure_latency(
    ...     networks, input_size=(3, 32, 32), batch_sizes=[1, 8], min_run_time=0.02, rounds=1
    ... )
    >>> times[["model", "batch_size"]].values.tolist()
    [['plain', 1], ['fused', 1], ['plain', 8], ['fused', 8]]
    >>> bool((times.seconds > 0).all())
    True
    """
    if isinstance(models, nn.Module):
        models = {type(models).__name__: models}
    settings, batch_sizes = _settings(dtype, channels_last, step, mode), list(batch_sizes)
    whole = all(hasattr(size, "__index__") and size > 0 for size in batch_sizes)
    if not (models and batch_sizes and whole and rounds >= 1 and min_run_time > 0):
        raise ValueError(
            f"models={[*models]}, {batch_sizes=}, {rounds=}, {min_run_time=} asked; give one or "
            "more of each, batch sizes as whole numbers from 1, and a time above 0 seconds"
        )
    device = torch.empty(0, device=resolve_device(str(device))).device  # "cuda" with its index
    settings = _possible(settings, device)
    ready, keys = {}, list(itertools.product(settings, models))
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_current(device))  # which Timer waits for
        stack.enter_context(fork_random(device))
        if any(setting.mode != "eager" for setting in settings):
            # Past the limit, which is per line of source and not per model, torch runs eagerly.
            limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 10_000)
            stack.enter_context(torch._dynamo.config.patch(limits))
        for setting, name in keys:
            if (name, setting[:3]) not in ready:  # eager and compiled share weights
                ready[name, setting[:3]] = _prepared(name, models[name], setting, device, stack)
        measured: dict[int, list[dict[str, Any]]] = {}

        def measure(size: int) -> None:
            if size not in measured:
                shape = (size, *input_size)
                runs = {(n, s): _run(ready[n, s[:3]], shape, s, device) for s, n in keys}
                measured[size] = _take_turns(runs, size, device, rounds, min_run_time)

        too_large = None
        for size in batch_sizes:
            size = _fitting(ready, input_size, size, device)
            if too_large is not None and size >= too_large:
                tell(f"batch size {size} asked; {too_large} did not fit already: it is left out")
                continue
            halving(measure, size, result=", for all models")
            if size not in measured:
                too_large = size
    rows = itertools.chain.from_iterable(measured.values())
    return pd.DataFrame(rows).astype({"peak_memory": "Int64"})


def _fitting(
    ready: Mapping[tuple, nn.Module], input_size: tuple[int, ...], size: int, device: torch.device
) -> int:
    """The batch size that fits for all, whatever step they are to take."""
    for training in (False, True):
        models = [m for (_, setting), m in ready.items() if (setting[2] == "training") == training]
        size = fitting_batch_size(models, input_size, size, device=device, training=training)
    return size


def _possible(settings: list[Setting], device: torch.device) -> list[Setting]:
    """Without what ends the process on MPS: average pooling's gradient in channels-last memory."""
    if device.type != "mps":
        return settings
    possible = [s for s in settings if not (s.channels_last and s.step == "training")]
    if not possible:
        raise ValueError(
            "channels_last=True, step='training' asked on MPS, where PyTorch's average pooling has "
            "no gradient in that memory format; use channels_last=False or device='cpu'"
        )
    if len(possible) < len(settings):
        tell("on MPS training steps are not measured in channels-last memory: PyTorch fails there")
    return possible


def _settings(*asked: Any) -> list[Setting]:
    """Every combination of what was asked: one value, or several, for each field of Setting."""
    choices = []
    for (name, known), values in zip(KNOWN.items(), asked, strict=True):
        several = isinstance(values, Iterable) and not isinstance(values, str)
        choices.append(list(values if several else [values]))
        wrong = [value for value in choices[-1] if value not in known]
        if wrong or not choices[-1]:
            raise ValueError(f"{name}={values!r} asked; choose one or several of {known}")
    return [Setting(*values) for values in itertools.product(*choices)]


def _prepared(
    name: str, model: nn.Module, setting: Setting, device: torch.device, stack: contextlib.ExitStack
) -> nn.Module:
    """The model itself while the stack is open if nothing of it has to change, else a copy."""
    layout, training = LAYOUTS[setting.channels_last], setting.step == "training"
    fits = all(
        tensor.device == device
        and (tensor.dtype == setting.dtype or not tensor.is_floating_point())
        and (tensor.dim() != 4 or tensor.is_contiguous(memory_format=layout))
        for tensor in itertools.chain(model.parameters(), model.buffers())
    )
    if fits and not training:
        stack.enter_context(in_mode(model, training=False))
        return model
    if training and not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"step='training' asked, but no weight of {name!r} takes a gradient (a frozen or fused "
            "network?); use step='forward' for it"
        )
    model = copy.deepcopy(model)  # without its gradients
    return model.to(device, setting.dtype, memory_format=layout).train(training)


def _run(model: nn.Module, shape: tuple, setting: Setting, device: torch.device) -> Callable:
    """What is timed, as a function of no arguments."""
    images = torch.randn(shape, device=device, dtype=setting.dtype)
    images = images.contiguous(memory_format=LAYOUTS[setting.channels_last])
    call: Callable[[Tensor], Any] = model
    if setting.mode != "eager":
        call = torch.compile(model, mode=setting.mode.partition(":")[2] or None, dynamic=False)

    def forward() -> None:
        with torch.inference_mode():
            call(images)

    def training() -> None:
        with torch.enable_grad():
            output = call(images)
            outputs = output.values() if isinstance(output, Mapping) else output
            outputs = [output] if isinstance(output, Tensor) else filter(torch.is_tensor, outputs)
            sum(map(_loss, outputs)).backward()
        model.zero_grad(set_to_none=True)

    return training if setting.step == "training" else forward


def _loss(logits: Tensor) -> Tensor:
    # Which class is right makes no difference to the time.
    return F.cross_entropy(logits, logits.new_zeros(logits.shape[:1] + logits.shape[2:]).long())


def _take_turns(
    runs: Mapping[tuple[str, Setting], Callable[[], None]], batch_size: int, device: torch.device,
    rounds: int, min_run_time: float,
) -> list[dict[str, Any]]:  # fmt: skip
    # This import warns on machines with a CUDA toolkit and no GPU, where nothing is amiss.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    peaks = {key: _peak_memory(run, key[1].mode, device) for key, run in runs.items()}
    timers = {key: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
              for key, run in runs.items()}  # fmt: skip
    measured: dict[tuple[str, Setting], list] = {key: [] for key in runs}
    for _, (key, timer) in itertools.product(range(rounds), timers.items()):
        measured[key].append(timer.blocked_autorange(min_run_time=min_run_time / rounds))
    rows = []
    for (name, setting), samples in measured.items():
        times = pd.Series([t for sample in samples for t in sample.times])
        rows.append({
            "model": name, "device": device.type,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "memory_format": "channels_last" if setting.channels_last else "contiguous",
            "mode": setting.mode, "step": setting.step,
            "batch_size": batch_size, "threads": torch.get_num_threads(),
            "seconds": times.median(), "iqr": times.quantile(0.75) - times.quantile(0.25),
            "runs": sum(len(s.times) * s.number_per_run for s in samples),
            "images_per_second": batch_size / times.median(),
            "peak_memory": peaks[name, setting],
        })  # fmt: skip
    return rows


def _peak_memory(run: Callable[[], None], mode: str, device: torch.device) -> int | None:
    """Bytes beyond what was allocated before, on CUDA; these first passes also warm up."""
    on_cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_cuda else 0
    if mode != "eager":  # one pass to compile, one to warm CUDA graphs up, one to record them
        try:
            for _ in range(3):
                run()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise RuntimeError(
                f"mode={mode!r} asked, but torch.compile fails on {device}: {error}\n(it needs a "
                "C++ compiler such as g++, on CUDA also Triton; or use mode='eager')"
            ) from error
    if not on_cuda:
        run()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
