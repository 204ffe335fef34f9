"""The small, seeded training loop that the experiments share.

`train()`     SGD or Adam on the weighted losses; metrics as a frame; resumable
`evaluate()`  loss and accuracy on a data set's images, in eval mode
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from gnetlab.measure.gradients import HEAD_WEIGHT, GradientRecorder, weighted_losses
from gnetlab.measure.hooks import in_mode

METRICS = ("step", "split", "source", "loss", "accuracy")
OPTIMIZERS = ("sgd", "adam")
_READ_EVERY = 20  # steps between transfers of the metrics from the device
_WARM_UP = 3  # steps before one is captured, as torch's notes on CUDA graphs ask
Metrics = dict[str, tuple[Tensor, Tensor | None]]


def train(
    model: nn.Module,
    data: Any,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 0.05,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float | Callable[[str], float] = 0.0,
    nesterov: bool = False,
    cosine: bool = False,
    clip: float | None = None,
    head_weight: float = HEAD_WEIGHT,
    heads_until: float = 1.0,
    test_every: int | None = None,
    train_batches: int = 0,
    gradients: GradientRecorder | None = None,
    seed: int = 0,
    mixed_precision: bool = False,
    channels_last: bool = False,
    capture: bool | None = None,
    checkpoint: str | Path | None = None,
    save_every: int = 500,
    progress: bool = True,
) -> pd.DataFrame:
    """Train `model` in place, on its own device, and return its metrics.

    data             a data set of `gnetlab.net.data` on the same device (see its `load`), or what
                     has its `train_batch(step, batch_size, seed)` and `test_batches()`
    steps            updates, each on `batch_size` images, with `learning_rate`
    optimizer        "sgd", with `momentum` and `nesterov`, or "adam" (which knows neither)
    weight_decay     for all parameters, or a function of a parameter's dotted name
    cosine           let the learning rate rise over the first 2% of the steps, then fall to 0 as
                     half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)
    clip             largest norm of the whole gradient (None: no clipping)
    head_weight      weight of each auxiliary loss (0.3 in the paper)
    heads_until      fraction of the steps after which the heads' losses no longer count
    test_every       steps between evaluations on the test set (None: at the end only)
    train_batches    batches of 256 training images to evaluate beside each test, in eval mode
    gradients        a recorder of this model, fed at every step, before clipping; a step that it
                     splits is taken in float32
    mixed_precision  bfloat16 autocast
    channels_last    memory format of the weights and images; True is quicker on a CPU
    seed             of the order of the images and of dropout
    capture          run the step as a CUDA graph, which spares small networks most of their time on
                     a GPU (None: on CUDA; elsewhere there is none)
    progress         a bar, on a terminal and in Jupyter only
    checkpoint       file to save to every `save_every` steps and at the end, written atomically;
                     if it exists, training goes on from it, exactly as if never interrupted

    Columns: `step` (updates made), `split` (train: the batch of the step; test; train_eval: see
    `train_batches`), `source` (main, aux1, aux2, and total for train), `loss` (unweighted
    cross-entropy in nats; total weighted), `accuracy` (fraction of the images, NA for total). Equal
    seeds give equal results on the CPU.

    Raises ValueError for unknown options and a checkpoint that cannot be gone on from, and
    RuntimeError at a non-finite loss, with the metrics so far in its `metrics`.

    >>> import gnetlab as gl
    >>> from gnetlab.net.data import load
    >>> model = gl.googlenet(stem="compact", norm="batch", width=0.125, num_classes=16, seed=0)
    >>> metrics = gl.train(model, load("photocrops", size=16), steps=2, batch_size=8)
    >>> metrics[metrics.split == "train"].groupby("step").source.unique()[1].tolist()
    ['main', 'aux1', 'aux2', 'total']
    >>> metrics[metrics.split == "test"][["step", "source"]].values.tolist()
    [[2, 'main']]
    """
    device = next(model.parameters()).device
    capture = device.type == "cuda" if capture is None else capture
    check_options(optimizer, heads_until)
    _check_capture(capture, device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    updates = _optimizer(optimizer, model, learning_rate, momentum, weight_decay, nesterov, capture)
    path = Path(checkpoint) if checkpoint else None
    records: list[dict[str, Any]] = []
    start, parameters = 0, list(model.parameters())
    autocast = torch.autocast(device.type, torch.bfloat16, mixed_precision, cache_enabled=False)

    def update(images: Tensor, labels: Tensor, weight: float, split: bool) -> Metrics:
        with contextlib.nullcontext() if split else autocast:
            output = model(images)
        losses = weighted_losses(_in_float(output), labels, weight)
        updates.zero_grad(set_to_none=True)
        if split:
            gradients.before_backward(losses)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        metrics = _metrics(output, labels, total)
        if gradients:
            metrics[_NORMS] = (gradients.norms(), None)
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        updates.step()
        return metrics

    take = _Captured(update) if capture else update
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout
        if path and path.exists():
            start, records = _resume(path, model, updates, gradients, device)
        pending: list[tuple[int, Metrics]] = []
        bar = tqdm(range(start, steps), initial=start, total=steps, disable=not progress or None)
        model.train()
        for step in bar:
            if cosine:
                _set_rate(updates, learning_rate * _cosine(step, steps))
            images, labels = data.train_batch(step, batch_size, seed)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            weight = head_weight if step < heads_until * steps else 0.0
            split = gradients is not None and gradients.splits_now()
            metrics = (update if split else take)(images, labels, weight, split)
            if gradients:
                gradients.keep(metrics.pop(_NORMS)[0])
            pending.append((step + 1, metrics))
            at_end = step + 1 == steps
            save = path is not None and (at_end or (step + 1) % save_every == 0)
            test = at_end or (test_every is not None and (step + 1) % test_every == 0)
            if save or test or len(pending) == _READ_EVERY:
                _read(pending, records)
            if test:
                for name in ("test", "train")[: 2 if train_batches else 1]:
                    scores = evaluate(
                        model, data, split=name, batches=train_batches, channels_last=channels_last
                    )
                    name = "test" if name == "test" else "train_eval"
                    records.append({"step": step + 1, "split": name, "source": "main", **scores})
                _check_finite(records)
            if save:
                _save(path, model, updates, gradients, step + 1, records, device)
    return _frame(records)


def check_options(optimizer: str, heads_until: float) -> None:
    """Raise ValueError for what `train` does not take."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} asked; choose one of {', '.join(OPTIMIZERS)}")
    if not 0 <= heads_until <= 1:
        raise ValueError(f"heads_until={heads_until} asked; give a fraction of the steps, 0 to 1")


