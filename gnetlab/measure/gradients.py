"""Where the gradient of each layer comes from: the main loss, or an auxiliary head's.

`gradient_flow()`  one row per layer and loss source, from one forward pass
`at_initialization()`  the same for fresh networks: normalizations x initializations x seeds
`total_over_main()`  what the heads add at one layer
`split_gradients()`  the gradients themselves

The total loss is main + 0.3 aux1 + 0.3 aux2 (section 5 of the paper), each the cross-entropy of
its classifier; every source below is weighted already, so that the sources add up to the total.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnetlab.measure.costs import locate
from gnetlab.measure.hooks import in_mode
from gnetlab.net.model import googlenet

HEAD_WEIGHT = 0.3
SOURCES = ("main", "aux1", "aux2", "total")


def weighted_losses(output, targets: Tensor, head_weight: float = HEAD_WEIGHT) -> dict[str, Tensor]:
    """Loss by source (scalars, heads weighted already) of a training-mode output."""
    if isinstance(output, Tensor):
        return {"main": F.cross_entropy(output, targets)}
    losses = {"main": F.cross_entropy(output.logits, targets)}
    for name in ("aux1", "aux2"):
        logits = getattr(output, name)
        if logits is not None:
            losses[name] = head_weight * F.cross_entropy(logits, targets)
    return losses


def split_gradients(
    model: nn.Module, images: Tensor, targets: Tensor, *, head_weight: float = HEAD_WEIGHT
) -> dict[str, dict[str, Tensor]]:
    """Gradient of every weight by source: layer name -> source -> tensor like the weight.

    Weights are parameters of more than one dimension (biases and batch norm left out). A source
    that does not reach a layer (aux1 above 4a, aux2 above 4d) is absent, and so is a layer that
    none reaches; "total" is the sum.

    The model runs once, in training mode. Its mode, buffers (batch-norm statistics), `.grad` and
    the random state are as before afterwards, so that looking does not change a training.
    """
    weights = {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.requires_grad
    }
    with _as_before(model, images.device), torch.enable_grad():
        losses = weighted_losses(model(images), targets, head_weight)
        split: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
        for i, (source, loss) in enumerate(losses.items()):
            gradients = torch.autograd.grad(
                loss, list(weights.values()), retain_graph=i + 1 < len(losses), allow_unused=True
            )
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    split[name][source] = gradient
    split = {name: by_source for name, by_source in split.items() if by_source}
    for by_source in split.values():
        by_source["total"] = torch.stack(list(by_source.values())).sum(0)
    return split


@contextlib.contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), in_mode(model, training=True):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


def gradient_flow(
    model: nn.Module, images: Tensor, targets: Tensor, *, head_weight: float = HEAD_WEIGHT
) -> pd.DataFrame:
    """How much gradient reaches each layer, by loss source, for one batch.

    images N x C x H x W, targets N (class indices), both on the model's device.

    Columns: `module` (dotted name of the convolution or linear layer), `stage`, `branch`, `kind`,
    `source` (main, aux1, aux2, total; heads weighted by `head_weight`), `gradient_rms` (root mean
    square over the weight's elements, loss per unit of weight), `weight_rms`, `relative` (the
    first over the second), `cosine_to_main` (NA where main does not reach). A row is missing
    where a source does not reach the layer. Sums are taken in float64.
    """
    modules = dict(model.named_modules())
    split = split_gradients(model, images, targets, head_weight=head_weight)
    rows = []
    for name, by_source in split.items():
        stage, branch = locate(name)
        weight_rms = _rms(modules[name].weight.detach())
        main = by_source.get("main")
        for source in SOURCES:
            if source not in by_source:
                continue
            gradient = by_source[source]
            rms = _rms(gradient)
            rows.append(
                {
                    "module": name,
                    "stage": stage,
                    "branch": branch,
                    "kind": type(modules[name]).__name__,
                    "source": source,
                    "gradient_rms": rms,
                    "weight_rms": weight_rms,
                    "relative": rms / weight_rms if weight_rms else float("nan"),
                    "cosine_to_main": _cosine(gradient, main) if main is not None else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def at_initialization(
    data: Any,
    norms: Mapping[str, str | None],
    inits: Mapping[str, Any],
    seeds: Iterable[int],
    *,
    batch_size: int = 64,
    **network: Any,
) -> pd.DataFrame:
    """`gradient_flow` of untrained networks: every norm with every init and seed.

    `norms` and `inits` map a label to the value that `googlenet` takes; `network` are its other
    arguments; `data` is a data set of `gnetlab.net.data`, and networks live on its device.

    Columns: those of `gradient_flow`, and `norm`, `init` (the labels), `seed` (of the weights,
    the batch and dropout).
    """
    frames = []
    for (norm, norm_value), (init, init_value), seed in product(
        norms.items(), inits.items(), seeds
    ):
        model = googlenet(norm=norm_value, init=init_value, seed=seed, **network)
        batch = data.train_batch(0, batch_size, seed)
        cuda = [data.device] if data.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)  # dropout
            flow = gradient_flow(model.to(data.device), *batch)
        frames.append(flow.assign(norm=norm, init=init, seed=seed))
    return pd.concat(frames, ignore_index=True)


def total_over_main(flow: pd.DataFrame, module: str = "conv1.conv") -> pd.DataFrame:
    """What the heads add at one layer. `flow` as from `at_initialization`.

    Columns: `configuration` (norm and init), `seed`, `ratio` (gradient RMS under the total loss
    over that under the main loss alone; 1 means that the heads add nothing).
    """
    rows = flow[flow.module == module]
    rows = rows.assign(configuration=rows.norm + ", " + rows.init)
    rms = rows.pivot_table(
        index=["configuration", "seed"], columns="source", values="gradient_rms", sort=False
    )
    return (rms.total / rms.main).rename("ratio").reset_index()


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _cosine(a: Tensor, b: Tensor) -> float:
    # F.cosine_similarity clamps tiny norms, and vanishing gradients are tiny.
    a, b = a.double().flatten(), b.double().flatten()
    norms = a.norm() * b.norm()
    return float(a @ b / norms) if norms > 0 else float("nan")
