"""What a network costs, layer by layer, without computing a convolution.

`layer_costs()`   one row per leaf layer: output shape, parameters, MACs, activations
`table_1()`       the paper's Table 1 beside what its architecture computes to
`depth()`         number of layers with parameters along the deepest path
`second_opinions()`  the same networks counted by fvcore and by torch's FlopCounterMode
`reduction_costs()`  the nine modules with and without 1x1 reductions
`classifier_metadata()`  published accuracy, parameters and MACs of torchvision's classifiers

One multiply-add is one MAC; `macs` counts those of convolutions and linear layers, without
biases. The paper's "ops" are MACs. `flops = 2 * macs`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from gnetlab.measure.hooks import in_mode, observe
from gnetlab.net.architecture import MODULES, TABLE_1, architecture
from gnetlab.net.model import build

COLUMNS = (
    "module", "stage", "branch", "kind", "output_shape", "parameters", "macs", "activations",
)  # fmt: skip


def _conv(module: nn.Module, _inputs: Tensor, output: Tensor) -> int:
    return output.numel() * module.weight[0].numel()


def _transposed(module: nn.Module, inputs: Tensor, _output: Tensor) -> int:
    return inputs.numel() * module.weight[0].numel()


def _linear(module: nn.Module, _inputs: Tensor, output: Tensor) -> int:
    return output.numel() * module.in_features


def _none(*_: Any) -> int:
    return 0


# Formulas by layer type, for one forward pass; looked up along the class's ancestors.
MACS: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor], int]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    nn.Linear: _linear,
    **dict.fromkeys(
        (
            nn.modules.batchnorm._NormBase, nn.LocalResponseNorm, nn.LayerNorm, nn.GroupNorm,
            nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
            nn.Softmax, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
            nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
            nn.modules.dropout._DropoutNd, nn.Flatten, nn.Identity,
        ),
        _none,
    ),
}  # fmt: skip
# Layers of other packages that have no parameters and no MACs, by name.
_FREE_BY_NAME = {"HeadPool", "InputTransform", "StochasticDepth", "Permute"}


def layer_costs(
    model: nn.Module, input_size: tuple[int, ...] = (3, 224, 224), *, training: bool = False
) -> pd.DataFrame:
    """One row per leaf layer that runs, in order of execution, for one image of `input_size`.

    Columns: `module` (dotted name), `stage` (stem, 3a ... 5b, head, aux1, aux2; for other
    networks their blocks), `branch` (1x1, 3x3, 5x5, pool or empty), `kind` (class name),
    `output_shape` (tuple without the batch), `parameters` (own, count), `macs` (count; NA marks a
    layer whose kind has no formula: it is not counted, and not zero), `activations` (output
    elements, count). A layer that runs several times has a row for each run and its parameters in
    the first.

    Works on any module that takes one image batch, ours or torchvision's; runs on the meta
    device, so the model's weights are neither copied nor touched. `training=True` counts what
    runs in training mode, auxiliary heads included.

    >>> import gnetlab as gl
    >>> costs = gl.layer_costs(gl.googlenet("torchvision"))
    >>> int(costs.macs.sum()), int(costs.parameters.sum())
    (1498376192, 6624904)
    """
    modules = dict(model.named_modules())
    leaves = {name for name, module in modules.items() if _is_leaf(module)}
    leaves = {n for n in leaves if not any(_formula(modules[p]) for p in _parents(n))}
    stages = _block_stages(model)
    images = 2 if training else 1  # batch norm refuses a single value per channel in training
    rows: list[dict[str, Any]] = []
    counted: set[str] = set()

    def count(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        formula = _formula(module)
        tensor = output if isinstance(output, Tensor) else None
        known = formula is not None and tensor is not None
        own = 0 if name in counted else sum(p.numel() for p in module.parameters(recurse=False))
        counted.add(name)
        stage, branch = locate(name)
        rows.append(
            {
                "module": name,
                "stage": stages.get(name, stage),
                "branch": branch,
                "kind": type(module).__name__,
                "output_shape": tuple(tensor.shape[1:]) if tensor is not None else (),
                "parameters": own,
                "macs": formula(module, inputs[0], output) // images if known else pd.NA,
                "activations": tensor.numel() // images if tensor is not None else pd.NA,
            }
        )

    # No weight is copied: functional_call lends the model empty meta tensors for the one pass.
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    batch = torch.empty(images, *input_size, device="meta")
    with torch.no_grad(), in_mode(model, training), observe(model, sorted(leaves), count):
        torch.func.functional_call(model, state, (batch,))
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.astype({"parameters": "int64", "macs": "Int64", "activations": "Int64"})


def _is_leaf(module: nn.Module) -> bool:
    """A layer: it has no children, a formula, or parameters of its own.

    A container with parameters of its own does something with them that no child shows; it gets
    an uncounted row beside its children's, never a silent zero.
    """
    return (
        not any(True for _ in module.children())
        or _formula(module) is not None
        or any(True for _ in module.parameters(recurse=False))
    )


def _formula(module: nn.Module) -> Callable[[nn.Module, Tensor, Tensor], int] | None:
    if type(module).__name__ in _FREE_BY_NAME:
        return _none
    return next((MACS[kind] for kind in type(module).__mro__ if kind in MACS), None)


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


_BRANCHES = {
    "branch1x1": "1x1", "branch3x3": "3x3", "branch5x5": "5x5", "branch_pool": "pool",
    "branch1": "1x1", "branch2": "3x3", "branch3": "5x5", "branch4": "pool",
}  # fmt: skip
_AFTER = {"pool3": "3b", "maxpool3": "3b", "pool4": "4e", "maxpool4": "4e"}


def locate(module: str) -> tuple[str, str]:
    """Stage and branch of a dotted name, ours or torchvision's; "stem", "" for the stem.

    pool3 and pool4 belong to the stage whose output they reduce, 3b and 4e.

    >>> locate("inception4c.branch5x5.reduce.conv"), locate("conv2"), locate("aux1.fc1")
    (('4c', '5x5'), ('stem', ''), ('aux1', ''))
    """
    top, _, rest = module.partition(".")
    found = re.fullmatch(r"inception(\d[a-e])", top)
    if found:
        return found[1], _BRANCHES.get(rest.partition(".")[0], "")
    if top in _AFTER:
        return _AFTER[top], ""
    if top in ("aux1", "aux2"):
        return top, ""
    stem = r"input_transform|conv[123](_reduce)?|(max)?pool[12]|lrn[12]"
    if re.fullmatch(stem, top):
        return "stem", ""
    return ("head" if top in ("avgpool", "flatten", "dropout", "fc", "classifier") else top), ""


def _block_stages(model: nn.Module) -> dict[str, str]:
    """For networks that are one `features` sequence with pools (VGG, AlexNet): block1 ..."""
    features = getattr(model, "features", None)
    plain = isinstance(features, nn.Sequential) and all(map(_is_leaf, features))
    if not plain or not any(isinstance(m, nn.MaxPool2d) for m in features):
        return {}
    stages, block = {}, 1
    for name, module in features.named_children():
        stages[f"features.{name}"] = f"block{block}"
        block += isinstance(module, nn.MaxPool2d)
    return stages


def depth(costs: pd.DataFrame) -> int:
    """Layers with parameters along the deepest path (normalisation counts with its convolution).

    `costs` as from `layer_costs`, auxiliary heads left out.
    """
    layers = costs[costs.macs.fillna(0) > 0]
    layers = layers[~layers.stage.isin(["aux1", "aux2"])]
    per_branch = layers.groupby(["stage", "branch"], sort=False).size()
    return int(per_branch.groupby("stage").max().sum())


def table_1(model: nn.Module | None = None) -> pd.DataFrame:
    """Table 1, printed and computed, one row per row with parameters.

    `model` computes it (None: the paper preset without heads). Columns: `stage`, `parameters`
    (weights without biases, count), `printed_params` (in units of 1024), `macs` (count),
    `printed_ops` (in millions), `params_agree`, `ops_agree` (within half a unit of the last digit
    printed; a twentieth more is allowed, since the paper rounds 159.50 down).
    """
    model = model or build(architecture("paper", heads=()))
    costs = layer_costs(model)
    weights = {
        name.removesuffix(".weight"): parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }
    stage = costs.stage.mask(costs.module.str.startswith("conv1."), "conv1")
    stage = stage.mask(costs.module.str.startswith("conv2"), "conv2")
    costs = costs.assign(
        stage=stage.replace("head", "linear"), weights=costs.module.map(weights).fillna(0)
    )
    sums = costs.groupby("stage")[["weights", "macs"]].sum()
    rows = [
        {
            "stage": row.stage,
            "parameters": int(sums.weights[row.stage]),
            "printed_params": row.printed_params,
            "macs": int(sums.macs[row.stage]),
            "printed_ops": row.printed_ops,
        }
        for row in TABLE_1
    ]
    frame = pd.DataFrame(rows)
    last_digit = frame.printed_params.map(lambda printed: 0.1 if printed % 1 else 1.0)
    params_off = (frame.parameters / 1024 - frame.printed_params).abs()
    ops_off = (frame.macs / 1e6 - frame.printed_ops).abs()
    return frame.assign(params_agree=params_off <= 0.55 * last_digit, ops_agree=ops_off <= 0.55)


def second_opinions(
    models: Mapping[str, nn.Module], input_size: tuple[int, ...] = (3, 224, 224)
) -> pd.DataFrame:
    """MACs of convolutions and linear layers by three counters, one row per model.

    Columns: `model`, `gnetlab`, `fvcore` (its "flop" is a MAC), `torch` (FlopCounterMode, halved).
    The other two really run the network, in eval mode, on the model's device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore uses what torch calls deprecated
        from fvcore.nn import FlopCountAnalysis

    rows = []
    for name, model in models.items():
        image = torch.zeros(1, *input_size, device=next(model.parameters()).device)
        with in_mode(model, training=False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            analysis = FlopCountAnalysis(model, image).unsupported_ops_warnings(False)
            fvcore = analysis.uncalled_modules_warnings(False).by_operator()
            with FlopCounterMode(display=False) as counter:
                model(image)
        rows.append(
            {
                "model": name,
                "gnetlab": int(layer_costs(model, input_size).macs.sum()),
                "fvcore": int(fvcore["conv"] + fvcore["linear"]),
                "torch": counter.get_total_flops() // 2,
            }
        )
    return pd.DataFrame(rows)


def reduction_costs(input_size: tuple[int, ...] = (3, 224, 224)) -> pd.DataFrame:
    """The nine modules of the paper and naive presets: what 1x1 reductions change.

    Columns: `variant` ("with reductions", "without"), `stage`, `macs` (count), `out_channels`
    (count), `pool_share` (fraction of them that the pool branch makes).
    """
    rows = []
    for variant, preset in (("with reductions", "paper"), ("without", "naive")):
        with torch.device("meta"):
            model = build(architecture(preset, heads=()))
        macs = layer_costs(model, input_size).groupby("stage").macs.sum()
        for stage in MODULES:
            module = getattr(model, f"inception{stage}")
            pool = module.branch_slices["branch_pool"]
            rows.append(
                {
                    "variant": variant,
                    "stage": stage,
                    "macs": int(macs[stage]),
                    "out_channels": module.out_channels,
                    "pool_share": (pool.stop - pool.start) / module.out_channels,
                }
            )
    return pd.DataFrame(rows)


def classifier_metadata() -> pd.DataFrame:
    """torchvision's ImageNet classifiers from their weights' metadata; nothing is downloaded.

    Columns: `model`, `weights`, `top1`, `top5` (percent, as published by torchvision),
    `parameters`, `macs` (counts; torchvision calls the latter GFLOPS), one row per weights entry.
    """
    from torchvision.models import get_model_weights, list_models

    rows = []
    for model in list_models():
        if "." in model or model.startswith(("quantized", "raft")):
            continue
        for entry in get_model_weights(model):
            metrics = entry.meta.get("_metrics", {}).get("ImageNet-1K")
            if metrics and "_ops" in entry.meta:
                rows.append(
                    {
                        "model": model,
                        "weights": entry.name,
                        "top1": metrics["acc@1"],
                        "top5": metrics["acc@5"],
                        "parameters": int(entry.meta["num_params"]),
                        "macs": round(entry.meta["_ops"] * 1e9),
                    }
                )
    return pd.DataFrame(rows).dropna(ignore_index=True)
