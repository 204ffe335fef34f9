"""An Inception module as one sparse 5x5 convolution, and what sparse arithmetic costs in time.

`as_one_convolution()`  the module's 1x1, 3x3 and 5x5 branches as one 5x5 convolution with zeros
`output_difference()`   how far its output is from the branches', measured
`structure()`           where the weights of the one convolution are zero, branch by branch
`sparse_speed()`        the same layer as dense convolution, as branches, as CSR matrix, as 2:4
`csr_ratios()`          time of CSR with random zeros over the faster of the dense forms
`break_even()`          the share of zeros from which on CSR is faster than either

These are naive modules (Figure 2(a) of the paper): a 1x1 reduction has a ReLU behind it, so that a
reduced branch is no convolution. Nor is a max pool; its branch is left out everywhere here.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gnetlab.measure.devices import resolve_device, wait
from gnetlab.measure.hooks import in_mode
from gnetlab.net.architecture import TABLE_1
from gnetlab.net.model import ConvUnit, GoogLeNet, Inception

SIDE = 5
SIZES = {row.stage: row.size for row in TABLE_1 if row.widths}  # pixels, for an image of 224 x 224
TOLERANCE = {"float32": 1e-4, "float16": 1e-2}  # of the largest output
SHORTEST_TURN = 0.01  # seconds; a faster form runs several times in its turn


def as_one_convolution(module: Inception) -> nn.Conv2d:
    """The three convolutional branches as one 5x5 convolution, smaller kernels centred in zeros.

    Followed by a ReLU it gives the module's output without the pool branch: its output channels
    are in concat order. Batch norm is folded in, as eval mode applies it.

    Raises ValueError for a module with reductions or without a true 5x5.

    >>> import gnetlab as gl
    >>> from gnetlab.measure.sparsity import as_one_convolution
    >>> module = gl.googlenet("naive", width=0.125, seed=0).inception3a
    >>> as_one_convolution(module).weight.shape  # 8 + 16 + 4 output channels
    torch.Size([28, 24, 5, 5])
    """
    convs = _convolutions(module)
    weight = torch.cat([F.pad(c.weight, [(SIDE - c.kernel_size[0]) // 2] * 4) for c in convs])
    one = nn.Conv2d(weight.shape[1], len(weight), SIDE, padding=SIDE // 2, device="meta")
    one.weight = nn.Parameter(weight)
    one.bias = None if convs[0].bias is None else nn.Parameter(torch.cat([c.bias for c in convs]))
    return one


def _convolutions(module: Inception) -> list[nn.Conv2d]:
    """Copies of the branches' convolutions, batch norm folded in."""
    units = map(copy.deepcopy, _units(module))
    return [
        fuse_conv_bn_eval(unit.conv.eval(), unit.bn.eval()) if hasattr(unit, "bn") else unit.conv
        for unit in units
    ]


def _units(module: nn.Module) -> list[ConvUnit]:
    """The one ConvUnit of each convolutional branch."""
    branches = [getattr(module, f"branch{side}x{side}", nn.Identity()) for side in (1, 3, 5)]
    units = [[u for u in branch.modules() if isinstance(u, ConvUnit)] for branch in branches]
    kernels = [[unit.conv.kernel_size[0] for unit in branch] for branch in units]
    if kernels != [[1], [3], [5]]:
        found = ["a " + ", then ".join(f"{k}x{k}" for k in ks) for ks in kernels if ks]
        raise ValueError(
            f"one convolution was asked for a {type(module).__name__} with "
            f"{'; '.join(found) or 'no branches'}; it can stand for a 1x1, a 3x3 and a 5x5 side by "
            "side only. Try a module of gnetlab.googlenet('naive')"
        )
    return [unit for branch in units for unit in branch]


def _filled(module: Inception, seed: int) -> Inception:
    """A copy of the module; one on the meta device gets random weights, in memory."""
    module = copy.deepcopy(module)
    if not next(module.parameters()).is_meta:
        return module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for unit in _units(module.to_empty(device="cpu")):
            unit.conv.reset_parameters()
    return module


