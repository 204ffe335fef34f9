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

from gnetlab.measure.devices import as_current, fork_random
from gnetlab.measure.devices import deterministic as deterministic_algorithms
from gnetlab.measure.distributed import ALONE, Processes, processes
from gnetlab.measure.gradients import HEAD_WEIGHT, GradientRecorder
from gnetlab.measure.hooks import in_mode
from gnetlab.measure.memory import in_parts
from gnetlab.measure.steps import (
    NORMS,
    Captured,
    Metrics,
    Step,
    make_optimizer,
    rate_share,
    set_rate,
)

METRICS = ("step", "split", "source", "loss", "accuracy")
OPTIMIZERS = ("sgd", "adam")
_READ_EVERY = 20  # steps between transfers of the metrics from the device


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
    deterministic: bool = False,
    distributed: bool = True,
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
                     a GPU (None: on CUDA, but not under torchrun; elsewhere there is none)
    deterministic    equal seeds then give equal results on a GPU too, where PyTorch can; for what
                     it costs, and where it cannot, see `gnetlab.measure.devices.deterministic`
    distributed      under torchrun, share every batch out to its processes
    progress         a bar, on a terminal and in Jupyter only
    checkpoint       file to save to every `save_every` steps and at the end, written atomically;
                     if it exists, training goes on from it, exactly as if never interrupted. The
                     settings must be those of the file; only `steps` may be more, and a cosine and
                     `heads_until` then follow the new number

    Columns: `step` (updates made), `split` (train: the batch of the step; test; train_eval: see
    `train_batches`), `source` (main, aux1, aux2, and total for train), `loss` (unweighted
    cross-entropy in nats; total weighted), `accuracy` (fraction of the images, NA for total). Equal
    seeds give equal results on the CPU.

    **On several GPUs**: `torchrun --nproc-per-node 2 script.py`, where the script calls `train` in
    every process, with model and data on `gnetlab.measure.distributed.own_device()`. Each takes its
    part of the batch of `batch_size` images, dropout and batch norm included, by
    DistributedDataParallel; all get the same metrics and weights, those of one process up to
    rounding, which grows with the steps (on a GPU dropout's masks may be others). The first one
    writes `checkpoint`, from which all go on, with more or fewer processes too: with `torchrun
    --max-restarts 3` a training survives a killed process.

    A batch that is too large for the GPU's memory is taken in two halves, with a warning; the
    frame's `attrs["parts"]` is 2 then, else 1.

    Raises ValueError for unknown options, data without test images and a checkpoint that cannot be
    gone on from, be it of other settings; RuntimeError at a non-finite loss, with the metrics so
    far in its `metrics`, or if half a batch does not fit into memory either.

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
    check_options(optimizer, heads_until, clip)
    _check_recorder(gradients, model)
    among = processes(device) if distributed else ALONE
    _check_batch(batch_size, among)
    _check_every(steps=steps, test_every=test_every, save_every=save_every)
    _check_capture(capture, device, among)
    capture = (device.type == "cuda" and among.size == 1) if capture is None else capture
    if channels_last:
        model.to(memory_format=torch.channels_last)
    updates = make_optimizer(
        optimizer, model, learning_rate, momentum, weight_decay, nesterov, capture
    )
    step_of = Step(among.wrap(model), updates, among, gradients, clip, mixed_precision)
    take = Captured(step_of) if capture else step_of
    path = Path(checkpoint) if checkpoint else None
    settings = {
        "seed": seed, "batch_size": batch_size, "learning_rate": learning_rate,
        "optimizer": optimizer, "cosine": cosine, "clip": clip, "head_weight": head_weight,
        "heads_until": heads_until, "mixed_precision": mixed_precision,
        # Adam has no momentum to differ in; weight decay may be a function.
        **{name: updates.param_groups[0].get(name) for name in ("momentum", "nesterov")},
        "weight_decay": [group["weight_decay"] for group in updates.param_groups],
        "gradients_every": gradients.every if gradients else None,
    }  # fmt: skip
    # numpy's numbers as Python's: a file that holds them is not read again.
    settings = {k: v.item() if hasattr(v, "item") else v for k, v in settings.items()}
    records: list[dict[str, Any]] = []
    start = 0
    with as_current(device), fork_random(device), deterministic_algorithms(deterministic):
        _check_tests(data)
        torch.manual_seed(seed)  # dropout
        if path and path.exists():
            start, step_of.parts, records = _resume(
                path, model, updates, gradients, device, settings, steps
            )
        among.agree(start, f"the step at which checkpoint {path} goes on")
        pending: list[tuple[int, Metrics]] = []
        quiet = not among.first or not progress or None
        model.train()
        for step in tqdm(range(start, steps), initial=start, total=steps, disable=quiet):
            if cosine:
                set_rate(updates, learning_rate * rate_share(step, steps))
            images, labels = map(among.rows, data.train_batch(step, batch_size, seed))
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            weight = head_weight if step < heads_until * steps else 0.0
            split = gradients is not None and gradients.splits_now()
            metrics = (step_of if split else take)(images, labels, weight, split)
            if gradients:
                gradients.keep(metrics.pop(NORMS)[0])
            pending.append((step + 1, metrics))
            at_end = step + 1 == steps
            save = path is not None and (at_end or (step + 1) % save_every == 0)
            test = at_end or (test_every is not None and (step + 1) % test_every == 0)
            if save or test or len(pending) == _READ_EVERY:
                _read(pending, records, among, step_of.parts)
            if test:
                for name in ("test", "train")[: 2 if train_batches else 1]:
                    scores = evaluate(
                        model, data, split=name, batches=train_batches,
                        channels_last=channels_last, among=among,
                    )  # fmt: skip
                    name = "test" if name == "test" else "train_eval"
                    records.append({"step": step + 1, "split": name, "source": "main", **scores})
                _check_finite(records, step_of.parts)
            if save:
                if among.first:
                    done = step + 1, step_of.parts
                    _save(path, model, updates, gradients, *done, records, device, settings)
                among.wait()
    return _frame(records, step_of.parts)


def check_options(optimizer: str, heads_until: float, clip: float | None) -> None:
    """Raise ValueError for what `train` does not take."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r} asked; choose one of {', '.join(OPTIMIZERS)}")
    if not 0 <= heads_until <= 1:
        raise ValueError(f"heads_until={heads_until} asked; give a fraction of the steps, 0 to 1")
    if clip is not None and not clip > 0:  # torch would turn the gradient round, or to 0
        raise ValueError(
            f"clip={clip} asked; give the largest norm of the gradient, more than 0, or None"
        )


def _check_recorder(gradients: GradientRecorder | None, model: nn.Module) -> None:
    if gradients and gradients.model not in (model, getattr(model, "_orig_mod", None)):
        raise ValueError(
            "the recorder given as gradients= is of another model than the one to train; give "
            "GradientRecorder(model)"
        )


def _check_batch(batch_size: int, among: Processes) -> None:
    if batch_size % among.size:
        raise ValueError(
            f"batch_size={batch_size} asked, for {among.size} processes with equal parts of it; "
            f"give a multiple of {among.size}"
        )


def _check_every(**asked: int | None) -> None:
    for name, steps in asked.items():
        if steps is not None and steps < 1:
            last = ", or None for a test at the end only" if name == "test_every" else ""
            raise ValueError(f"{name}={steps} asked; give a number of steps from 1{last}")


def _check_tests(data: Any) -> None:
    """Before training: what is found after it costs all its steps."""
    if next(iter(data.test_batches()), None) is None:
        raise ValueError(
            f"test_batches() of {type(data).__name__} gives nothing to test on after the training; "
            "let it give at least one pair of images and labels, if need be of the training images"
        )


def _check_capture(capture: bool | None, device: torch.device, among: Processes) -> None:
    if capture and device.type != "cuda":
        raise ValueError(
            f"capture=True asked, but the model is on {device.type}, which has no CUDA graphs; "
            "leave it out"
        )
    if capture and among.size > 1:
        raise ValueError(
            f"capture=True asked, with {among.size} processes whose gradients meet in every step; "
            "leave it out"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Any, *, split: str = "test", batches: int = 8,
    channels_last: bool = False, among: Processes = ALONE,
) -> dict[str, float]:  # fmt: skip
    """`loss` (mean cross-entropy in nats) and `accuracy` (fraction) in eval mode.

    On all test images, or with `split="train"` on `batches` batches of up to 256 training images;
    a batch that does not fit into memory goes through in halves. `among` several processes, each of
    which calls this, the images are shared out.
    """

    def scores(rows: slice) -> Tensor:
        logits = model(images[rows])
        loss = F.cross_entropy(logits, labels[rows], reduction="sum")
        correct = (logits.argmax(1) == labels[rows]).sum()
        return torch.stack([loss, correct.to(loss)])

    if split not in ("test", "train"):
        raise ValueError(f"split={split!r} asked; choose 'test' or 'train'")
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    sums, count = torch.zeros(2, device=device), 0
    chosen = data.test_batches() if split == "test" else _training_batches(data, batches)
    with in_mode(model, training=False):
        for images, labels in chosen:
            images, labels = images[among.rank :: among.size], labels[among.rank :: among.size]
            if not len(labels):
                continue
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            sums = sum(in_parts(scores, len(labels)), sums)
            count += len(labels)
    loss, correct, count = among.sum(torch.cat([sums, sums.new_tensor([count])])).tolist()
    if not count:
        raise ValueError(
            f"{split=}, {batches=} asked of {type(data).__name__}, which gave no image; give data "
            "with images, and at least one batch"
        )
    return {"loss": loss / count, "accuracy": correct / count}


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


def _read(pending: list, records: list[dict[str, Any]], among: Processes, parts: int) -> None:
    """Move metrics from the device to `records`, as means over the processes.

    Stops at the first loss that is not finite; all processes do.
    """
    rows = [(step, source, *pair) for step, found in pending for source, pair in found.items()]
    # Everything at once: one message, one transfer. All have equal parts of the batch.
    pairs = torch.stack([torch.stack([loss, loss if s is None else s]) for *_, loss, s in rows])
    means = among.average(pairs).tolist()
    for (step, source, _, scores), (loss, accuracy) in zip(rows, means, strict=True):
        accuracy = math.nan if scores is None else accuracy
        records.append(
            {"step": step, "split": "train", "source": source, "loss": loss, "accuracy": accuracy}
        )
    pending.clear()
    _check_finite(records, parts)


def _check_finite(records: list[dict[str, Any]], parts: int) -> None:
    bad = next((r for r in records if not math.isfinite(r["loss"])), None)
    if bad:
        error = RuntimeError(
            f"the {bad['source']} loss became {bad['loss']} at step {bad['step']}; lower the "
            "learning rate, clip the gradient (clip=1.0) or choose another initialization. The "
            "metrics so far are in this error's `metrics`"
        )
        error.metrics = _frame([r for r in records if r["step"] <= bad["step"]], parts)
        raise error


def _frame(records: list[dict[str, Any]], parts: int) -> pd.DataFrame:
    frame = pd.DataFrame(records, columns=list(METRICS))
    frame.attrs["parts"] = parts
    return frame


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: GradientRecorder | None,
    step: int,
    parts: int,
    records: list[dict[str, Any]],
    device: torch.device,
    settings: dict[str, Any],
) -> None:
    architecture = getattr(model, "architecture", None)
    content = {
        "model": model.state_dict(),
        "architecture": dataclasses.asdict(architecture) if architecture else None,
        "optimizer": optimizer.state_dict(),
        "gradients": gradients.state_dict() if gradients else None,
        "step": step,
        "parts": parts,
        "settings": settings,
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
    gradients: GradientRecorder | None, device: torch.device, settings: dict[str, Any], steps: int,
) -> tuple[int, int, list[dict[str, Any]]]:  # fmt: skip
    """Steps done, parts that a batch is taken in, and records."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        done, before = content["step"], content.get("settings", {})  # older files have none
    except Exception as error:  # torch.load raises many kinds
        raise _refused(path, f"{type(error).__name__}: {str(error)[:200]}") from error
    other = [name for name, value in before.items() if settings.get(name) != value]
    if other:
        was, asked = (", ".join(f"{n}={of.get(n)!r}" for n in other) for of in (before, settings))
        raise _refused(path, f"it was trained with {was}, but {asked} asked")
    if done > steps:
        raise _refused(path, f"it was trained for {done} steps, but steps={steps} asked")
    try:
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
        return done, content["parts"], content["records"]
    except Exception as error:  # so do they
        raise _refused(path, f"{type(error).__name__}: {str(error)[:200]}") from error


def _refused(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"cannot go on from {path}: {reason}. Delete the file to start anew, or give another "
        "checkpoint path"
    )
