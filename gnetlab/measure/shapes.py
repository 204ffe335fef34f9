"""A forward pass on shapes alone: which layers run, on what, at what cost.

`forward_pass()`   run a model on a stand-in for an image; one `Step` per layer that runs
`Step`, `Pass`     what it returns

A stand-in carries a shape and answers PyTorch's functions through `__torch_function__`: nothing is
computed, and the model's weights are only asked for their shapes. A model that calls a function
without a rule runs on PyTorch's meta device instead; what has no rule there stays visible as a
step whose `macs` are None.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gnetlab.measure.hooks import in_mode
from gnetlab.measure.rules import (
    DROPOUTS,
    MORE_VIEWS,
    RULES,
    SAVES_INPUT,
    SAVES_OUTPUT,
    SYNONYMS,
    VIEWS,
    Shape,
    Unknown,
    Work,
    require,
)


class Step:
    """A leaf module that ran, or a function that a container called; sums over what it did."""

    __slots__ = (
        "activations", "backward_macs", "bias_additions", "comparisons", "depth", "elementwise",
        "input_bytes", "kernel", "kind", "live_bytes", "macs", "module", "operation",
        "output_bytes", "output_shape", "parameters", "stored_bytes", "weight_bytes",
    )  # fmt: skip

    def __init__(self, module: str, kind: str) -> None:
        self.module, self.kind, self.operation = module, kind, ""
        self.output_shape: Shape = ()
        self.kernel: Shape = ()  # of a convolution
        self.activations: int | None = None
        self.macs: int | None = 0
        self.parameters = self.bias_additions = self.elementwise = self.comparisons = 0
        self.input_bytes = self.output_bytes = self.weight_bytes = self.live_bytes = 0
        self.backward_macs = self.stored_bytes = self.depth = 0


class Pass(NamedTuple):
    """What ran: steps in order of execution, concatenations, and what the counts are for.

    `joins` has, per concatenation, the module and for each input the steps above it (bit i stands
    for step i); `images` is the batch size counted, `itemsize` the bytes of an element.
    """

    steps: list[Step]
    joins: list[tuple[str, list[int]]]
    images: int
    itemsize: int


class _Memory:
    """Bytes that live as long as anything refers to them, as PyTorch's own allocations do."""

    __slots__ = ("size", "trace")

    def __init__(self, trace: _Trace, size: int) -> None:
        self.trace, self.size = trace, size
        trace.live += size

    def __del__(self) -> None:
        self.trace.live -= self.size


class _StandIn:
    """A tensor's shape, its memory, and what led to it.

    `above` has a bit for each step, `depth` counts the layers with weights on the longest path,
    `learns` says whether it has a gradient. PyTorch hands any function that gets one to
    `__torch_function__`; methods go the same way.
    """

    __slots__ = ("above", "depth", "dtype", "learns", "memory", "shape")
    device = torch.device("cpu")
    is_cuda = is_quantized = is_sparse = is_nested = False

    def __init__(
        self,
        shape: Shape,
        memory: _Memory,
        above: int,
        learns: bool,
        depth: int,
        dtype: torch.dtype,
    ) -> None:
        self.shape, self.memory, self.above, self.learns = shape, memory, above, learns
        self.depth, self.dtype = depth, dtype

    @classmethod
    def __torch_function__(cls, function, _types, args=(), kwargs=None):
        return _LOCAL.trace.run(function, args, kwargs or {})

    ndim = property(lambda self: len(self.shape))
    requires_grad = property(lambda self: self.learns)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None):
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def __iter__(self):
        raise Unknown("iteration")

    def __bool__(self) -> bool:
        raise Unknown("a decision that depends on values")


