"""Attribution of all 36 branches: one pass or one path here, one layer at a time in Captum.

    python benchmarks/attribution.py [--rounds 3] [--steps 20] [--device auto] [--threads 1]

Prints seconds and ratios, and how far the maps differ. Captum is asked for every branch, one after
the other, as its interface has it; for conductance for one branch in six, and scaled up.
One CPU thread is timed by its own clock, anything else by the wall's.
"""

from __future__ import annotations

import statistics

import numpy as np
import torch
from captum.attr import LayerConductance, LayerGradCam
from machine import prepare
from torch import Tensor

import gnetlab as gl


def main() -> None:
    options, machine = prepare(__doc__, rounds=3, steps=(20, "of the path"))
    device = machine.device
    model = gl.googlenet(weights="bundled").to(device).eval()
    image = torch.randn(1, 3, 224, 224, device=device)
    black = torch.zeros_like(image)
    names = gl.branch_names(model)
    some = names[::6]
    path = {"n_steps": options.steps, "method": "riemann_trapezoid"}

    def ours(method: str) -> dict[str, np.ndarray]:
        return gl.branch_attribution(model, image, 0, method=method, steps=options.steps)

    def grad_cam() -> dict[str, np.ndarray]:
        maps = {}
        for name in names:
            captum = LayerGradCam(model, model.get_submodule(name))
            found = captum.attribute(image, target=0, relu_attributions=True)
            maps[name] = found[:, 0].detach().cpu().numpy()
        return maps

    def conductance(start: Tensor = black, end: Tensor = image) -> dict[str, np.ndarray]:
        maps = {}
        for name in some:
            captum = LayerConductance(model, model.get_submodule(name))
            found = captum.attribute(end, start, target=0, **path)
            maps[name] = found.sum(1).detach().cpu().numpy()
        return maps

    for method, captum, scale in (
        ("grad_cam", grad_cam, 1.0),
        ("conductance", conductance, len(names) / len(some)),
    ):
        mine, theirs = ours(method), captum()
        if method == "conductance":  # gnetlab's is the mean of Captum's in both directions
            back = conductance(image, black)
            theirs = {name: (values - back[name]) / 2 for name, values in theirs.items()}
        largest = max(np.abs(values).max() for values in theirs.values())
        apart = max(np.abs(mine[name] - values).max() for name, values in theirs.items()) / largest
        pairs = [(machine.timed(lambda m=method: ours(m)), scale * machine.timed(captum))
                 for _ in range(options.rounds)]  # fmt: skip
        fast, slow = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"\n{method}, {len(names)} branches, 224 x 224: gnetlab {fast:.2f} s, Captum "
            f"{slow:.2f} s, ratio {slow / fast:.1f}; maps differ by {apart:.1e} of the largest "
            "value (float32)"
        )


if __name__ == "__main__":
    main()
