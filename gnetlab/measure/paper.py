"""What the paper says of its own cost, and what its architecture computes to.

`table_1()`       the paper's Table 1 beside what its architecture computes to
`depth()`         number of layers with parameters along the deepest path
`reduction_costs()`  the nine modules with and without 1x1 reductions
`reduction_savings()`  what that comes to
`classifier_metadata()`  published accuracy, parameters and MACs of torchvision's classifiers
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import nn

from gnetlab.measure.costs import layer_costs
from gnetlab.net.architecture import MODULES, TABLE_1, architecture
from gnetlab.net.model import build


def depth(costs: pd.DataFrame) -> int:
    """Layers with weights along the longest path (normalization counts with its convolution).

    `costs` as from `layer_costs`, auxiliary heads left out.
    """
    return int(costs.depth[~costs.stage.isin(["aux1", "aux2"])].max())


def table_1(model: nn.Module | None = None) -> pd.DataFrame:
    """Table 1, printed and computed, one row per row with parameters.

    `model` computes it: gnetlab's GoogLeNet with a stem of two convolutions, or torchvision's
    (None: the paper preset without heads). Columns: `stage`, `parameters` (weights without biases,
    count), `printed_params` and `computed_params` (in units of 1024), `macs` (count), `printed_ops`
    and `computed_ops` (in millions), `params_agree`, `ops_agree` (within half a unit of the last
    digit printed; a twentieth more is allowed, since the paper rounds 159.50 down), `verdict`
    (both, params, ops, neither), `contradictory`: whether no number of weights could meet both
    printed numbers, since operations are weights times positions.

    Raises ValueError for a network that lacks some of the table's rows.
    """
    model = model or build(architecture("paper", heads=()))
    costs = layer_costs(model)
    weights = {
        name.removesuffix(".weight"): parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }
    stage = costs.stage.mask(costs.module.str.startswith("conv1."), "conv1")
    # The reduction and the 3x3 behind it, which torchvision calls conv2 and conv3.
    stage = stage.mask(costs.module.str.startswith(("conv2", "conv3")), "conv2")
    costs = costs.assign(
        stage=stage.replace("head", "linear"), weights=costs.module.map(weights).fillna(0)
    )
    sums = costs.groupby("stage")[["weights", "macs"]].sum()
    missing = [row.stage for row in TABLE_1 if row.stage not in sums.index]
    if missing:
        raise ValueError(
            f"Table 1 of {type(model).__name__} asked, which has no {', '.join(missing)}; give a "
            "GoogLeNet with the paper's stem, such as gnetlab.googlenet('paper')"
        )
    rows = []
    for row in TABLE_1:
        parameters, macs = int(sums.weights[row.stage]), int(sums.macs[row.stage])
        rows.append(
            {
                "stage": row.stage,
                "parameters": parameters,
                "printed_params": row.printed_params,
                "computed_params": parameters / 1024,
                "macs": macs,
                "printed_ops": row.printed_ops,
                "computed_ops": macs / 1e6,
            }
        )
    frame = pd.DataFrame(rows)
    allowed = 0.55 * frame.printed_params.map(lambda printed: 0.1 if printed % 1 else 1.0)
    params_agree = (frame.computed_params - frame.printed_params).abs() <= allowed
    ops_agree = (frame.computed_ops - frame.printed_ops).abs() <= 0.55
    # What each printed number says about the weights: the two ranges must meet.
    per_weight = 1e6 / (frame.macs / frame.parameters)
    apart = (frame.printed_ops * per_weight - frame.printed_params * 1024).abs()
    return frame.assign(
        params_agree=params_agree,
        ops_agree=ops_agree,
        verdict=np.select([params_agree & ops_agree, params_agree, ops_agree],
                          ["both", "params", "ops"], "neither"),
        contradictory=apart > 0.55 * per_weight + 1024 * allowed,
    )  # fmt: skip


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


def reduction_savings(modules: pd.DataFrame) -> dict[str, float | bool]:
    """What `reduction_costs` comes to: what the claim on reductions is judged by."""
    reduced, naive = (rows for _, rows in modules.groupby("variant", sort=False))
    return {
        "mac_ratio": naive.macs.sum() / reduced.macs.sum(),
        "final_width_ratio": naive.out_channels.iloc[-1] / reduced.out_channels.iloc[-1],
        "width_grows": bool(naive.out_channels.is_monotonic_increasing),
    }


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
