"""Where the gradient of each layer comes from: the main loss, or an auxiliary head's.

`gradient_flow()`  one row per layer and loss source, from one forward pass
`output_flow()`  the gradient that reaches the output of each module, by source
`gradient_noise()`  signal against noise over mini-batches, and the spread of cosines
`split_gradients()`  the gradients themselves
`GradientRecorder`  the same over a training, without disturbing it
`at_initialization()`  fresh networks: normalizations x initializations x seeds
`heads_share()`, `weight_cuts()`, `by_depth()`  what the notebook reads off them

The total loss is main + 0.3 aux1 + 0.3 aux2 (arXiv 1409.4842, section 5), each the cross-entropy of
its classifier; every source below is weighted already, so that the sources add up to the total.
All inner products are taken in float64: a gradient of 1e-14 is a result here. Keep the network
itself in float32 at least; in float16 such gradients are zero.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnetlab.measure.costs import locate
from gnetlab.measure.devices import float64, fork_random
from gnetlab.measure.hooks import in_mode, observe
from gnetlab.measure.memory import in_one_piece
from gnetlab.net.model import googlenet

HEAD_WEIGHT = 0.3
# A field of a GoogLeNet's output, ours or torchvision's, and which source its loss is.
SOURCES = {
    "logits": "main", "aux1": "aux1", "aux2": "aux2", "aux_logits1": "aux1", "aux_logits2": "aux2",
}  # fmt: skip


def check_targets(targets: Tensor) -> None:
    """Raise ValueError for anything but class numbers, N, of a type that a loss can index by."""
    if targets.numel() == 0:
        raise ValueError("an empty batch was given, and the mean of no losses is none; give images")
    if targets.dtype not in (torch.int64, torch.uint8) or targets.dim() != 1:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} and {targets.dtype} were given; give one "
            "class number per image (N, int64): targets.long(), or one_hot.argmax(1)"
        )


def logits_by_source(output: Any) -> dict[str, Tensor]:
    """Logits of a training-mode output by source: main, and aux1, aux2 where there are such heads.

    An output is one tensor, or a named tuple of ours or of torchvision's GoogLeNet; else
    ValueError.
    """
    if isinstance(output, Tensor):
        return {"main": output}
    fields = output._asdict() if hasattr(output, "_asdict") else {}
    found = {SOURCES.get(name, name): v for name, v in fields.items() if v is not None}
    unknown = found.keys() - set(SOURCES.values())
    if "main" not in found or unknown:
        of = f" of {', '.join(fields)}" if fields else ""
        raise ValueError(
            f"the model returned {type(output).__name__}{of}; gradients are split for logits (one "
            "tensor), or for a named tuple with logits and aux1, aux2 (or aux_logits1, "
            "aux_logits2): wrap the model so that it returns one of these"
        )
    return {source: found[source] for source in ("main", "aux1", "aux2") if source in found}


def weighted_losses(output, targets: Tensor, head_weight: float = HEAD_WEIGHT) -> dict[str, Tensor]:
    """Loss by source (scalars, heads weighted already) of a training-mode output.

    That is logits, or a named tuple of ours or of torchvision's GoogLeNet; else ValueError, as for
    targets that are not one whole number per image.
    """
    check_targets(targets)
    losses = {}
    for source, logits in logits_by_source(output).items():
        loss = F.cross_entropy(logits, targets)
        losses[source] = loss if source == "main" else head_weight * loss
    return losses


def split_gradients(
    model: nn.Module, images: Tensor, targets: Tensor, *, head_weight: float = HEAD_WEIGHT
) -> dict[str, dict[str, Tensor]]:
    """Gradient of every weight by source: layer name -> source -> tensor like the weight.

    Weights are parameters called `weight`, of more than one dimension: biases and batch norm are
    left out, and so is what goes by another name (`in_proj_weight` of attention, `weight_orig` of
    pruned layers, what torch.nn.utils.parametrizations makes a weight of). A source that does not
    reach a layer (aux1 above 4a, aux2 above 4d) is absent, and so is a layer that none reaches;
    "total" is the sum.

    The model runs once, in training mode. Its mode, buffers (batch-norm statistics), `.grad` and
    the random state are as before afterwards, so that looking does not change a training.
    """
    split, _ = _look(model, images, targets, head_weight, outputs=False)
    for by_source in split.gradients.values():
        by_source["total"] = torch.stack(list(by_source.values())).sum(0)
    return split.gradients


class _Split(NamedTuple):
    """Tensors by name, and the gradient of each by source."""

    tensors: dict[str, Tensor]
    gradients: dict[str, dict[str, Tensor]]

    def products(self) -> _Products:
        layout, blocks = [], []
        for name, by_source in self.gradients.items():
            rows = [self.tensors[name].detach(), *by_source.values()]
            rows = float64(torch.stack(rows).flatten(1))
            layout.append((name, tuple(by_source)))
            blocks.append((rows @ rows.T).flatten())
        return _Products(layout, torch.cat(blocks) if blocks else torch.empty(0))


class _Products(NamedTuple):
    """Inner products of each tensor and its gradients, float64, end to end on the device."""

    layout: list[tuple[str, tuple[str, ...]]]
    values: Tensor

    def matrices(self) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """Name, sources with "total" at the end, and the matrix: first row and column the tensor.

        The total is the sum of the sources, exactly. One transfer from the device.
        """
        values, start = self.values.cpu().numpy(), 0
        for name, sources in self.layout:
            side = 1 + len(sources)
            block = values[start : start + side**2].reshape(side, side)
            start += side**2
            block = np.vstack([block, block[1:].sum(0)])
            yield name, [*sources, "total"], np.column_stack([block, block[:, 1:].sum(1)])


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and parameter.dim() > 1 and parameter.requires_grad
    }


def _split(losses: Mapping[str, Tensor], tensors: dict[str, Tensor], keep: bool) -> _Split:
    """Gradients of the losses; `keep` the graph for a backward pass that follows."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    losses = {source: loss for source, loss in losses.items() if loss.requires_grad}
    if not tensors or not losses:
        raise ValueError(
            "no weight of this model takes part in its losses with requires_grad; unfreeze some "
            "(parameter.requires_grad_())"
        )
    gradients: dict[str, dict[str, Tensor]] = {name: {} for name in tensors}
    for i, (source, loss) in enumerate(losses.items()):
        last = i + 1 == len(losses)
        found = torch.autograd.grad(
            loss, list(tensors.values()), retain_graph=keep or not last, allow_unused=True
        )
        for name, gradient in zip(tensors, found, strict=True):
            if gradient is not None:
                gradients[name][source] = gradient
    reached = {name: by_source for name, by_source in gradients.items() if by_source}
    return _Split(tensors, reached)


