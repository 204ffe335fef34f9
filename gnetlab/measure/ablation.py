"""Which branches matter: what the network still knows when one of them is silent.

`branch_ablation()`  accuracy and logits without each branch, over a labelled set, with intervals
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from gnetlab.measure.costs import locate
from gnetlab.measure.devices import float64
from gnetlab.measure.gradients import check_targets
from gnetlab.measure.hooks import in_mode
from gnetlab.net.model import GoogLeNet, Inception, check_ours

KINDS = ("zero", "mean")
Z = 1.96  # standard deviations on either side of a 95% interval


def branch_ablation(
    model: GoogLeNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    kinds: str | Sequence[str] = KINDS,
) -> pd.DataFrame:
    """Remove one branch at a time and see what happens to accuracy and to the true class's logit.

    model     gnetlab's, with weights that tell the classes apart
    batches   images (N x C x H x W) and labels (N), on the model's device; gone through twice
    kinds     "zero": the branch puts out zeros; "mean": each of its channels its own mean over
              all images and positions, which takes away what it says and leaves how loud it is

    Columns: `module` (dotted name of the branch), `stage`, `branch`, `kind`, `accuracy` (fraction),
    `change` (of accuracy, against the whole network on the same images), `low`, `high` (its 95%
    interval for matched pairs, Agresti and Min 2005, doi 10.1002/sim.1781, as if the images were
    drawn one by one), `logit_change` (mean, of the true class), `images`.

    The layers before a module run once for all of its branches. The model runs in eval mode.
    Raises ValueError for an unknown kind, another network, labels that are no class numbers, or an
    empty set.

    >>> import gnetlab as gl
    >>> from gnetlab.net.data import load
    >>> batch = load("photocrops").train_batch(0, batch_size=8)
    >>> model = gl.googlenet("cifar", width=0.125, num_classes=16, seed=0)
    >>> frame = gl.branch_ablation(model, [batch], kinds="zero")
    >>> len(frame), frame.module[0], frame.kind.unique().tolist()
    (36, 'inception3a.branch1x1', ['zero'])
    >>> bool(((frame.low <= frame.change) & (frame.change <= frame.high)).all())
    True
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong or not kinds:
        raise ValueError(f"kinds={kinds!r} asked; choose from {', '.join(KINDS)}")
    check_ours(model)
    batches = [(images, labels) for images, labels in batches if len(labels)]
    if not batches:
        raise ValueError("no images to remove branches on; give batches of images and labels")
    for _, labels in batches:
        check_targets(labels)
    steps = [(name, step) for name, step in model.named_children() if not name.startswith("aux")]
    with torch.no_grad(), in_mode(model, training=False):
        means = _channel_means(steps, batches) if "mean" in kinds else {}
        whole = [_scores(model(images), labels) for images, labels in batches]
        results: dict[tuple[str, str], list[Tensor]] = {}
        for (images, labels), intact in zip(batches, whole, strict=True):
            for name, kind, logits in _ablated(steps, images, kinds, means):
                change = _scores(logits, labels) - intact
                results.setdefault((name, kind), []).append(change)
    correct = torch.cat(whole)[:, 0].mean().item()
    return pd.DataFrame([_row(*key, torch.cat(c), correct) for key, c in results.items()])


def _scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Per image: whether the class is right (0 or 1), and its logit."""
    right = logits.argmax(1) == labels
    scores = logits.gather(1, labels[:, None].long())[:, 0]
    return torch.stack([float64(right), float64(scores)], dim=1)


def _row(name: str, kind: str, changes: Tensor, whole: float) -> dict[str, object]:
    stage, branch = locate(name)
    count = len(changes)
    change = changes[:, 0].mean().item()
    # Half an image more in each of the four cases (right or wrong, before and after): where no
    # answer changes, the differences alone would pretend to certainty.
    gained, lost = (0.5 + (changes[:, 0] == sign).sum().item() for sign in (1, -1))
    total = count + 2
    middle = (gained - lost) / total
    margin = Z * (gained + lost - total * middle**2) ** 0.5 / total
    return {
        "module": name,
        "stage": stage,
        "branch": branch,
        "kind": kind,
        "accuracy": whole + change,
        "change": change,
        "low": max(-1.0, middle - margin),
        "high": min(1.0, middle + margin),
        "logit_change": changes[:, 1].mean().item(),
        "images": count,
    }


def _channel_means(
    steps: list[tuple[str, nn.Module]], batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Of every module's output, per channel, over images and positions."""
    sums: dict[str, Tensor] = {}
    for x, _ in batches:
        for name, step in steps:
            x = step(x)
            if isinstance(step, Inception):
                sums[name] = sums.get(name, 0) + float64(x).mean((2, 3)).sum(0)
    count = sum(len(labels) for _, labels in batches)
    return {name: total / count for name, total in sums.items()}


def _ablated(
    steps: list[tuple[str, nn.Module]], x: Tensor, kinds: list[str], means: dict[str, Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    """Name of the branch, kind, and the logits without it."""
    for i, (name, step) in enumerate(steps):
        x = step(x)
        if not isinstance(step, Inception):
            continue
        for kind in kinds:
            silent = []
            for channels in step.branch_slices.values():
                without = x.clone()
                instead = means[name][channels, None, None].to(x) if kind == "mean" else 0.0
                without[:, channels] = instead
                silent.append(without)
            together = torch.cat(silent)  # all four branches go through the rest at once
            for _, later in steps[i + 1 :]:
                together = later(together)
            parts = together.chunk(len(step.branch_slices))
            for branch, logits in zip(step.branch_slices, parts, strict=True):
                yield f"{name}.{branch}", kind, logits