def _check_capture(capture: bool, device: torch.device) -> None:
    if capture and device.type != "cuda":
        raise ValueError(
            f"capture=True asked, but the model is on {device.type}, which has no CUDA graphs; "
            "leave it out"
        )


_NORMS = "norms"  # of the gradients, which pass through a step beside its metrics


class _Captured:
    """A training step that is recorded once as a CUDA graph, and replayed from then on.

    The first steps run as they are, on a stream of their own, and are part of the training.
    """

    def __init__(self, update: Callable[[Tensor, Tensor, float, bool], Metrics]) -> None:
        self._update, self._graph, self._kept = update, None, None
        self._taken = 0

    def __call__(self, images: Tensor, labels: Tensor, weight: float, split: bool) -> Metrics:
        kept = (images.shape, weight)  # what the graph has baked in
        if self._taken < _WARM_UP:
            self._taken += 1
            return self._aside(images, labels, weight, split)
        if self._kept != kept:
            self._images, self._labels, self._kept = images.clone(), labels.clone(), kept
            self._graph = self._recorded(weight, split)
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return {
            source: (values.clone(), None if scores is None else scores.clone())
            for source, (values, scores) in self._metrics.items()
        }

    def _aside(self, *step: Any) -> Metrics:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            metrics = self._update(*step)
        torch.cuda.current_stream().wait_stream(side)
        return metrics

    def _recorded(self, weight: float, split: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._metrics = self._update(self._images, self._labels, weight, split)
        return graph


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Any, *, split: str = "test", batches: int = 8,
    channels_last: bool = False,
) -> dict[str, float]:  # fmt: skip
    """`loss` (mean cross-entropy in nats) and `accuracy` (fraction) in eval mode.

    On all test images, or with `split="train"` on `batches` batches of up to 256 training images.
    """
    loss = correct = count = 0
    chosen = data.test_batches() if split == "test" else _training_batches(data, batches)
    with in_mode(model, training=False):
        for images, labels in chosen:
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            logits = model(images)
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
            correct = correct + (logits.argmax(1) == labels).sum()
            count += len(labels)
    return {"loss": float(loss) / count, "accuracy": float(correct) / count}


