"""Where a forward pass spends its time, layer by layer.

`layer_times()`   time measured per layer, with the rows of `layer_costs`
`variant_times()` the same for a network as it is, with channels-last memory, and fused
`shares()`        how multiply-adds, bytes and time of a pass are shared out
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gnetlab.measure.costs import layer_costs
from gnetlab.measure.devices import as_current, wait
from gnetlab.measure.hooks import in_mode
from gnetlab.measure.memory import in_one_piece
from gnetlab.measure.rules import DROPOUTS, MORE_VIEWS, VIEWS
from gnetlab.measure.shapes import intercept
from gnetlab.net.fuse import fuse


class _Stopwatch(TorchFunctionMode):
    """Times leaf modules, and the functions that containers call, as `layer_costs` has rows."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.paths = {module: name for name, module in model.named_modules()}
        self.device, self.path = device, ""
        self.names: list[tuple[str, str]] = []
        self.marks: list[tuple] = []

    def call(self, module: nn.Module, args: tuple, kwargs: dict):
        path = self.paths[module]
        if not module._modules:
            return self.timed(path, type(module).__name__, module._call_impl, args, kwargs)
        outer, self.path = self.path, path
        result = module._call_impl(*args, **kwargs)
        self.path = outer
        return result

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").rstrip("_")
        result = None
        if name not in VIEWS | dict.fromkeys(MORE_VIEWS) | dict.fromkeys(DROPOUTS):
            result = self.timed(self.path, name, function, args, kwargs)
            if not isinstance(result, Tensor):  # a question about shapes, not an operation
                self.names.pop(), self.marks.pop()
            return result
        return function(*args, **kwargs)

    def timed(self, path: str, kind: str, run: Callable, args: tuple, kwargs: dict):
        with torch._C.DisableTorchFunction():
            start = self.mark()
            result = run(*args, **kwargs)
            self.marks.append((start, self.mark()))
        self.names.append((path, kind))
        return result

    def mark(self):
        if self.device.type != "cuda":
            wait(self.device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        wait(self.device)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) / 1000 for start, end in self.marks]
        return [end - start for start, end in self.marks]


def layer_times(
    model: nn.Module,
    images: Tensor,
    *,
    rounds: int = 7,
) -> pd.DataFrame:
    """Measured time of every layer in eval mode, on the device and in the layout of `images`.

    The model must be there already. Returns `layer_costs` of one image with `seconds` (median per
    batch over `rounds`, after two that warm up). On CUDA the times are between events; on MPS every
    layer is waited for. Raises RuntimeError if the images do not fit into memory.
    """
    costs = layer_costs(model, tuple(images.shape[1:]))
    runs = []
    whole = in_one_piece(len(images), "half a batch takes another time")
    with torch.inference_mode(), in_mode(model, training=False), as_current(images.device), whole:
        for _ in range(rounds + 2):
            watch = _Stopwatch(model, images.device)
            with intercept(watch.paths, watch.call), watch:
                model(images)
            runs.append(watch.seconds())
    rows = list(zip(costs.module, costs.kind, strict=True))
    if watch.names != rows:
        strange = next((pair for pair in zip(watch.names, rows, strict=False)
                        if pair[0] != pair[1]), (len(watch.names), len(rows)))  # fmt: skip
        raise RuntimeError(
            f"what ran is not what was counted: {strange[0]} against {strange[1]}; layer times "
            "need a model that takes the same way for every image, in functions that can be timed "
            "one by one (attention, and functions that return several tensors, cannot)"
        )
    return costs.assign(seconds=np.median(np.array(runs[2:]), axis=0))


def variant_times(model: nn.Module, images: Tensor, *, rounds: int = 7) -> pd.DataFrame:
    """`layer_times` of a GoogLeNet three ways, on the device of `images`, where it must be.

    Adds `variant`: "as it is", "channels last" (weights and images in that memory format), "fused"
    (`gnetlab.fuse`, which uses it too). The model stays as it is: the others are copies.
    """
    last = images.contiguous(memory_format=torch.channels_last)
    frames = {"as it is": layer_times(model, images, rounds=rounds)}
    fast = copy.deepcopy(model).to(memory_format=torch.channels_last)
    frames["channels last"] = layer_times(fast, last, rounds=rounds)
    frames["fused"] = layer_times(fuse(model), last, rounds=rounds)
    return pd.concat([f.assign(variant=v) for v, f in frames.items()], ignore_index=True)


def shares(times: pd.DataFrame) -> pd.DataFrame:
    """How a pass shares out its multiply-adds, bytes moved and time: a row per layer and quantity.

    `times` as from `layer_times`; adds `quantity` and `amount`.
    """
    amounts = {
        "multiply-adds": times.macs.fillna(0),
        "bytes": times.input_bytes + times.output_bytes + times.weight_bytes,
        "time": times.seconds,
    }
    rows = [times.assign(quantity=n, amount=a.astype(float)) for n, a in amounts.items()]
    return pd.concat(rows, ignore_index=True)