def _look(
    model: nn.Module, images: Tensor, targets: Tensor, head_weight: float, outputs: bool
) -> tuple[_Split, _Split]:
    """Gradients of the weights, and of the outputs of the modules if asked; one forward pass."""
    seen: dict[str, tuple[Tensor, int]] = {}
    weights, names = _weights(model), _output_names(model) if outputs else []
    with (
        torch.inference_mode(False),
        _as_before(model, images.device),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
        in_one_piece(len(images), "batch norm and the mean loss see the whole batch"),
        observe(
            model, names, lambda n, _m, _i, output: seen.update({n: (output, output._version)})
        ),
    ):
        # Copies: what was made in inference mode takes no part in a backward pass.
        losses = weighted_losses(model(images.clone()), targets.clone(), head_weight)
        for name, (output, version) in seen.items():
            if output._version != version:
                raise RuntimeError(
                    f"the output of {name!r} is overwritten in place by what follows it (an "
                    "in-place ReLU?), so that its gradient is lost; use a network without that"
                )
        outputs = {f"output {name}": output for name, (output, _) in seen.items()}
        both = _split(losses, weights | outputs, keep=False)
    parts = []
    for is_output in (False, True):
        chosen = {n: g for n, g in both.gradients.items() if n.startswith("output ") == is_output}
        parts.append(_Split(both.tensors, chosen))
    return parts[0], parts[1]


