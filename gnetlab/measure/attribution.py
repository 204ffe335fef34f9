"""Where a branch looks when the network decides, with Captum.

`branch_attribution()`   a map per branch: gradient x activation, or Grad-CAM
`by_stage()`             the maps of some modules, as the figure takes them
`attribution_shares()`   how much of the decision passes through each branch

Our modules are not in place and no function replaces one, so Captum's hooks see every branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gnetlab.measure.costs import locate
from gnetlab.measure.hooks import in_mode
from gnetlab.net.model import branch_names


def branch_attribution(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | int | None = None,
    *,
    names: str | Iterable[str] | None = None,
    method: str = "gradient_x_activation",
) -> dict[str, np.ndarray]:
    """Attribution of a class's logit to each position of each branch.

    images    N x C x H x W; targets: class per image (None: the predicted one)
    names     branches (None: all of them)
    method    "gradient_x_activation": Captum's LayerGradientXActivation, summed over channels,
              all branches in one pass; "grad_cam": Captum's LayerGradCam (Selvaraju et al. 2017,
              arXiv 1610.02391), one pass per branch, negative parts cut off

    Returns name -> float32 array N x h x w in the branch's own resolution. Logits have no
    physical unit; maps of one image are comparable across branches of one module. The model is
    put into eval mode for the call.
    """
    from captum.attr import LayerGradCam, LayerGradientXActivation

    names = [names] if isinstance(names, str) else list(names or branch_names(model))
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"no module {unknown[0]!r}; branches: branch_names(model)")
    if method not in ("gradient_x_activation", "grad_cam"):
        raise ValueError(f"method={method!r} asked; choose 'gradient_x_activation' or 'grad_cam'")
    layers = [modules[name] for name in names]
    with in_mode(model, training=False):
        if targets is None:
            with torch.no_grad():
                targets = model(images).argmax(1)
        if method == "gradient_x_activation":
            maps = LayerGradientXActivation(model, layers).attribute(images, target=targets)
            maps = [m.sum(1) for m in maps]
        else:
            options = {"target": targets, "relu_attributions": True}
            maps = [LayerGradCam(model, layer).attribute(images, **options) for layer in layers]
            maps = [m[:, 0] for m in maps]
    return {name: m.detach().float().cpu().numpy() for name, m in zip(names, maps, strict=True)}


def attribution_shares(maps: dict[str, np.ndarray]) -> pd.DataFrame:
    """Total attribution per branch and its share of the module's absolute total.

    Columns: `module`, `stage`, `branch`, `attribution` (sum over positions, mean over images, in
    logits for gradient x activation), `share` (of the sum of absolute values over the module's
    branches; signed).
    """
    rows = []
    for name, values in maps.items():
        stage, branch = locate(name)
        total = float(values.sum(axis=(1, 2)).mean())
        rows.append({"module": name, "stage": stage, "branch": branch, "attribution": total})
    frame = pd.DataFrame(rows)
    whole = frame.attribution.abs().groupby(frame.stage).transform("sum")
    return frame.assign(share=frame.attribution / whole)


def by_stage(
    maps: Mapping[str, np.ndarray], stages: Iterable[str], image: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """Maps of one image of some modules: stage -> branch -> h x w."""
    chosen: dict[str, dict[str, np.ndarray]] = {stage: {} for stage in stages}
    for name, values in maps.items():
        stage, branch = locate(name)
        if stage in chosen:
            chosen[stage][branch] = values[image]
    empty = [stage for stage, branches in chosen.items() if not branches]
    if empty:
        known = dict.fromkeys(locate(name)[0] for name in maps)
        raise ValueError(f"no module {', '.join(empty)}; there are {', '.join(known)}")
    return chosen
