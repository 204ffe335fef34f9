"""What PyTorch's functions do to shapes, and what they cost.

`Work`      what one operation takes: output shape, MACs and other arithmetic
`RULES`     function name -> rule: the function's own arguments -> `Work`
`VIEWS`     those that only look at memory differently: arguments -> shape
`Unknown`   raised where a rule does not know how it is used

Arguments may be anything with a `shape`. Counts follow PyTorch's conventions on rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Shape = tuple[int, ...]


class Work(NamedTuple):
    """What one operation takes; counts are exact integers.

    `elementwise` counts arithmetic on elements other than multiply-adds: 1 per output of an
    activation, a sum or a product, 2 for batch norm (scale and shift), the window for average
    pooling, size + 5 for local response normalization, 7 for layer and group norm, 3 for softmax.
    `comparisons` are those of max pooling, one less than the window per output. `index_bytes` are
    the positions that max pooling writes beside its output; `kept` are elements, neither input nor
    output, that only the backward pass needs.
    """

    shape: Shape | list[Shape | None]
    macs: int = 0
    bias_additions: int = 0
    elementwise: int = 0
    comparisons: int = 0
    index_bytes: int = 0
    kept: int = 0


class Unknown(NotImplementedError):
    """An operation without a rule, or one used in a way that its rule does not know."""


def _tuple(value: Any, length: int) -> Sequence[int]:
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) * length if len(value) == 1 else value


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Unknown(what)


def _conv(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Work:
    outputs, depth, *kernel = weight.shape
    batch, channels, *size = x.shape
    n = len(kernel)
    require(len(size) == n and channels == depth * groups, "conv: shapes")
    spans = [d * (k - 1) for d, k in zip(_tuple(dilation, n), kernel, strict=True)]
    if isinstance(padding, str):
        both = spans if padding == "same" else [0] * n
    else:
        both = [2 * p for p in _tuple(padding, n)]
    sides = [
        (i + p - span - 1) // s + 1
        for i, p, span, s in zip(size, both, spans, _tuple(stride, n), strict=True)
    ]
    require(min(sides) > 0, "conv: an output without elements")
    count = batch * outputs * math.prod(sides)
    macs = count * depth * math.prod(kernel)
    return Work((batch, outputs, *sides), macs, 0 if bias is None else count)


def _conv_transpose(
    x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
) -> Work:
    kernel, n = tuple(weight.shape[2:]), weight.dim() - 2
    require(len(x.shape) == n + 2 and x.shape[1] == weight.shape[0], "conv_transpose: shapes")
    options = (_tuple(v, n) for v in (stride, padding, output_padding, dilation))
    sides = tuple(
        (i - 1) * s - 2 * p + d * (k - 1) + o + 1
        for i, k, s, p, o, d in zip(x.shape[2:], kernel, *options, strict=True)
    )
    shape = (x.shape[0], weight.shape[1] * groups, *sides)
    macs = math.prod(x.shape) * weight.shape[1] * math.prod(kernel)
    return Work(shape, macs, math.prod(shape) if bias is not None else 0)


def _linear(x, weight, bias=None) -> Work:
    require(x.shape[-1] == weight.shape[1], "linear: shapes")
    shape = (*x.shape[:-1], weight.shape[0])
    count = math.prod(shape)
    return Work(shape, count * weight.shape[1], count if bias is not None else 0)


def _matmul(x, y) -> Work:
    a, b = x.shape, y.shape
    require(len(a) >= 2 and len(b) >= 2 and a[-1] == b[-2], "matmul: shapes")
    shape = (*torch.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])
    return Work(tuple(shape), math.prod(shape) * a[-1])


def _attention(query, key, value, *_args, enable_gqa=False, **_options) -> Work:
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    require(alike or enable_gqa, "attention: batches that differ")
    shape = (*query.shape[:-1], value.shape[-1])
    rows = math.prod(query.shape[:-1])  # of each the logarithm of the softmax's sum is kept
    scores = rows * key.shape[-2]
    macs = scores * (query.shape[-1] + value.shape[-1])
    return Work(shape, macs, elementwise=3 * scores, kept=rows)


def _multi_head_attention(
    query, key, value, width, heads, _weight, _bias, bias_k, _bias_v, add_zero_attn, *_args,
    need_weights=True, **_options,
):  # fmt: skip
    """Over sequences first (length x batch x width), without masks: three projections and one."""
    require(key is value and len(query.shape) == 3 and not need_weights, "attention: its form")
    plain = bias_k is None and not add_zero_attn and key.shape[-1] == width
    require(plain, "attention: keys of another width, or more of them")
    length, batch, _ = query.shape
    scores = batch * length * key.shape[0]
    projections = 2 * batch * width**2 * (length + key.shape[0])
    macs, elementwise = projections + 2 * scores * width, 3 * heads * scores
    # The projections, what comes out before the last one, and the softmax's sums.
    kept = batch * (2 * width * (length + key.shape[0]) + heads * length)
    biases = 4 * length * batch * width
    return Work([tuple(query.shape), None], macs, biases, elementwise, kept=kept)


def _pad(x, pad, mode="constant", *_args, **_options) -> Work:
    sides, most = list(x.shape), {"reflect": -1, "circular": 0}.get(mode, math.inf)
    for i in range(len(pad) // 2):
        require(max(pad[2 * i : 2 * i + 2]) <= sides[-1 - i] + most, "pad: more than there is")
        sides[-1 - i] += pad[2 * i] + pad[2 * i + 1]
    require(min(sides) >= 0, "pad: less than nothing")
    return Work(tuple(sides))


def _batch_norm(x, running_mean=None, _variance=None, weight=None, *_args, **_options) -> Work:
    known = running_mean if weight is None else weight
    require(known is None or x.shape[1] == len(known), "batch_norm: shapes")
    return Work(x.shape, elementwise=2 * math.prod(x.shape))


def _layer_norm(x, sides, *_args, **_options) -> Work:
    require(tuple(x.shape[-len(sides) :]) == tuple(sides), "layer_norm: shapes")
    rows = math.prod(x.shape[: -len(sides)])  # whose means and deviations are kept
    return Work(tuple(x.shape), elementwise=7 * math.prod(x.shape), kept=2 * rows)


def _per_element(operations: int):
    def rule(x, *_args, **_options) -> Work:
        return Work(tuple(x.shape), elementwise=operations * math.prod(x.shape))

    return rule


def _lrn(x, size, *_args, **_options) -> Work:
    # Composed of simpler functions: the squares, padded by size - 1 channels, their scaled sum and
    # its power are kept.
    count = math.prod(x.shape)
    padded = count // x.shape[1] * (x.shape[1] + size - 1)
    return Work(tuple(x.shape), elementwise=(size + 5) * count, kept=padded + 2 * count)


def _dropout(x, *_args, **_options) -> Work:
    return Work(tuple(x.shape), elementwise=math.prod(x.shape), kept=math.prod(x.shape))


def _arithmetic(x, y, *_args, **_options) -> Work:
    shapes = [tuple(v.shape) for v in (x, y) if hasattr(v, "shape")]
    shape = shapes[0]
    if len(shapes) > 1 and shapes[0] != shapes[1]:
        shape = tuple(torch.broadcast_shapes(*shapes))
    return Work(shape, elementwise=math.prod(shape))


def _window(x, kernel_size, stride, padding, dilation, ceil_mode) -> tuple[Shape, int]:
    """Output shape of a pooling and the elements of its window."""
    sizes = x.shape[2:]
    n = len(sizes)
    kernel = _tuple(kernel_size, n)
    strides = kernel if stride is None or stride == [] else _tuple(stride, n)
    sides = []
    for i, k, s, p, d in zip(
        sizes, kernel, strides, _tuple(padding, n), _tuple(dilation, n), strict=True
    ):
        span = i + 2 * p - d * (k - 1) - 1
        side = (-(-span // s) if ceil_mode else span // s) + 1
        # In ceil mode the last window must begin inside the image or its left padding.
        sides.append(side - 1 if ceil_mode and (side - 1) * s >= i + p else side)
    require(n > 0 and min(sides) > 0, "pooling: an output without elements")
    return (*x.shape[:2], *sides), math.prod(kernel)


def _max_pool(
    x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> Work:
    require(not return_indices, "max_pool: indices")
    shape, window = _window(x, kernel_size, stride, padding, dilation, ceil_mode)
    count = math.prod(shape)
    return Work(shape, comparisons=count * (window - 1), index_bytes=8 * count)


def _avg_pool(x, kernel_size, stride=None, padding=0, ceil_mode=False, *_args, **_options) -> Work:
    shape, window = _window(x, kernel_size, stride, padding, 1, ceil_mode)
    return Work(shape, elementwise=math.prod(shape) * window)


def _adaptive(x, output_size, return_indices=False) -> Work:
    require(not return_indices, "adaptive pooling: indices")
    sizes = x.shape[2:]
    wanted = _tuple(output_size, len(sizes))
    sides = tuple(i if o is None else o for i, o in zip(sizes, wanted, strict=True))
    return Work((*x.shape[:2], *sides), elementwise=math.prod(x.shape))


def _adaptive_max(x, output_size, return_indices=False) -> Work:
    work = _adaptive(x, output_size, return_indices)
    return work._replace(index_bytes=8 * math.prod(work.shape))


def _mean(x, dim=None, keepdim=False, **_options) -> Work:
    require(dim is not None, "mean: over everything")
    dims = {d % len(x.shape) for d in ((dim,) if isinstance(dim, int) else dim)}
    kept = ((1 if i in dims else s) for i, s in enumerate(x.shape) if keepdim or i not in dims)
    return Work(tuple(kept), elementwise=math.prod(x.shape))


def _cat(tensors, dim=0, **_options) -> Work:
    first = tuple(tensors[0].shape)
    dim %= len(first)
    rest = (*first[:dim], *first[dim + 1 :])
    for t in tensors:
        require((*t.shape[:dim], *t.shape[dim + 1 :]) == rest, "cat: shapes")
    return Work((*first[:dim], sum(t.shape[dim] for t in tensors), *first[dim + 1 :]))


DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}
RULES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose
    ),
    "linear": _linear,
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    "pad": _pad,
    **dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm),
    "local_response_norm": _lrn,
    **dict.fromkeys(DROPOUTS, _dropout),
    "layer_norm": _layer_norm,
    "group_norm": _per_element(7),
    **dict.fromkeys(("softmax", "log_softmax"), _per_element(3)),
    **dict.fromkeys(
        (
            "relu", "relu6", "hardtanh", "leaky_relu", "elu", "silu", "gelu", "hardswish",
            "hardsigmoid", "sigmoid", "tanh", "softplus", "mish",
        ),
        _per_element(1),
    ),
    **dict.fromkeys(("add", "sub", "mul", "div"), _arithmetic),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _avg_pool),
    **dict.fromkeys(
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive
    ),
    **dict.fromkeys(
        ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"), _adaptive_max
    ),
    "mean": _mean,
    "cat": _cat,
}  # fmt: skip
SYNONYMS = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add_", "__mul__": "mul", "__rmul__": "mul",
    "__imul__": "mul_", "__sub__": "sub", "__truediv__": "div", "__matmul__": "matmul",
    "concat": "cat", "concatenate": "cat",
}  # fmt: skip


def _reshaped(x, *shape) -> Shape:
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    require(all(isinstance(s, int) for s in shape), "view: another type")
    count, known = math.prod(x.shape), math.prod(s for s in shape if s != -1)
    # Fewer or more elements are an error of the model at this size of image, not another shape.
    require(known > 0 and (count % known == 0 if -1 in shape else count == known), "view: shapes")
    return tuple(count // known if s == -1 else s for s in shape)


def _flattened(x, start_dim=0, end_dim=-1) -> Shape:
    start, end = start_dim % len(x.shape), end_dim % len(x.shape)
    return (*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


def _permuted(x, *dims) -> Shape:
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return tuple(x.shape[d] for d in dims)


def _transposed(x, a, b) -> Shape:
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return tuple(x.shape[d] for d in order)


def _unsqueezed(x, dim) -> Shape:
    dim %= len(x.shape) + 1
    return (*x.shape[:dim], 1, *x.shape[dim:])


def _indexed(x, index) -> Shape:
    index = index if isinstance(index, tuple) else (index,)
    require(all(isinstance(i, int | slice) for i in index), "indexing by a tensor")
    picked = zip(index, x.shape, strict=False)
    kept = [len(range(*i.indices(s))) for i, s in picked if isinstance(i, slice)]
    return (*kept, *x.shape[len(index) :])


def _chunks(x, chunks, dim=0) -> list[Shape]:
    total = x.shape[dim]
    size = -(-total // chunks)
    dim %= len(x.shape)
    return [
        (*x.shape[:dim], min(size, total - start), *x.shape[dim + 1 :])
        for start in range(0, total, size)
    ]


VIEWS = {
    "flatten": _flattened,
    **dict.fromkeys(("reshape", "view"), _reshaped),
    "permute": _permuted,
    "transpose": _transposed,
    "unsqueeze": _unsqueezed,
    "__getitem__": _indexed,
    "chunk": _chunks,
    **dict.fromkeys(("contiguous", "detach"), lambda x, *_a, **_o: x.shape),
}
# On the meta device PyTorch knows the shapes of these; they too only look.
MORE_VIEWS = {
    "__get__", "squeeze", "expand", "expand_as", "split", "unbind", "to", "type_as", "float",
    "narrow", "view_as", "swapaxes", "movedim", "clone",
}  # fmt: skip

# What PyTorch's autograd keeps for the backward pass: the input, the output, or both.
_OF_ANY_DIMENSION = (
    "conv", "conv_transpose", "avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool",
)  # fmt: skip
SAVES_INPUT = {
    "linear", "batch_norm", "instance_norm", "relu6", "hardtanh", "leaky_relu", "elu", "silu",
    "gelu", "hardswish", "hardsigmoid", "softplus", "mish", "layer_norm", "group_norm", "matmul",
    "bmm", "mul", "div", "local_response_norm", "scaled_dot_product_attention",
    "multi_head_attention_forward",
    *(f"{name}{sides}d" for name in _OF_ANY_DIMENSION for sides in (1, 2, 3)),
}  # fmt: skip
SAVES_OUTPUT = {
    "relu", "sigmoid", "tanh", "softmax", "log_softmax", "scaled_dot_product_attention",
}  # fmt: skip
