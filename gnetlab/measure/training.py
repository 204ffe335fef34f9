"""The small, seeded training loop that the experiments share.

`train()`     SGD with momentum on the weighted losses; metrics as a frame; resumable
`compare()`   several variants of a network, each from several seeds
`evaluate()`  loss and accuracy on a data set's test images
`escape_steps()`  when each run left the plateau at chance
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from gnetlab.measure.gradients import HEAD_WEIGHT, weighted_losses
from gnetlab.measure.hooks import in_mode
from gnetlab.net.model import googlenet

METRICS = ("step", "split", "source", "loss", "accuracy")
_READ_EVERY = 20  # steps between transfers of the metrics from the device


def train(
    model: nn.Module,
    data: Any,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float | Callable[[str], float] = 0.0,
    nesterov: bool = False,
    cosine: bool = False,
    clip: float | None = None,
    head_weight: float = HEAD_WEIGHT,
    test_every: int | None = None,
    seed: int = 0,
    mixed_precision: bool = False,
    channels_last: bool = False,
    checkpoint: str | Path | None = None,
    save_every: int = 500,
    progress: bool = True,
) -> pd.DataFrame:
    """Train `model` in place, on its own device, and return its metrics.

    data             a data set of `gnetlab.net.data` on the same device
    weight_decay     for all parameters, or a function of a parameter's dotted name
    nesterov         Nesterov's momentum
    cosine           let the learning rate rise over the first 2% of the steps, then fall to 0 as
                     half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)
    clip             largest norm of the whole gradient (None: no clipping)
    head_weight      weight of each auxiliary loss (0.3 in the paper)
    test_every       steps between evaluations on the test set (None: at the end only)
    mixed_precision  bfloat16 autocast
    progress         a bar, on a terminal and in Jupyter only
    checkpoint       file to save to every `save_every` steps and at the end, written atomically;
                     if it exists, training goes on from it, exactly as if never interrupted

    Columns: `step` (updates made), `split` (train, test), `source` (main, aux1, aux2, and total
    for train), `loss` (unweighted cross-entropy in nats; total weighted), `accuracy` (fraction of
    the batch, NA for total). Equal seeds give equal results on the CPU.

    Raises RuntimeError at a non-finite loss, with the metrics so far in its `metrics`.
    """
    device = next(model.parameters()).device
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        _groups(model, weight_decay), learning_rate, momentum=momentum, nesterov=nesterov
    )
    path = Path(checkpoint) if checkpoint else None
    records: list[dict[str, Any]] = []
    start = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout
        if path and path.exists():
            start, records = _resume(path, model, optimizer, device)
        autocast = torch.autocast(device.type, torch.bfloat16, mixed_precision)
        pending: list[tuple[int, dict[str, tuple[Tensor, Tensor | None]]]] = []
        bar = tqdm(range(start, steps), initial=start, total=steps, disable=not progress or None)
        for step in bar:
            model.train()
            if cosine:
                rate = learning_rate * _cosine(step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
            images, labels = data.train_batch(step, batch_size, seed)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast:
                output = model(images)
            losses = weighted_losses(_in_float(output), labels, head_weight)
            total = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            pending.append((step + 1, _metrics(output, labels, total)))
            at_end = step + 1 == steps
            save = path is not None and (at_end or (step + 1) % save_every == 0)
            test = at_end or (test_every is not None and (step + 1) % test_every == 0)
            if save or test or len(pending) == _READ_EVERY:
                _read(pending, records)
            if test:
                scores = evaluate(model, data, channels_last=channels_last)
                records.append({"step": step + 1, "split": "test", "source": "main", **scores})
                _check_finite(records)
            if save:
                _save(path, model, optimizer, step + 1, records, device)
    return _frame(records)


def compare(
    variants: Mapping[str, Mapping[str, Any]],
    data: Any,
    seeds: Iterable[int],
    *,
    network: Mapping[str, Any],
    **options: Any,
) -> pd.DataFrame:
    """`train` every variant from every seed.

    `variants` map a label to arguments of `googlenet`, on top of the shared `network`; `options`
    go to `train`. The seed decides the weights, the batches and dropout.

    Columns: those of `train`, and `variant`, `seed`.
    """
    if "checkpoint" in options:
        raise ValueError("compare() trains several networks; one checkpoint cannot serve them all")
    frames = []
    for (variant, changes), seed in product(variants.items(), seeds):
        model = googlenet(**{**network, **changes}, seed=seed).to(data.device)
        metrics = train(model, data, seed=seed, **options)
        frames.append(metrics.assign(variant=variant, seed=seed))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def evaluate(model: nn.Module, data: Any, *, channels_last: bool = False) -> dict[str, float]:
    """`loss` (mean cross-entropy in nats) and `accuracy` (fraction) on the test images."""
    loss = correct = count = 0
    with in_mode(model, training=False):
        for images, labels in data.test_batches():
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            logits = model(images)
            loss = loss + F.cross_entropy(logits, labels, reduction="sum")
            correct = correct + (logits.argmax(1) == labels).sum()
            count += len(labels)
    return {"loss": float(loss) / count, "accuracy": float(correct) / count}


def escape_steps(metrics: pd.DataFrame, classes: int, *, smooth: int = 10) -> pd.DataFrame:
    """When each run of `compare` left the plateau at chance.

    Columns: `variant`, `seed`, `escape_step` (first step at which the main training loss,
    averaged over `smooth` steps, is below 95% of chance, ln classes; NA if it never is),
    `test_loss` (nats), `test_accuracy` (fraction), both at the end.
    """
    rows = []
    for (variant, seed), run in metrics.groupby(["variant", "seed"], sort=False):
        main = run[(run.split == "train") & (run.source == "main")].set_index("step")
        loss = main.loss.rolling(smooth).mean()
        below = loss.index[loss < 0.95 * math.log(classes)]
        test = run[run.split == "test"].iloc[-1]
        rows.append(
            {
                "variant": variant,
                "seed": seed,
                "escape_step": below[0] if len(below) else pd.NA,
                "test_loss": test.loss,
                "test_accuracy": test.accuracy,
            }
        )
    return pd.DataFrame(rows).astype({"escape_step": "Int64"})


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


def _metrics(output: Any, labels: Tensor, total: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
    logits = {"main": output} if isinstance(output, Tensor) else output._asdict()
    metrics: dict[str, tuple[Tensor, Tensor | None]] = {}
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
        error.metrics = _frame(records)
        raise error


def _frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(records, columns=list(METRICS))


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    records: list[dict[str, Any]],
    device: torch.device,
) -> None:
    architecture = getattr(model, "architecture", None)
    content = {
        "model": model.state_dict(),
        "architecture": dataclasses.asdict(architecture) if architecture else None,
        "optimizer": optimizer.state_dict(),
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
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, list[dict[str, Any]]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        if device.type == "cuda" and content["random_cuda"] is not None:
            torch.cuda.set_rng_state(content["random_cuda"], device)
        return content["step"], content["records"]
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(
            f"cannot go on from {path}: {type(error).__name__}: {str(error)[:200]}. Delete the "
            "file to start anew, or give another checkpoint path"
        ) from error