class _MetaTensor(Tensor):
    """The same on PyTorch's meta device: PyTorch itself works out the shapes."""

    @classmethod
    def __torch_function__(cls, function, _types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return _LOCAL.trace.run(function, args, kwargs or {})


def _method(name: str):
    function = getattr(Tensor, name)
    return lambda *args, **kwargs: _LOCAL.trace.run(function, args, kwargs, name)


for _name in (
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split",
    "contiguous", "expand", "mean", "relu", "sigmoid", "softmax", "add", "mul", "sub", "div",
    "add_", "mul_", "__getitem__", "__add__", "__radd__", "__iadd__", "__mul__", "__rmul__",
    "__sub__", "__truediv__", "__matmul__",
):  # fmt: skip
    setattr(_StandIn, _name, _method(_name))


_LOCAL = threading.local()  # of the pass in this thread: .trace, and who answers for modules
_PATCHING = threading.RLock()


class _Trace:
    """Where the pass is, what it has done, and what is alive."""

    def __init__(self, model: nn.Module, training: bool, on_meta: bool) -> None:
        self.training, self.on_meta = training, on_meta
        self.paths = {module: name for name, module in model.named_modules()}
        self.steps: list[Step] = []
        self.joins: list[tuple[str, list[int]]] = []  # where, and the steps above each input
        self.path = ""  # of the innermost container
        self.step: Step | None = None  # of the leaf module that runs
        self.live = 0  # bytes
        self.stored: dict[int, _Memory] = {}  # kept for the backward pass, by identity
        self.originals: dict[int, Tensor] = {}  # id of a meta tensor -> whom it stands for
        parameters = [p for m in self.paths for p in m._parameters.values() if p is not None]
        self.unclaimed = {id(p): p.numel() for p in parameters}  # not seen in use so far
        self.elements = dict(self.unclaimed)
        first = parameters[0] if parameters else torch.empty(0)
        self.dtype, self.itemsize = first.dtype, first.element_size()

    def emit(
        self, raw: Any, memory: _Memory | None, above: int = 0, learns: bool = False, depth: int = 0
    ) -> Any:
        """Values for what an operation gave: a shape or several; on meta a tensor or several."""
        if isinstance(raw, list) or (self.on_meta and isinstance(raw, tuple)):
            return tuple(self.emit(part, memory, above, learns, depth) for part in raw)
        if raw is None or (self.on_meta and not isinstance(raw, Tensor)):
            return raw
        memory = memory or _Memory(
            self, math.prod(raw.shape if self.on_meta else raw) * self.itemsize
        )
        if not self.on_meta:
            return _StandIn(raw, memory, above, learns, depth, self.dtype)
        value = raw.as_subclass(_MetaTensor)
        value.memory, value.above, value.learns, value.depth = memory, above, learns, depth
        return value

    def call(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Run a module: as a step of its own if it has no children, else as a container."""
        path = self.paths.get(module)
        if path is None:  # made while the model runs: part of whoever calls it
            return module.forward(*args, **kwargs)
        if not module._modules:
            return self.leaf(path, module, args, kwargs)
        outer, self.path = self.path, path
        result = module.forward(*args, **kwargs)
        self.path = outer
        own = sum(map(self.claim, module._parameters.values()))
        if own:  # parameters that no function was seen to use
            step = self.begin(path, type(module).__name__)
            step.parameters, step.macs = own, None
            self.finish(step, result)
        return result

    def leaf(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        outer, self.step = self.step, self.begin(path, type(module).__name__)
        step = self.step
        bit = 1 << len(self.steps) - 1
        shortcut = _SHORTCUTS.get(type(module)) if len(args) == 1 and not kwargs else None
        if shortcut and not self.on_meta:
            name, of_module = shortcut
            options = {"inplace": True} if module.__dict__.get("inplace") else {}
            result = self.run(None, (args[0], *of_module(module)), options, name)
        else:
            result = module.forward(*args, **kwargs)
        self.step = outer
        if module._parameters:
            if not step.operation and any(p is not None for p in module._parameters.values()):
                step.macs = None  # no function was seen to use them
            step.parameters += sum(map(self.claim, module._parameters.values()))
        self.finish(step, result)
        if _is_value(result) and not result.above & bit:  # it passes its input on
            raw = result if self.on_meta else result.shape
            return self.emit(raw, result.memory, result.above | bit, result.learns, result.depth)
        return result

    def begin(self, path: str, kind: str) -> Step:
        step = Step(path, kind)
        self.steps.append(step)
        return step

    def finish(self, step: Step, result: Any) -> None:
        if _is_value(result):
            shape = result.shape
            step.output_shape, step.activations = tuple(shape[1:]), math.prod(shape)
        else:
            step.macs = None
        if self.live > step.live_bytes:
            step.live_bytes = self.live

    def claim(self, parameter: Tensor | None) -> int:
        """The elements of a parameter when it is first used, then 0."""
        return self.unclaimed.pop(id(self.originals.get(id(parameter), parameter)), 0)

    def run(self, function: Any, args: tuple, kwargs: dict, name: str | None = None) -> Any:
        """One function of PyTorch's, on stand-ins."""
        name = name or getattr(function, "__name__", "?")
        name = SYNONYMS.get(name, name)
        base = name.rstrip("_") or name if name[-1] == "_" and name[0] != "_" else name
        raw = None
        if self.on_meta:
            raw = function(*args, **kwargs)
            if not any(isinstance(part, Tensor) for part in _flat((raw,))):
                return raw
        values, weights = _split((*args, *kwargs.values()) if kwargs else args)
        rule = RULES.get(base)
        if rule is None or base in DROPOUTS:
            idle = base in DROPOUTS and not (
                kwargs.get("training", args[2:3] == (True,)) and kwargs.get("p", 1) > 0
            )
            if idle or base in VIEWS or (self.on_meta and base in MORE_VIEWS):
                x = values[0]
                if self.step is not None and not self.step.operation:
                    self.step.operation = base
                if not self.on_meta:
                    raw = x.shape if idle else VIEWS[base](*args, **kwargs)
                return self.emit(raw, x.memory, x.above, x.learns, x.depth)
            if rule is None and not self.on_meta:
                raise Unknown(name)
        work = self.checked(rule, args, kwargs, raw) if self.on_meta else rule(*args, **kwargs)
        memory = values[0].memory if base != name or kwargs.get("inplace") is True else None
        return self.account(base, work, values, weights, memory, work.shape if raw is None else raw)

    def checked(self, rule: Any, args: tuple, kwargs: dict, raw: Any) -> Work | None:
        """On meta: what the rule says if it gives the shapes that PyTorch gave, else None."""
        with contextlib.suppress(Unknown, TypeError):
            work = rule(*args, **kwargs) if rule else None
            shapes = [None if part is None else tuple(part.shape) for part in _flat((raw,))]
            if work and shapes in ([work.shape], work.shape):
                return work
        return None

    def account(
        self, base: str, work: Work | None, values: list, weights: list, memory: _Memory | None,
        raw: Any,
    ) -> Any:  # fmt: skip
        """Add an operation to the layer that runs, or make it a step of its own."""
        step = self.step or self.begin(self.path, base)
        step.operation = step.operation or base
        if self.on_meta:
            weights = [self.originals.get(id(w), w) for w in weights]
        above, read, depth = 1 << len(self.steps) - 1, 0, 0
        for value in values:
            above |= value.above
            if value.depth > depth:
                depth = value.depth
            read += math.prod(value.shape)
        for weight in weights:
            size = self.elements.get(id(weight))
            step.weight_bytes += self.itemsize * (weight.numel() if size is None else size)
            if self.step is None:
                step.parameters += self.claim(weight if size is not None else weight._base)
        step.input_bytes += self.itemsize * read
        if base[:4] == "conv":
            step.kernel = tuple(weights[0].shape[2:])
        elif base == "cat" and len(values) > 1:
            self.joins.append((self.path, [value.above for value in values]))
        operands: list[bool] = []  # which of them have a gradient
        if self.training:
            operands = [*(v.learns for v in values), *(w.requires_grad for w in weights)]
        learns = any(operands)
        depth += bool(weights and work is not None and work.macs)
        if depth > step.depth:
            step.depth = depth
        before = self.live
        result = self.emit(raw, memory, above, learns, depth)
        step.output_bytes += self.live - before if memory is None else memory.size
        if work is None:
            step.macs = None
        elif step.macs is not None:
            step.macs += work.macs
            step.bias_additions += work.bias_additions
            step.elementwise += work.elementwise
            step.comparisons += work.comparisons
            step.output_bytes += work.index_bytes
            step.backward_macs += sum(operands[:2]) * work.macs
        if learns and (len(operands) > 1 or base not in ("mul", "div")):  # not by a number
            self.store(step, base, work, values, result, memory)
        if self.live > step.live_bytes:
            step.live_bytes = self.live
        if self.step is None:
            self.finish(step, next(iter(_flat((result,)))))
        return result

    def store(
        self, step: Step, name: str, work: Work | None, values: list, result: Any,
        overwritten: _Memory | None,
    ) -> None:  # fmt: skip
        """Keep what autograd keeps for the backward pass; a memory that two need counts once."""
        kept = []
        if name.startswith("adaptive_avg_pool") and math.prod(result.shape[2:]) == 1:
            pass  # a mean, whose gradient needs no values
        elif name in SAVES_INPUT and overwritten is None:
            kept += [value.memory for value in values]
        elif name in SAVES_INPUT:  # in place: autograd copies what will be overwritten
            kept.append(_Memory(self, overwritten.size))
        if name in SAVES_OUTPUT:
            kept.append(result.memory)
        if work is not None and (extra := work.index_bytes + work.kept * self.itemsize):
            kept.append(_Memory(self, extra))
        for memory in kept:
            if id(memory) not in self.stored:
                self.stored[id(memory)] = memory
                step.stored_bytes += memory.size


def _is_value(value: Any) -> bool:
    return type(value) is _StandIn or type(value) is _MetaTensor


def _of_conv(m: nn.Module) -> tuple:
    require(m.padding_mode == "zeros", "conv: padding with something")
    weights = m._parameters
    return weights["weight"], weights["bias"], m.stride, m.padding, m.dilation, m.groups


def _of_batch_norm(m: nn.Module) -> tuple:
    state, weights = m._buffers, m._parameters
    return state["running_mean"], state["running_var"], weights["weight"], weights["bias"]


# Layers whose forward would say the same at more length; batch norm's would also count the batch
# in a buffer of the model. Subclasses run their own forward.
_SHORTCUTS = {
    nn.Conv2d: ("conv2d", _of_conv),
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ("batch_norm", _of_batch_norm)
    ),
    nn.ReLU: ("relu", lambda _: ()),
    nn.Linear: ("linear", lambda m: (m._parameters["weight"], m._parameters["bias"])),
}


def _split(arguments: Sequence) -> tuple[list, list[Tensor]]:
    """The stand-ins among a function's arguments, and the tensors."""
    values, weights = [], []
    for argument in arguments:
        kind = type(argument)
        several = kind is tuple or kind is list
        if kind is int or (several and (not argument or type(argument[0]) is int)):
            continue
        for v in argument if several else (argument,):
            kind = type(v)
            if kind is _StandIn or kind is _MetaTensor:
                values.append(v)
            elif isinstance(v, Tensor):
                weights.append(v)
    return values, weights


def _flat(arguments: Sequence) -> Iterator[Any]:
    for value in arguments:
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value


@contextlib.contextmanager
def intercept(
    modules: Collection[nn.Module], handler: Callable[[nn.Module, tuple, dict], Any]
) -> Iterator[None]:
    """Let `handler(module, args, kwargs)` answer calls of these modules by this thread.

    torch.fx patches `nn.Module.__call__` for the same; that empties the method caches of every
    module class there is, which takes longer than a pass on shapes. What `Module.compile()` sets
    on an instance comes before its forward and hooks, so it serves here too.
    """
    taken = "_compiled_call_impl"
    own = {module: module.__dict__[taken] for module in modules if taken in module.__dict__}

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(_LOCAL, "handler", None) is handler:
            return handler(module, args, kwargs)
        return (own.get(module) or module._call_impl)(*args, **kwargs)  # another thread's

    with _PATCHING:
        try:
            for module in modules:
                module.__dict__[taken] = functools.partial(call, module)
            _LOCAL.handler = handler
            yield
        finally:
            _LOCAL.handler = None
            for module in modules:
                module.__dict__.pop(taken, None)
            for module, compiled in own.items():
                module.__dict__[taken] = compiled


@contextlib.contextmanager
def _as_before(modules: Collection[nn.Module]) -> Iterator[None]:
    """Put back what their forward changes in their buffers; with a shortcut it does not run."""
    kept = [
        (module._buffers, name, buffer, _version(buffer), buffer.clone())
        for module in modules if type(module) not in _SHORTCUTS
        for name, buffer in module._buffers.items() if buffer is not None
    ]  # fmt: skip
    try:
        yield
    finally:
        for buffers, name, buffer, version, saved in kept:
            buffers[name] = buffer
            if _version(buffer) != version:  # where it was not written to, autograd may need it
                buffer.copy_(saved)


def _version(tensor: Tensor) -> int | float:
    """How often it was written to; NaN, not even equal to itself, where PyTorch does not count."""
    if tensor.is_inference():
        return math.nan if torch.is_inference_mode_enabled() else 0  # or it cannot be written to
    return tensor._version


def forward_pass(
    model: nn.Module, input_size: Shape, *, training: bool = False, engine: str = "auto"
) -> Pass:
    """Run `model` on one image of `input_size` without an image.

    engine   "shapes" (stand-ins; NotImplementedError at a function without a rule), "meta"
             (PyTorch's meta device), or "auto": shapes, else meta
    """
    if engine not in ("auto", "shapes", "meta"):
        raise ValueError(f"engine={engine!r} asked; choose 'auto', 'shapes' or 'meta'")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if engine != "meta":
        try:
            return _run(model, input_size, training, on_meta=False)
        except Exception:
            # Whatever is amiss, PyTorch says it better: on meta the model raises its own error.
            if engine == "shapes":
                raise
    return _run(model, input_size, training, on_meta=True)


def _run(model: nn.Module, input_size: Shape, training: bool, on_meta: bool) -> Pass:
    trace = _Trace(model, training, on_meta)
    # On meta PyTorch's batch norm refuses a single value per channel in training.
    images = 2 if training and on_meta else 1
    shape = (images, *input_size)
    with contextlib.ExitStack() as stack:
        if training:  # layers that drop others at random draw numbers
            stack.enter_context(torch.random.fork_rng(devices=[]))
        if any(module.training != training for module in trace.paths):
            stack.enter_context(in_mode(model, training))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_as_before(trace.paths))
        stack.enter_context(intercept(trace.paths, trace.call))
        # Taken back afterwards: what stays here would keep the model alive.
        stack.callback(setattr, _LOCAL, "trace", getattr(_LOCAL, "trace", None))
        _LOCAL.trace = trace
        if not on_meta:
            model(trace.emit(shape, None))
            return Pass(trace.steps, trace.joins, images, trace.itemsize)
        # No weight is copied: functional_call lends the model meta tensors for the one pass.
        tensors = [*model.named_parameters(), *model.named_buffers()]
        state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
        trace.originals = {id(state[name]): tensor for name, tensor in tensors}
        batch = torch.empty(shape, dtype=trace.dtype, device="meta")
        torch.func.functional_call(model, state, (trace.emit(batch, None),))
        return Pass(trace.steps, trace.joins, images, trace.itemsize)
