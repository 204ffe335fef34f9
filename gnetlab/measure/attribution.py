"""Where a branch looks when the network decides.

`branch_attribution()`   a map per branch: Grad-CAM, gradient x activation, or conductance
`image_attribution()`    a map of the image's pixels, by Captum: integrated gradients, occlusion
`by_stage()`             the maps of some modules, as the figure takes them
`attribution_shares()`   how much of the decision passes through each branch

Captum attributes to one layer at a time where these take all 36 branches from one pass (Grad-CAM)
or one path (conductance). Grad-CAM's numbers are Captum's; conductance takes the mean of the
gradients at both ends of a step where Captum takes the first, which is the mean of what Captum
finds along the path and along the same path backwards, and adds up far better. DeepLift is left
out: on GoogLeNet its attributions do not add up to the difference they should explain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gnetlab.measure.costs import locate
from gnetlab.measure.devices import float64
from gnetlab.measure.hooks import in_mode, observe
from gnetlab.measure.memory import in_parts
from gnetlab.net.model import branch_names

METHODS = ("gradient_x_activation", "grad_cam", "conductance")
IMAGE_METHODS = ("integrated_gradients", "occlusion")


class Attribution(dict[str, np.ndarray]):
    """Name of a branch -> float32 map N x h x w. `targets`: the classes (N).

    `difference`: the logits' difference to the baseline's (N), which conductance shares out.
    """

    targets: np.ndarray
    difference: np.ndarray | None = None


def branch_attribution(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | int | None = None,
    *,
    names: str | Iterable[str] | None = None,
    method: str = "gradient_x_activation",
    steps: int = 20,
) -> Attribution:
    """Attribution of a class's logit to each position of each branch.

    images    N x C x H x W, on the model's device
    targets   class per image, or one for all (None: the predicted one)
    names     branches (None: all of them)
    method    "gradient_x_activation": summed over channels;
              "grad_cam": channels weighted by their mean gradient, negative parts cut off
              (Selvaraju et al. 2017, arXiv 1610.02391);
              "conductance": what the branch passes on of the difference between the image's logit
              and that of a grey image of zeros, along the straight path between the two (Dhamdhere
              et al. 2018, arXiv 1805.12233): the branches of one module add up to all of it, but
              for the error of `steps`
    steps     of the path

    Returns name of the branch -> float32 map, N x h x w of the branch's own resolution, and in its
    `targets` the classes (N). Logits have no physical unit; maps of one image are comparable across
    branches of one module. The model is put into eval mode for the call.

    Raises ValueError for unknown names (with the nearest), methods and classes, for a network
    without branches where no names are given, and RuntimeError for a module that does not run in
    eval mode, or whose output an in-place layer overwrites.

    >>> import torch, gnetlab as gl
    >>> model = gl.googlenet("cifar", width=0.125, seed=0)
    >>> images = torch.rand(2, 3, 32, 32)
    >>> maps = gl.branch_attribution(model, images, targets=3, method="grad_cam")
    >>> len(maps), maps["inception3a.branch5x5"].shape
    (36, (2, 32, 32))
    >>> from gnetlab.measure.attribution import attribution_shares
    >>> maps = gl.branch_attribution(model, images, method="conductance", steps=5)
    >>> attribution_shares(maps).columns.tolist()
    ['module', 'stage', 'branch', 'attribution', 'share', 'completeness']
    """
    names = [names] if isinstance(names, str) else list(names or branch_names(model))
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no Inception modules of gnetlab; give names= of modules "
            "whose output is N x C x H x W, or take gnetlab.googlenet(...), before gnetlab.fuse"
        )
    if method not in METHODS:
        raise ValueError(f"method={method!r} asked; choose {_either(METHODS)}")
    if steps < 1:
        raise ValueError(f"steps={steps} asked; a path has at least 1 (the default is 20)")
    with in_mode(model, training=False):
        labels = _labels(model, images, targets)

        def explain(part: slice) -> tuple[list[np.ndarray], np.ndarray | None]:
            given = model, images[part], labels[part], names
            if method == "conductance":
                maps, difference = _conductance(*given, steps)
            else:
                weigh = _grad_cam if method == "grad_cam" else _gradient_x_activation
                maps, difference = [weigh(*pair) for pair in _passed(*given)[1]], None
            return [m.float().cpu().numpy() for m in maps], difference

        maps, differences = zip(*in_parts(explain, len(images)), strict=True)
    joined = map(np.concatenate, zip(*maps, strict=True))
    result = Attribution(zip(names, joined, strict=True))
    result.targets = labels.cpu().numpy()
    result.difference = np.concatenate(differences) if method == "conductance" else None
    return result


def _either(choices: tuple[str, ...]) -> str:
    return ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"


def _labels(model: nn.Module, images: Tensor, targets: Tensor | int | None) -> Tensor:
    """One class per image, on the images' device; `_logits` sees whether the network has it."""
    if targets is None:
        with torch.no_grad():
            return model(images).argmax(1)
    given = np.asarray(targets.cpu() if isinstance(targets, Tensor) else targets)
    if given.dtype.kind not in "iu" or given.shape not in ((), (1,), (len(images),)):
        raise ValueError(
            f"targets={targets!r} asked for {len(images)} images; give one class or one for each, "
            "as whole numbers, or None for the predicted ones"
        )
    return torch.as_tensor(given.astype(np.int64), device=images.device).expand(len(images))


def _logits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The labels' logits: N."""
    logits = model(images)
    last = logits.shape[1] - 1
    wrong = labels[(labels < 0) | (labels > last)].tolist()
    if wrong:
        raise ValueError(f"class {wrong[0]} asked as a target; the network has 0 to {last}")
    return logits.gather(1, labels[:, None])[:, 0]