def _output_names(model: nn.Module) -> list[str]:
    names = [name for name, _ in model.named_children()]
    return [name for name in names if re.match(r"conv\d|inception", name)]


@contextlib.contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with fork_random(device), in_mode(model, training=True):
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

    model        gnetlab's or torchvision's GoogLeNet, or any network that returns logits; of its
                 weights those that `split_gradients` takes
    images       N x C x H x W, and targets, N class numbers (int64), both on the model's device
    head_weight  of each auxiliary loss (the paper's 0.3, section 5)

    Columns: `module` (dotted name of the convolution or linear layer), `stage`, `branch`, `kind`,
    `source` (main, aux1, aux2, total; heads weighted by `head_weight`), `elements` (count of
    weights), `gradient_rms` (root mean square over them, loss per unit of weight), `weight_rms`,
    `relative` (the first over the second; of layers that batch norm follows only their product
    does not depend on the weights' scale), `cosine_to_main` (NA where main does not reach),
    `projection_share` (<g_s, g> / |g|^2: the sources' shares of the total add up to 1, a negative
    one works against it), `energy_share` (|g_s|^2 over that and |g - g_s|^2: the source against
    all others together), `weight_dot_gradient` (<W, g_s>, see `weight_cuts`). A row is missing
    where a source does not reach the layer.

    The model runs once, without autocast, and is as before afterwards, as in `split_gradients`.

    Raises ValueError for targets that are no class numbers, an output that is neither logits nor a
    GoogLeNet's, and a model whose weights are all frozen.

    >>> import gnetlab as gl
    >>> from gnetlab.net.data import load
    >>> images, targets = load("photocrops").train_batch(0, batch_size=8)
    >>> model = gl.googlenet(stem="compact", norm="batch", width=0.125, num_classes=16, seed=0)
    >>> flow = gl.gradient_flow(model, images, targets)
    >>> flow[flow.module == "conv1.conv"].source.tolist()
    ['main', 'aux1', 'aux2', 'total']
    >>> parts = flow[flow.source != "total"].groupby("module").projection_share.sum()
    >>> bool(((parts - 1).abs() < 1e-6).all())  # the sources add up to the total
    True
    """
    layers, _ = _look(model, images, targets, head_weight, outputs=False)
    return pd.DataFrame(_layer_rows(model, layers.products()), columns=list(COLUMNS))


COLUMNS = (
    "module", "stage", "branch", "kind", "source", "elements", "gradient_rms", "weight_rms",
    "relative", "cosine_to_main", "projection_share", "energy_share", "weight_dot_gradient",
)  # fmt: skip


def _layer_rows(model: nn.Module, products: _Products) -> Iterator[tuple]:
    for name, sources, matrix in products.matrices():
        layer = model.get_submodule(name)
        elements, total = layer.weight.numel(), matrix[-1, -1]
        weight_rms = (matrix[0, 0] / elements) ** 0.5
        place = (name, *locate(name), type(layer).__name__)
        for i, source in enumerate(sources, start=1):
            energy, dot = matrix[i, i], matrix[i, -1]
            rms = (max(energy, 0.0) / elements) ** 0.5
            others = energy - 2 * dot + total  # |g - g_s|^2
            cosine = _ratio(matrix[i, 1], (energy * matrix[1, 1]) ** 0.5)
            yield (
                *place, source, elements, rms, weight_rms, _ratio(rms, weight_rms),
                cosine if sources[0] == "main" else np.nan, _ratio(dot, total),
                _ratio(energy, energy + others), matrix[0, i],
            )  # fmt: skip


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else np.nan


def output_flow(
    model: nn.Module, images: Tensor, targets: Tensor, *, head_weight: float = HEAD_WEIGHT
) -> pd.DataFrame:
    """How much gradient comes down to each module's output, by loss source, for one batch.

    This, not the gradient of weights, tells whether gradient vanishes on its way (see
    `weight_cuts`).

    model        a GoogLeNet, whose stem and modules are its children conv* and inception*
    images       N x C x H x W, and targets, N class numbers (int64), both on the model's device
    head_weight  of each auxiliary loss (the paper's 0.3, section 5)

    Columns: `module` (convolutions of the stem and Inception modules), `stage` (conv1, conv2_reduce
    ... 5b), `source`, `flow` (root mean square over the images of the norm of N dL/dx, where x is
    the output for one image and L the mean loss over all N: without batch norm that is the gradient
    of the image's own loss; nats per unit of activation).

    Raises ValueError for a model without such children, and as `gradient_flow` does; RuntimeError
    for an output that is overwritten in place.

    >>> import gnetlab as gl
    >>> from gnetlab.measure.gradients import output_flow
    >>> from gnetlab.net.data import load
    >>> images, targets = load("photocrops").train_batch(0, batch_size=8)
    >>> model = gl.googlenet(stem="compact", norm="batch", width=0.125, num_classes=16, seed=0)
    >>> flow = output_flow(model, images, targets)
    >>> flow[flow.source == "aux1"].stage.tolist()  # the head on 4a reaches these
    ['conv1', 'conv2_reduce', 'conv2', '3a', '3b', '4a']
    """
    if not _output_names(model):
        raise ValueError(
            f"{type(model).__name__} has no child conv1 ... or inception...; give a GoogLeNet, or "
            "take gradient_flow, which works on any network"
        )
    _, outputs = _look(model, images, targets, head_weight, outputs=True)
    rows = _output_rows(outputs.products(), len(images))
    return pd.DataFrame(rows, columns=["module", "stage", "source", "flow"])


def _output_rows(products: _Products, batch: int) -> Iterator[tuple]:
    for name, sources, matrix in products.matrices():
        module = name.removeprefix("output ")
        for i, source in enumerate(sources, start=1):
            # The loss is the mean over the batch: an image's own gradient is `batch` times larger.
            flow = (batch * max(matrix[i, i], 0.0)) ** 0.5
            yield module, module.removeprefix("inception"), source, flow


def gradient_noise(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    head_weight: float = HEAD_WEIGHT,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of a batch's gradient is signal, that is, common to all batches.

    model        gnetlab's or torchvision's GoogLeNet, or any network that returns logits
    batches      at least two (images, targets), as for `gradient_flow`
    head_weight  of each auxiliary loss (the paper's 0.3)
    seed         decides dropout, anew in each batch

    Columns: `module`, `stage`, `branch`, `kind`, `source`, `signal_rms` and `noise_rms` (of the
    mean gradient, and of a batch's deviation from it, per weight), `snr` (ratio of their squares;
    NA, unresolved, where the estimate of the signal's square is not positive), `cosine_to_main`
    and `cosine_std` (mean and standard deviation over batches; both losses see the same batch, so
    that a cosine at noise level may be shared noise), `batches` (count).

    Unbiased estimates after McCandlish et al. 2018, arXiv 1812.06162, appendix A. Memory does not
    grow with the number of batches. Raises ValueError for fewer than two, and as `gradient_flow`.

    >>> import gnetlab as gl
    >>> from gnetlab.measure.gradients import gradient_noise
    >>> from gnetlab.net.data import load
    >>> data = load("photocrops")
    >>> model = gl.googlenet(stem="compact", norm="batch", width=0.125, num_classes=16, seed=0)
    >>> noise = gradient_noise(model, [data.train_batch(step, 8) for step in range(3)])
    >>> noise.columns.tolist()[5:8], noise.batches.unique().tolist()
    (['signal_rms', 'noise_rms', 'snr'], [3])
    >>> bool((noise.noise_rms > 0).all())
    True
    """
    sums: dict[str, dict[str, Tensor]] = {}
    energies: dict[tuple[str, str], list[float]] = {}
    cosines: dict[tuple[str, str], list[float]] = {}
    count, device = 0, next(model.parameters()).device
    for images, targets in batches:
        with fork_random(device):
            torch.manual_seed(seed + count)
            layers, _ = _look(model, images, targets, head_weight, outputs=False)
        count += 1
        for name, sources, matrix in layers.products().matrices():
            parts = layers.gradients[name]
            parts["total"] = sum(map(float64, parts.values()))
            for i, source in enumerate(sources, start=1):
                before = sums.setdefault(name, {}).get(source, 0)
                sums[name][source] = before + float64(parts[source])
                energies.setdefault((name, source), []).append(matrix[i, i])
                cosine = _ratio(matrix[i, 1], (matrix[i, i] * matrix[1, 1]) ** 0.5)
                cosines.setdefault((name, source), []).append(
                    cosine if sources[0] == "main" else np.nan
                )
    if count < 2:
        raise ValueError(f"{count} batches given; noise takes at least two, and better eight")
    rows = []
    for name, by_source in sums.items():
        kind, place = type(model.get_submodule(name)).__name__, locate(name)
        for source, summed in by_source.items():
            energy, of_sum = sum(energies[name, source]), float(summed.square().sum())
            signal = (of_sum - energy) / (count * (count - 1))
            noise = max((energy - of_sum / count) / (count - 1), 0.0)  # in this order NaN stays
            rows.append(
                {
                    "module": name, "stage": place[0], "branch": place[1], "kind": kind,
                    "source": source,
                    "signal_rms": (signal / summed.numel()) ** 0.5 if signal > 0 else np.nan,
                    "noise_rms": (noise / summed.numel()) ** 0.5,
                    "snr": signal / noise if min(signal, noise) > 0 else
                    np.inf if signal > 0 else np.nan,
                    "cosine_to_main": np.mean(cosines[name, source]),
                    "cosine_std": np.std(cosines[name, source], ddof=1), "batches": count,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


class GradientRecorder:
    """Keeps the gradient's size at every step of a training, and its sources every `every` steps.

    model   the one that is trained; of its weights those that `split_gradients` takes
    every   steps between splits by source; 0 never splits

    `totals()` and `splits()` are the frames. Training goes on bit for bit as without it (but
    `train` takes a step that is split in float32, whatever its precision). What is kept stays on
    the device, some numbers per layer and step, until it is read.

    >>> import gnetlab as gl
    >>> from gnetlab.measure.gradients import GradientRecorder, weighted_losses
    >>> from gnetlab.net.data import load
    >>> model = gl.googlenet(stem="compact", norm="batch", width=0.125, num_classes=16, seed=0)
    >>> recorder, data = GradientRecorder(model, every=2), load("photocrops", size=16)
    >>> metrics = gl.train(model, data, steps=3, batch_size=8, gradients=recorder)
    >>> recorder.totals().step.unique().tolist(), recorder.splits().step.unique().tolist()
    ([0, 1, 2], [0, 2])

    In a loop of your own:

    >>> images, targets = data.train_batch(3, batch_size=8)
    >>> losses = weighted_losses(model(images), targets)
    >>> recorder.before_backward(losses)
    >>> sum(losses.values()).backward()
    >>> recorder.after_backward()  # before the gradient is clipped
    >>> recorder.step
    4
    """

    def __init__(self, model: nn.Module, *, every: int = 20) -> None:
        self.model, self.every, self.step = model, every, 0
        self._layers = _weights(model)
        self._norms: list[Tensor] = []  # layers, at every step
        self._splits: list[tuple[int, _Products]] = []

    def splits_now(self) -> bool:
        """Whether the coming backward pass is one that is split."""
        return bool(self.every) and self.step % self.every == 0

    def before_backward(
        self, losses: Mapping[str, Tensor], average: Callable[[Tensor], Tensor] = lambda g: g
    ) -> None:
        """Split the gradient of these losses, if it is time; their graph is kept.

        `average` gives what is recorded of each gradient: its mean over several processes.
        """
        if self.splits_now():
            with torch.no_grad():
                split = _split(losses, dict(self._layers), keep=True)
                for by_source in split.gradients.values():
                    by_source |= {source: average(g) for source, g in by_source.items()}
                self._splits.append((self.step, split.products()))

    def after_backward(self) -> None:
        """Keep the norm of every weight's `.grad`."""
        self.keep(self.norms())

    def norms(self) -> Tensor:
        """Norm of each weight's `.grad`, NaN where there is none."""
        gradients = [p.grad for p in self._layers.values() if p.grad is not None]
        if not gradients:
            raise RuntimeError("no weight has a gradient; call this after the backward pass")
        # What clip_grad_norm_ uses: a few kernels for all layers, and no wait for the device.
        found = iter(torch._foreach_norm(gradients))
        missing = gradients[0].new_full((), float("nan"))
        return torch.stack(
            [missing if p.grad is None else next(found) for p in self._layers.values()]
        )

    def keep(self, norms: Tensor) -> None:
        """Keep what `norms` gave and count a step."""
        self._norms.append(norms)
        self.step += 1

    def totals(self) -> pd.DataFrame:
        """Columns: `step` (updates made before), `module`, `stage`, `branch`, `gradient_rms`.

        Norms are taken in the gradients' own precision, ten times as fast as in float64: float32
        has no squares of what is below 1e-22, which count as 0 here. `gradient_flow` sees them.
        """
        names = list(self._layers)
        roots = np.array([p.numel() ** 0.5 for p in self._layers.values()])
        table = self._table() / roots
        places = [locate(name) for name in names]
        frame = pd.DataFrame(
            {
                "step": np.repeat(np.arange(len(table)), len(names)),
                "module": names * len(table),
                "stage": [stage for stage, _ in places] * len(table),
                "branch": [branch for _, branch in places] * len(table),
                "gradient_rms": table.ravel(),
            }
        )
        return frame.dropna(subset="gradient_rms").reset_index(drop=True)

    def _table(self) -> np.ndarray:
        if not self._norms:
            return np.empty((0, len(self._layers)))
        return float64(torch.stack(self._norms)).cpu().numpy()

    def splits(self) -> pd.DataFrame:
        """Columns: `step` (updates made before) and those of `gradient_flow`."""
        frames = [
            pd.DataFrame(_layer_rows(self.model, products), columns=list(COLUMNS)).assign(step=step)
            for step, products in self._splits
        ]
        whole = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*COLUMNS])
        return whole.reindex(columns=["step", *COLUMNS])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on; plain tensors and lists."""
        return {
            "norms": torch.stack(self._norms).cpu() if self._norms else None,
            "splits": [(step, list(p.layout), p.values.cpu()) for step, p in self._splits],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        device = next(iter(self._layers.values())).device
        norms = state["norms"]
        self._norms = [] if norms is None else list(norms.to(device))
        self._splits = [
            (step, _Products([(name, tuple(sources)) for name, sources in layout], values))
            for step, layout, values in state["splits"]
        ]
        self.step = len(self._norms)


class Initial(NamedTuple):
    """`layers` as from `gradient_flow`, `outputs` as from `output_flow`; and columns that say of
    which network: `norm`, `init`, `seed`."""

    layers: pd.DataFrame
    outputs: pd.DataFrame


def at_initialization(
    data: Any,
    norms: Mapping[str, str | None],
    inits: Mapping[str, Any],
    seeds: Iterable[int],
    *,
    batch_size: int = 64,
    **network: Any,
) -> Initial:
    """Gradients of untrained networks: every norm with every init and seed.

    `norms` and `inits` map a label to the value that `googlenet` takes; `network` are its other
    arguments; `data` is a data set of `gnetlab.net.data`, and networks live on its device. The
    seed decides the weights, the batch and dropout.
    """
    frames: tuple[list, list] = ([], [])
    for (norm, norm_value), (init, init_value), seed in product(
        norms.items(), inits.items(), list(seeds)
    ):
        model = googlenet(norm=norm_value, init=init_value, seed=seed, **network)
        batch = data.train_batch(0, batch_size, seed)
        with fork_random(data.device):
            torch.manual_seed(seed)  # dropout
            layers, outputs = _look(model.to(data.device), *batch, HEAD_WEIGHT, outputs=True)
        columns = ["module", "stage", "source", "flow"]
        found = (
            pd.DataFrame(_layer_rows(model, layers.products()), columns=list(COLUMNS)),
            pd.DataFrame(_output_rows(outputs.products(), batch_size), columns=columns),
        )
        for frame, kept in zip(found, frames, strict=True):
            kept.append(frame.assign(norm=norm, init=init, seed=seed))
    return Initial(*(pd.concat(kept, ignore_index=True) for kept in frames))


def heads_share(layers: pd.DataFrame, module: str = "conv1.conv") -> pd.DataFrame:
    """What the heads add at one layer. `layers` as from `at_initialization`.

    Columns: `configuration` (norm and init), `seed`, `ratio` (gradient RMS under the total loss
    over that under the main loss alone; 1 means that the heads add nothing), `energy_share` (of
    both heads together, in 0..1: see `gradient_flow`).
    """
    rows = layers[layers.module == module]
    rows = rows.assign(configuration=rows.norm + ", " + rows.init)
    table = rows.pivot_table(
        index=["configuration", "seed"], columns="source", values=["gradient_rms", "energy_share"],
        sort=False,
    )  # fmt: skip
    shares = pd.DataFrame(
        {
            "ratio": table["gradient_rms"]["total"] / table["gradient_rms"]["main"],
            "energy_share": 1 - table["energy_share"]["main"],
        }
    )
    return shares.reset_index()


_ACROSS = re.compile(
    r"conv1|conv2_reduce|conv2|fc"
    r"|inception(..(?:_\d+)?)\.(?:branch1x1|branch3x3\.conv|branch5x5\.conv|branch_pool\.proj)"
)


def weight_cuts(layers: pd.DataFrame) -> pd.DataFrame:
    """Sum of <W, dL/dW> over cuts through the network, for the main loss.

    A ReLU network without biases is homogeneous of degree 1 in the weights of any cut through it,
    so by Euler's identity the sum equals <logits, dL/dlogits> at every cut, whatever the gradient
    that comes down: the gradient of the weights cannot show whether it vanishes. LRN, batch norm
    and biases other than zero break the identity.

    layers   as from `at_initialization`, of networks with reductions. Of a module one convolution
             of each branch counts, the one after the reduction
    Columns: `norm`, `init`, `seed`, `stage` (conv1, conv2_reduce, conv2, 3a ... 5b, fc),
    `weight_dot_gradient` (nats).
    """
    rows = layers[layers.source == "main"]
    found = rows.module.map(lambda name: _ACROSS.fullmatch(name.removesuffix(".conv")))
    rows = rows[found.notna()]
    stages = [match[1] or match[0] for match in found.dropna()]
    keys = ["norm", "init", "seed", "stage"]
    sums = rows.assign(stage=stages).groupby(keys, sort=False).weight_dot_gradient.sum()
    return sums.reset_index()


def by_depth(
    data: Any,
    extra_modules: Iterable[int],
    seeds: Iterable[int],
    *,
    norm: str | None = None,
    init: Any = None,
    **options: Any,
) -> pd.DataFrame:
    """Gradient at the first layer against depth, before training; copies of 4c between the heads.

    `options` go to `at_initialization`.

    Columns: `modules` (count), `seed`, `source` (main, total), `conv1_rms` (RMS of conv1's
    gradient), `first_to_last` (that over fc's), `propagation` (flow at conv1's output over flow at
    5b's; see `output_flow`).
    """
    rows, seeds = [], list(seeds)
    for extra in extra_modules:
        found = at_initialization(
            data, {"": norm}, {"": init}, seeds, extra_modules=extra, **options
        )
        rms = found.layers.set_index(["module", "source", "seed"]).gradient_rms
        flow = found.outputs.set_index(["stage", "source", "seed"]).flow
        for source, seed in product(("main", "total"), dict.fromkeys(found.layers.seed)):
            first = rms["conv1.conv", source, seed]
            rows.append(
                {
                    "modules": 9 + extra, "seed": seed, "source": source, "conv1_rms": first,
                    "first_to_last": first / rms["fc", source, seed],
                    "propagation": flow["conv1", source, seed] / flow["5b", source, seed],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