def _training_batches(data: Any, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = 256
    while size > 1:  # a small data set has no batch of this size
        try:
            data.train_batch(0, size, 0)
            break
        except ValueError:
            size //= 2
    for step in range(batches):
        yield data.train_batch(step, size, 0)


def _optimizer(
    name: str, model: nn.Module, rate: float, momentum: float,
    weight_decay: float | Callable[[str], float], nesterov: bool, capture: bool,
) -> torch.optim.Optimizer:  # fmt: skip
    groups, device = _groups(model, weight_decay), next(model.parameters()).device
    # One pass over the memory instead of one per operation.
    fused = {"fused": device.type in ("cpu", "cuda")}
    if capture:  # a graph reads the learning rate from the device
        rate = torch.tensor(rate, device=device)
    if name == "adam":
        return torch.optim.Adam(groups, rate, capturable=capture, **fused)
    return torch.optim.SGD(groups, rate, momentum=momentum, nesterov=nesterov, **fused)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _groups(model: nn.Module, weight_decay: float | Callable[[str], float]) -> list[dict[str, Any]]:
    """Parameters by weight decay, as the optimizer takes them."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay(name) if callable(weight_decay) else weight_decay
        groups.setdefault(decay, []).append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


def _cosine(step: int, steps: int) -> float:
    """The share of the learning rate at a step.

    >>> [round(_cosine(step, 100), 3) for step in (0, 1, 2, 51, 99)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warm = max(1, round(0.02 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _in_float(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    return output._replace(**{k: v.float() for k, v in output._asdict().items() if v is not None})


def _metrics(output: Any, labels: Tensor, total: Tensor) -> Metrics:
    logits = {"main": output} if isinstance(output, Tensor) else output._asdict()
    metrics: Metrics = {}
    with torch.no_grad():
        for source, values in logits.items():
            if values is not None:
                loss = F.cross_entropy(values.float(), labels)
                accuracy = (values.argmax(1) == labels).float().mean()
                metrics["main" if source == "logits" else source] = (loss, accuracy)
    metrics["total"] = (total.detach(), None)
    return metrics


def _read(pending: list, records: list[dict[str, Any]]) -> None:
    """Move metrics from the device to `records`; stop at the first loss that is not finite."""
    for step, metrics in pending:
        for source, (loss, accuracy) in metrics.items():
            records.append(
                {
                    "step": step,
                    "split": "train",
                    "source": source,
                    "loss": float(loss),
                    "accuracy": float("nan") if accuracy is None else float(accuracy),
                }
            )
    pending.clear()
    _check_finite(records)


def _check_finite(records: list[dict[str, Any]]) -> None:
    bad = next((r for r in records if not math.isfinite(r["loss"])), None)
    if bad:
        error = RuntimeError(
            f"the {bad['source']} loss became {bad['loss']} at step {bad['step']}; lower the "
            "learning rate, clip the gradient (clip=1.0) or choose another initialization. The "
            "metrics so far are in this error's `metrics`"
        )
        error.metrics = _frame([r for r in records if r["step"] <= bad["step"]])
        raise error


def _frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(records, columns=list(METRICS))


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: GradientRecorder | None,
    step: int,
    records: list[dict[str, Any]],
    device: torch.device,
) -> None:
    architecture = getattr(model, "architecture", None)
    content = {
        "model": model.state_dict(),
        "architecture": dataclasses.asdict(architecture) if architecture else None,
        "optimizer": optimizer.state_dict(),
        "gradients": gradients.state_dict() if gradients else None,
        "step": step,
        "records": records,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        torch.save(content, part)
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer,
    gradients: GradientRecorder | None, device: torch.device,
) -> tuple[int, list[dict[str, Any]]]:  # fmt: skip
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(content["model"])
        saved = content["optimizer"]
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            # Not what was saved: a graph needs the learning rate on the device, others a number.
            group |= {name: own[name] for name in ("lr", "fused", "capturable") if name in own}
        optimizer.load_state_dict(saved)
        if gradients:
            gradients.load_state_dict(content["gradients"])
        torch.set_rng_state(content["random"])
        if device.type == "cuda" and content["random_cuda"] is not None:
            torch.cuda.set_rng_state(content["random_cuda"], device)
        return content["step"], content["records"]
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(
            f"cannot go on from {path}: {type(error).__name__}: {str(error)[:200]}. Delete the "
            "file to start anew, or give another checkpoint path"
        ) from error