def _passed(
    model: nn.Module, images: Tensor, labels: Tensor, names: list[str]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The labels' logits (N); and of every name its output and the logit's gradient by it."""
    outputs: dict[str, tuple[Tensor, int]] = {}

    def keep(name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        outputs[name] = output, output._version

    inside = torch.inference_mode(False)
    with inside, torch.enable_grad(), observe(model, names, keep):
        logits = _logits(model, images.clone().detach().requires_grad_(), labels.clone())
        silent = [name for name in names if name not in outputs]
        if silent:
            raise RuntimeError(
                f"{silent[0]!r} did not run: auxiliary heads run only in training mode; give "
                "branches, as branch_names(model) lists them"
            )
        for name, (output, version) in outputs.items():
            if output._version != version:
                raise RuntimeError(
                    f"the output of {name!r} is overwritten in place by what follows it (an "
                    "in-place ReLU?), so that what would be explained is that layer's output; name "
                    "that layer instead, or use a network without in-place layers"
                )
        kept = [outputs[name][0] for name in names]
        gradients = torch.autograd.grad(logits.sum(), kept)
    pairs = [(output.detach(), g) for output, g in zip(kept, gradients, strict=True)]
    return logits.detach(), pairs


def _gradient_x_activation(output: Tensor, gradient: Tensor) -> Tensor:
    return (output * gradient).sum(1)


def _grad_cam(output: Tensor, gradient: Tensor) -> Tensor:
    return (output * gradient.mean((2, 3), keepdim=True)).sum(1).relu()


def _conductance(
    model: nn.Module, images: Tensor, labels: Tensor, names: list[str], steps: int
) -> tuple[list[Tensor], np.ndarray]:
    """Maps (N x h x w) of the names, and the logits' differences (N)."""
    maps: list[Tensor] = []
    first = before = None
    for alpha in torch.linspace(0, 1, steps + 1).tolist():
        logits, now = _passed(model, alpha * images, labels, names)
        if before is None:
            first, maps = logits, [output.new_zeros(1) for output, _ in now]
        else:
            maps = [
                total + ((output - last) * (slope + gradient)).sum(1) / 2
                for total, (output, slope), (last, gradient) in zip(maps, now, before, strict=True)
            ]
        before = now
    return maps, float64(logits - first).cpu().numpy()


def image_attribution(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | int | None = None,
    *,
    method: str = "integrated_gradients",
    steps: int = 32,
    window: int = 32,
) -> np.ndarray:
    """Attribution of a class's logit to the image's pixels, by Captum: N x H x W.

    images    N x C x H x W; targets: class per image (None: the predicted one)
    method    "integrated_gradients" (Sundararajan et al. 2017, arXiv 1703.01365), `steps` along
              the path from a grey image of zeros, colours summed; "occlusion" (Zeiler and Fergus
              2014, arXiv 1311.2901): what the logit loses behind a grey square of `window` pixels
              that moves by half of its side, the mean over the squares that hide a pixel

    The model is put into eval mode for the call. Raises ValueError for an unknown method or class,
    no steps, or a window that does not fit into the image.
    """
    from captum.attr import IntegratedGradients, Occlusion

    if method not in IMAGE_METHODS:
        raise ValueError(f"method={method!r} asked; choose {_either(IMAGE_METHODS)}")
    side = min(images.shape[2:])
    if steps < 1 or not 1 <= window <= side:
        raise ValueError(
            f"steps={steps}, window={window} asked; give steps >= 1 and a window of 1 to {side} px"
        )
    with torch.inference_mode(False), in_mode(model, training=False):
        images = images.clone()  # one of inference mode's takes no part in a backward pass
        labels = _labels(model, images, targets)
        with torch.no_grad():
            _logits(model, images, labels)
        if method == "integrated_gradients":
            found = IntegratedGradients(model).attribute(
                images, target=labels, n_steps=steps, internal_batch_size=8
            )
            found = found.sum(1)
        else:
            shape, stride = (images.shape[1], window, window), max(1, window // 2)
            # A window hides all colours, and Captum gives each of them the whole loss.
            found = Occlusion(model).attribute(
                images, target=labels, sliding_window_shapes=shape, perturbations_per_eval=8,
                strides=(images.shape[1], stride, stride),
            )[:, 0]  # fmt: skip
    return found.detach().float().cpu().numpy()


def attribution_shares(maps: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Total attribution per branch and its share of the module's absolute total.

    Columns: `module`, `stage`, `branch`, `attribution` (sum over positions, mean over images, in
    logits for gradient x activation and conductance), `share` (of the sum of absolute values over
    the module's branches; signed), and for conductance `completeness` (sum of the module's branches
    over the logits' difference: 1 is exact). Maps of anything else than branches are left out.
    Raises ValueError if some of a module's branches are missing: shares need all four.
    """
    rows = []
    for name, values in maps.items():
        stage, branch = locate(name)
        if not branch:
            continue
        total = float(values.sum(axis=(1, 2)).mean())
        rows.append({"module": name, "stage": stage, "branch": branch, "attribution": total})
    frame = pd.DataFrame(rows, columns=["module", "stage", "branch", "attribution"])
    modules = frame.module.str.rpartition(".")[0]
    for module, found in frame.groupby(modules, sort=False).branch:
        if len(found) < 4:
            raise ValueError(
                f"shares of {module} asked, but only its branches {', '.join(found)} were "
                "attributed; leave names= out, or name all four of a module"
            )
    whole = frame.attribution.abs().groupby(modules).transform("sum")
    frame = frame.assign(share=frame.attribution / whole)
    if getattr(maps, "difference", None) is not None:
        passed = frame.groupby(modules).attribution.transform("sum")
        frame = frame.assign(completeness=passed / maps.difference.mean())
    return frame


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