@torch.inference_mode()
def output_difference(module: Inception, *, size: int = 14, seed: int = 0) -> float:
    """Largest difference between the one convolution's and the branches' outputs after ReLU.

    A fraction of the largest output; for one random image of `size` x `size` pixels, drawn from
    `seed`, in eval mode. A `module` on the meta device gets random weights.

    Raises ValueError for a module with reductions or without a true 5x5.

    >>> import gnetlab as gl
    >>> from gnetlab.measure.sparsity import output_difference
    >>> output_difference(gl.googlenet("naive", width=0.125, seed=0).inception3a) < 1e-5
    True
    """
    module = _filled(module, seed)
    one = as_one_convolution(module)
    image = _random((1, one.in_channels, size, size), seed).to(one.weight)
    with in_mode(module, training=False):
        apart = module(image)[:, : one.out_channels]
    return float((one(image).relu() - apart).abs().max() / apart.abs().max())


def _random(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def structure(model: GoogLeNet) -> pd.DataFrame:
    """The one 5x5 convolution of every module of `model`, a row for each branch that goes into it.

    Columns: `module`, `stage`, `branch`, `nonzero` (the branch's own weights, count), `weights`
    (of its channels in the 5x5 form, count), `sparsity` (share of structural zeros among them),
    `macs_branch`, `macs_dense` (multiply-adds of either, for one image of 224 x 224). No weight is
    read, so the model may be on the meta device. Raises ValueError for a network other than the
    naive one.

    >>> import torch, gnetlab as gl
    >>> from gnetlab.measure.sparsity import structure
    >>> with torch.device("meta"):
    ...     frame = structure(gl.googlenet("naive"))
    >>> frame.groupby("branch").sparsity.first().round(2).to_dict()  # 1x1, 3x3 in 5x5
    {'1x1': 0.96, '3x3': 0.64, '5x5': 0.0}
    """
    rows = []
    for stage, size in SIZES.items():
        units = _units(getattr(model, f"inception{stage}"))
        for branch, unit in zip(("1x1", "3x3", "5x5"), units, strict=True):
            nonzero = unit.conv.weight.numel()
            weights = unit.conv.out_channels * unit.conv.in_channels * SIDE**2
            counts = nonzero, weights, 1 - nonzero / weights, nonzero * size**2, weights * size**2
            rows.append((f"inception{stage}", stage, branch, *counts))
    columns = "module stage branch nonzero weights sparsity macs_branch macs_dense"
    return pd.DataFrame(rows, columns=columns.split())


def sparse_speed(
    model: GoogLeNet,
    stages: Iterable[str] = ("3a", "4a"),
    *,
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
    batch_sizes: Sequence[int] = (1,),
    device: torch.device | str = "cpu",
    rounds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Time of a module's one 5x5 convolution in several forms, one row per form and sparsity.

    model        gnetlab's naive GoogLeNet, and of its modules some `stages`
    sparsities   shares of random zeros, 0 to 1
    batch_sizes  images per batch, on `device`
    rounds       turns that each form takes; `seed` decides weights, zeros and images

    Forms: "dense 5x5" (the library's convolution), "Inception branches" (three dense ones and
    their concatenation), "dense (im2col)" and "CSR (im2col)" (unfold, then one matrix product),
    "CSR (matmul only)" (the columns lie ready; random zeros only), and, on CUDA from compute
    capability 8.0 where shapes allow, "dense 5x5" and "2:4 (im2col)" in float16. They take turns,
    so that what else the machine does falls on all; each is first checked against the dense
    convolution of its weights.

    CSR gets random zeros, as many as `sparsities` say, and the module's own, structural ones.
    Biases and ReLU, the same for all, are left out; float32 is without TF32; inputs have the size
    that they have for an image of 224 x 224. A model on the meta device gets random weights.

    Columns: `form`, `stage`, `zeros` (none, random, structural, 2:4), `sparsity`, `dtype`, `macs`
    (multiply-adds with weights other than zero, per batch), `seconds` (median per batch), `iqr`
    (interquartile range, seconds), `runs`, `device`, `threads`, `batch_size`, `ratio` (seconds
    over those of "dense 5x5" in the same dtype, stage and batch size).

    Raises ValueError for an unknown stage, a network other than the naive one, or a device without
    sparse matrices (MPS; "auto" takes the CPU there), RuntimeError for a form whose output differs.

    >>> import gnetlab as gl
    >>> from gnetlab.measure.sparsity import break_even, sparse_speed
    >>> model = gl.googlenet("naive", width=0.125, seed=0)
    >>> speed = sparse_speed(model, ["5a"], sparsities=[0.5, 0.99], rounds=1)
    >>> speed[speed.zeros != "random"].form.tolist()
    ['dense 5x5', 'dense (im2col)', 'Inception branches', 'CSR (im2col)']
    >>> list(break_even(speed))  # from which share of zeros on CSR is faster, per case
    [('5a', 1)]
    """
    _check_measured(stages := list(stages), sparsities, batch_sizes, rounds)
    device, frames = resolve_device(str(device), sparse=True), []
    for stage in stages:
        module = _filled(getattr(model, f"inception{stage}"), seed).to(device, torch.float32)
        dense, matrices = _weights(module, sparsities, seed)
        for batch_size in batch_sizes:
            shape = batch_size, dense.shape[1], SIZES[stage], SIZES[stage]
            images = _random(shape, seed + 2).to(device)
            with torch.inference_mode(), cudnn.flags(enabled=True, allow_tf32=False):
                forms = list(_forms(module, dense, matrices, images))
                forms += _half_forms(dense, images)
                times = _take_turns([form.call for form in forms], rounds, device)
            frame = pd.DataFrame(forms, columns=_Form._fields).join(times)
            frame = frame.assign(stage=stage, batch_size=batch_size)
            frame["macs"] = frame.weights * images[:, 0].numel()
            reference = frame[frame.form == "dense 5x5"].set_index("dtype").seconds
            frames.append(frame.assign(ratio=frame.seconds / frame.dtype.map(reference)))
    frame = pd.concat(frames, ignore_index=True)
    columns = (
        "form stage zeros sparsity dtype macs seconds iqr runs device threads batch_size ratio"
    )
    return frame.assign(device=device.type, threads=torch.get_num_threads())[columns.split()]


def _check_measured(
    stages: list[str], sparsities: Sequence[float], batch_sizes: Sequence[int], rounds: int
) -> None:
    unknown = [stage for stage in stages if stage not in SIZES]
    if unknown or not stages:
        asked = f"stage {unknown[0]!r}" if unknown else "no stage"
        raise ValueError(f"{asked} asked; choose from {', '.join(SIZES)}")
    if not all(0 <= share <= 1 for share in sparsities):
        raise ValueError(f"sparsities={sparsities} asked; give shares of zeros, each from 0 to 1")
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(
            f"rounds={rounds}, batch_sizes={batch_sizes} asked; give at least 1 round, and batch "
            "sizes of at least 1"
        )


def _weights(
    module: Inception, sparsities: Sequence[float], seed: int
) -> tuple[Tensor, dict[tuple[str, float], Tensor]]:
    """A dense weight in the module's 5x5 form, and CSR matrices by kind and share of zeros."""
    structural = as_one_convolution(module).weight.detach()
    dense = _random(structural.shape, seed) / structural[0].numel() ** 0.5
    rank = torch.rand(dense.shape, generator=torch.Generator().manual_seed(seed + 1))
    matrices = {("random", s): _csr((dense * (rank >= s)).to(structural)) for s in sparsities}
    share = 1 - int(structural.count_nonzero()) / structural.numel()
    return dense.to(structural), matrices | {("structural", share): _csr(structural)}


def _csr(weight: Tensor) -> Tensor:
    """O x I x 5 x 5 -> CSR matrix O x I*25, with the 32-bit indices that MKL computes with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        # torch 2.11 says it in spite of `check_invariants`.
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly", UserWarning)
        csr = weight.flatten(1).to_sparse_csr()
        indices = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(*indices, csr.values(), csr.shape, check_invariants=True)


class _Form(NamedTuple):
    """One way to compute the layer; `weights` counts those that are not zero."""

    form: str
    zeros: str
    sparsity: float
    weights: int
    call: Callable[[], Tensor]
    dtype: str = "float32"


def _forms(
    module: Inception, dense: Tensor, matrices: Mapping[tuple[str, float], Tensor], images: Tensor
) -> Iterator[_Form]:
    """The float32 forms, each checked."""
    flat, ready = dense.flatten(1), _columns(images)
    parts = [conv.weight for conv in _convolutions(module)]
    own = sum(part.numel() for part in parts)

    def branches() -> Tensor:
        return torch.cat([_convolve(images, part) for part in parts], dim=1)

    about, expected = ("none", 0.0, dense.numel()), _convolve(images, dense)
    yield _Form("dense 5x5", *about, partial(_convolve, images, dense))
    yield _checked(_Form("dense (im2col)", *about, lambda: flat @ _columns(images)), expected)
    about = "structural", 1 - own / dense.numel(), own
    expected = _convolve(images, as_one_convolution(module).weight)
    yield _checked(_Form("Inception branches", *about, branches), expected)
    for (zeros, share), csr in matrices.items():
        about = zeros, share, csr.values().numel()
        expected = _convolve(images, csr.to_dense().view_as(dense))
        whole = _Form("CSR (im2col)", *about, lambda csr=csr: csr @ _columns(images))
        yield _checked(whole, expected)
        if zeros == "random":
            bare = _Form("CSR (matmul only)", *about, partial(torch.mm, csr, ready))
            yield _checked(bare, expected)


def _half_forms(dense: Tensor, images: Tensor) -> Iterator[_Form]:
    """The dense convolution and 2:4 on sparse tensor cores, both float16, where there are any.

    Rows must come in 32s and columns in 64s (torch's limits for float16).
    """
    rows, columns = dense.flatten(1).shape
    cuda = images.is_cuda and torch.cuda.get_device_capability(images.device) >= (8, 0)
    if not cuda or rows % 32 or columns % 64:
        return
    images, dense = images.half(), dense.half()
    pruned = two_of_four(dense.flatten(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*SparseSemiStructuredTensor.*prototype", UserWarning)
        packed = torch.sparse.to_sparse_semi_structured(pruned)
    about = "none", 0.0, dense.numel(), partial(_convolve, images, dense)
    yield _Form("dense 5x5", *about, "float16")
    about = "2:4", 0.5, dense.numel() // 2, lambda: packed @ _columns(images)
    expected = _convolve(images, pruned.view_as(dense))
    yield _checked(_Form("2:4 (im2col)", *about, "float16"), expected)


def two_of_four(matrix: Tensor) -> Tensor:
    """The matrix with the two smaller of every four neighbours in a row set to zero.

    >>> two_of_four(torch.tensor([[1.0, -4.0, 2.0, 3.0]]))
    tensor([[ 0., -4.,  0.,  3.]])
    """
    fours = matrix.reshape(-1, 4)
    smaller = fours.abs().topk(2, largest=False).indices
    return fours.scatter(1, smaller, 0.0).view_as(matrix)


def _convolve(images: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(images, weight, padding=weight.shape[-1] // 2)


def _columns(images: Tensor) -> Tensor:
    """im2col: N x I x H x W -> I*25 x N*H*W, what each output position sees as a column."""
    return F.unfold(images, SIDE, padding=SIDE // 2).transpose(0, 1).flatten(1)


def _checked(form: _Form, expected: Tensor) -> _Form:
    """The form, once its output is the expected one."""
    output, tolerance = form.call(), TOLERANCE[form.dtype]
    if output.dim() == 2:  # of a matrix product: O x N*H*W
        output = output.reshape(expected.transpose(0, 1).shape).transpose(0, 1)
    # Of 100% zeros every output is 0, and so must the difference be.
    largest = float(expected.abs().max()) or 1.0
    difference = float((output - expected).abs().max()) / largest
    if not difference <= tolerance:
        raise RuntimeError(
            f"{form.form} at {form.sparsity:.0%} zeros differs from the dense convolution by "
            f"{difference:.2g} of the largest output (allowed: {tolerance:g}), so its time would "
            "mean nothing; try another device or another version of PyTorch"
        )
    return form


def _take_turns(
    calls: Sequence[Callable[[], Tensor]], rounds: int, device: torch.device
) -> pd.DataFrame:
    """`seconds` (median over rounds), `iqr` and `runs` of each call, in their order."""
    counts = [math.ceil(SHORTEST_TURN / _seconds(call, 1, device)) for call in calls]
    turns = pd.DataFrame(
        [_seconds(call, count, device) for call, count in zip(calls, counts, strict=True)]
        for _ in range(rounds)
    )
    iqr = turns.quantile(0.75) - turns.quantile(0.25)
    runs = [count * rounds for count in counts]
    return pd.DataFrame({"seconds": turns.median(), "iqr": iqr, "runs": runs})


def _seconds(call: Callable[[], Tensor], count: int, device: torch.device) -> float:
    """Seconds per call, over `count` calls in a row."""
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait(device)
    return (time.perf_counter() - start) / count


def csr_ratios(speed: pd.DataFrame) -> pd.DataFrame:
    """Time of CSR with random zeros, im2col included, over the faster of the two dense forms.

    Which of these that is, the library's convolution or im2col and a product, differs between
    layers and devices. `speed` as from `sparse_speed`. Columns: `stage`, `batch_size`, `sparsity`,
    `ratio`.
    """
    csr = speed[(speed.form == "CSR (im2col)") & (speed.zeros == "random")]
    dense = speed[(speed.zeros == "none") & speed.dtype.isin(csr.dtype)]
    fastest = dense.groupby(["stage", "batch_size"]).seconds.min()
    ratio = csr.seconds.to_numpy() / fastest[list(zip(csr.stage, csr.batch_size, strict=True))]
    frame = csr[["stage", "batch_size", "sparsity"]].reset_index(drop=True)
    return frame.assign(ratio=ratio.to_numpy())


def break_even(speed: pd.DataFrame) -> dict[tuple[str, int], float | None]:
    """From which measured share of random zeros on CSR, im2col included, beats both dense forms.

    (stage, batch size) -> that share; None where even the highest is slower. `speed` as from
    `sparse_speed`.

    >>> import pandas as pd
    >>> from gnetlab.measure.sparsity import break_even
    >>> layer = {"stage": "3a", "batch_size": 1, "dtype": "float32"}
    >>> csr = layer | {"form": "CSR (im2col)", "zeros": "random"}
    >>> dense = layer | {"form": "dense 5x5", "zeros": "none", "sparsity": 0.0, "seconds": 5e-3}
    >>> slower, faster = {"sparsity": 0.9, "seconds": 8e-3}, {"sparsity": 0.99, "seconds": 2e-3}
    >>> break_even(pd.DataFrame([dense, csr | slower, csr | faster]))
    {('3a', 1): 0.99}
    """
    csr = csr_ratios(speed)
    found: dict[tuple[str, int], float | None] = {}
    for case, rows in csr.groupby(["stage", "batch_size"], sort=False):
        slower = rows.sparsity[rows.ratio >= 1].max()  # NaN where it is always faster
        beyond = rows.sparsity[~(rows.sparsity <= slower)]
        found[case] = float(beyond.min()) if len(beyond) else None
    return found
