"""Feature maps by name, with hooks that live exactly as long as a with-block.

`record()`    keep, or reduce as they come, the outputs of named modules
`Recording`   what it gives: name -> maps, and `channel()` for one of them
`observe()`   call a function whenever a named module runs; what the rest of the package builds on
`in_mode()`   training or eval mode for a with-block, every module's own mode afterwards

This is the only file in the package that registers hooks.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Observer = Callable[[str, nn.Module, tuple, Any], None]


@contextlib.contextmanager
def observe(model: nn.Module, names: Iterable[str], observer: Observer) -> Iterator[None]:
    """Call `observer(name, module, inputs, output)` whenever a named module has run.

    Raises ValueError for an unknown name (with the nearest) or a compiled model, whose hooks may
    silently never fire.
    """
    if type(model).__name__ == "OptimizedModule" or model._compiled_call_impl is not None:
        raise ValueError(
            "this model is compiled, and hooks set on a compiled model may never fire; "
            "pass the original module (model._orig_mod), or one that .compile() was not called on"
        )
    with contextlib.ExitStack() as stack:
        for name in names:
            module = _submodule(model, name)
            if module is None:
                near = difflib.get_close_matches(name, dict(model.named_modules()), n=3)
                hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(
                    f"no module {name!r} in {type(model).__name__}.{hint} "
                    "All names: [name for name, _ in model.named_modules()]"
                )

            def hook(module: nn.Module, inputs: tuple, output: Any, name: str = name) -> None:
                observer(name, module, inputs, output)

            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put `model` into training or eval mode; each module has its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Recording(Mapping[str, Any]):
    """What `record` saw: name -> feature maps (N x C x H x W), or name -> reduced state."""

    def __init__(self, slices: dict[str, dict[str, slice]]) -> None:
        self._slices = slices  # Inception module -> branch -> its channels of the output
        self._values: dict[str, Any] = {}
        self._versions: dict[str, tuple[Tensor, int]] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise KeyError(
                f"{name!r} was not recorded; recorded: {', '.join(self._values)}. Name it in "
                "record(model, names)"
            )
        if name in self._versions:
            original, version = self._versions[name]
            if original._version != version:
                raise RuntimeError(
                    f"{name!r} was overwritten in place after it was recorded (an in-place ReLU "
                    "follows it); record with clone=True"
                )
        return self._values[name]

    def channel(self, name: str, index: int) -> Tensor:
        """Maps of one channel, N x H x W, whether the module was recorded or its branches.

        name    of an Inception module: `index` counts in its concatenated output; of a branch, or
                anything else: in its own. "inception3a", 195 is "inception3a.branch5x5", 3

        Raises IndexError for a channel that is not there, KeyError for one not recorded, and
        RuntimeError for maps that were overwritten in place.
        """
        parent, _, branch = name.rpartition(".")
        in_parent = self._slices.get(parent, {}).get(branch)
        if name not in self and in_parent and parent in self:
            count = in_parent.stop - in_parent.start
            return self[parent][:, in_parent.start + _inside(index, count, name)]
        if name not in self and name in self._slices:
            slices = self._slices[name]
            _inside(index, max(channels.stop for channels in slices.values()), name)
            branch, channels = next((b, s) for b, s in slices.items() if s.start <= index < s.stop)
            return self[f"{name}.{branch}"][:, index - channels.start]
        maps = self[name]
        return maps[:, _inside(index, maps.shape[1], name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _inside(index: int, count: int, name: str) -> int:
    if not 0 <= index < count:
        raise IndexError(f"channel {index} of {name!r} asked; it has 0 to {count - 1}")
    return index


def _parts(model: nn.Module, names: list[str]) -> dict[str, dict[str, slice | None]]:
    """Module to hook -> recorded name -> channels of its output (None: all of them).

    A branch is a view of its module's concatenated output where all of that is asked for (the
    module, or every branch): keeping both costs the memory of one.
    """
    parts: dict[str, dict[str, slice | None]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        slices = getattr(_submodule(model, parent), "branch_slices", {})
        siblings = {f"{parent}.{branch}" for branch in slices}
        shared = child in slices and (parent in names or siblings <= set(names))
        parts.setdefault(parent if shared else name, {})[name] = slices[child] if shared else None
    return parts


@contextlib.contextmanager
def record(
    model: nn.Module,
    names: str | Iterable[str],
    *,
    reduce: Callable[[Any, Tensor], Any] | None = None,
    start: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    clone: bool = False,
    training: bool = False,
) -> Iterator[Recording]:
    """Record the outputs of named modules while the with-block runs.

    model    any network, in eval mode
    names    a dotted name or several, as `model.named_modules()` and `branch_names(model)` have
    reduce   `reduce(state, maps) -> state`, called with every output, `state` None at first; the
             recording then holds the last state. Any number of forward passes, constant memory
    start    states by name, from a recording before, to go on from
    device, dtype   where and as what to keep the (detached) maps
    clone    keep a copy, for models that change their maps in place afterwards
    training  allow a model in training mode: every forward pass moves its batch norm's statistics,
             and dropout is part of what is seen

    Gives a mapping of name -> maps, N x C x H x W as the module puts them out (or the reduced
    state); its `channel(name, index)` is one channel, N x H x W.

    The hooks are gone when the block ends, however it ends. Raises ValueError for unknown names,
    compiled models and models in training mode; RuntimeError for a name that never ran or ran twice
    (in one forward pass, or without `reduce` at all), and for a non-tensor output. An output that
    was overwritten in place is noticed when it is read (not under `torch.inference_mode`, which
    tracks no versions).

    >>> import torch, gnetlab as gl
    >>> model = gl.googlenet("cifar", width=0.125, seed=0).eval()
    >>> with gl.record(model, ["inception3a", "inception3a.branch5x5"]) as maps:
    ...     logits = model(torch.rand(2, 3, 32, 32))
    >>> maps["inception3a.branch5x5"].shape, maps.channel("inception3a", 0).shape
    (torch.Size([2, 4, 32, 32]), torch.Size([2, 32, 32]))

    The largest value of every channel over any number of batches, in constant memory:

    >>> def largest(state, maps):
    ...     now = maps.amax((0, 2, 3))
    ...     return now if state is None else torch.maximum(state, now)
    >>> with gl.record(model, "inception4a", reduce=largest) as found:
    ...     for images in torch.rand(3, 4, 3, 32, 32):
    ...         logits = model(images)
    >>> found["inception4a"].shape
    torch.Size([64])
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if model.training and not training:
        raise ValueError(
            "this model is in training mode, where looking at it moves batch norm's statistics; "
            "call model.eval() first, or give training=True if training is what you look at"
        )
    modules = dict.fromkeys(n for name in names for n in (name, name.rpartition(".")[0]))
    slices = {name: getattr(_submodule(model, name), "branch_slices", None) for name in modules}
    recording = Recording({name: found for name, found in slices.items() if found})
    recording._values.update(start or {})
    seen: set[str] = set()
    parts = _parts(model, names)

    def on_output(hooked: str, _module: nn.Module, _inputs: tuple, output: Any) -> None:
        if hooked == "":
            seen.clear()  # the whole model has run: the next forward pass begins
        for name, channels in parts.get(hooked, {}).items():
            if not isinstance(output, Tensor):
                raise RuntimeError(
                    f"{name!r} returns {type(output).__name__}, not one tensor; record a module "
                    "inside it"
                )
            keep(name, output if channels is None else output[:, channels])

    def keep(name: str, output: Tensor) -> None:
        if name in seen or (reduce is None and name in recording._values):
            raise RuntimeError(
                f"{name!r} ran twice; without reduce= one forward pass is recorded, and a module "
                "that is used twice in it cannot be told apart: give each pass its own with-block"
            )
        seen.add(name)
        maps = output.detach()
        if reduce is not None:
            recording._values[name] = reduce(recording._values.get(name), maps)
            return
        kept = maps if device is None and dtype is None else maps.to(device=device, dtype=dtype)
        if kept is maps and clone:
            kept = maps.clone()
        elif kept is maps and not maps.is_inference():
            recording._versions[name] = (maps, maps._version)
        recording._values[name] = kept

    with observe(model, dict.fromkeys([*parts, ""]), on_output):
        yield recording
    missing = [name for name in names if name not in recording._values]
    if missing:
        raise RuntimeError(
            f"never ran inside the with-block: {', '.join(missing[:5])}. Call the model there; "
            "auxiliary heads run only in training mode"
        )
