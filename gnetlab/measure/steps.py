"""What one step of `gnetlab.measure.loop.train` does.

`Step`      forward, backward, clipping, update; in two halves where a whole one does not fit
`Captured`  the same, recorded as a CUDA graph
`make_optimizer()`, `set_rate()`, `rate_share()`  how far a step goes
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnetlab.measure.distributed import Processes
from gnetlab.measure.gradients import GradientRecorder, logits_by_source, weighted_losses
from gnetlab.measure.memory import out_of_memory, release_memory

NORMS = "norms"  # of the gradients, which pass through a step beside its metrics
_WARM_UP = 3  # steps before one is captured, as torch's notes on CUDA graphs ask
Metrics = dict[str, tuple[Tensor, Tensor | None]]


@dataclass
class Step:
    """One update of a model by a batch; the metrics are of this process's images.

    A batch that does not fit into memory is taken again in two halves, whose gradients add up to
    the same, and so is every later one. What the failed attempt drew for dropout and added to batch
    norm's running statistics stays: one step of many.
    """

    model: nn.Module  # as it runs: wrapped, under torchrun
    optimizer: torch.optim.Optimizer
    processes: Processes
    gradients: GradientRecorder | None
    clip: float | None
    mixed_precision: bool
    parts: int = 1

    def __call__(self, images: Tensor, labels: Tensor, weight: float, split: bool) -> Metrics:
        metrics = self._backward(images, labels, weight, split)
        if self.gradients:
            metrics[NORMS] = (self.gradients.norms(), None)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self._update()
        return metrics

    def _update(self) -> None:
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise RuntimeError(
                f"what {type(self.optimizer).__name__} keeps beside weights and gradients does not "
                f"fit into memory ({str(error)[:200]}), and a smaller batch would not change that. "
                "Try optimizer='sgd' with momentum=0, a narrower network, or a larger GPU"
            ) from error

    def _backward(self, images: Tensor, labels: Tensor, weight: float, split: bool) -> Metrics:
        self.optimizer.zero_grad(set_to_none=True)
        try:
            found = []
            for part, of in zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True):
                share = len(of) / len(labels)
                found.append((share, self._part(part, of, weight, split, share)))
            return _mean(found)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._halve(len(images), error)
        release_memory()  # only here is the error gone, which held on to all that was allocated
        return self._backward(images, labels, weight, split)

    def _part(
        self, images: Tensor, labels: Tensor, weight: float, split: bool, share: float
    ) -> Metrics:
        autocast = torch.autocast(
            images.device.type, torch.bfloat16, self.mixed_precision and not split,
            cache_enabled=False,
        )  # fmt: skip
        with autocast, self.processes.whole_batch():
            output = self.model(images)
        losses = weighted_losses(_in_float(output), labels, weight)
        if split:
            self.gradients.before_backward(losses, self.processes.average)
        total = torch.stack(list(losses.values())).sum()
        (share * total).backward()
        return _metrics(output, labels, total)

    def _halve(self, count: int, error: Exception) -> None:
        """Take two parts from now on; RuntimeError where that does not help."""
        reason = None
        if self.parts > 1 or count == 1:
            reason = "half of it does not fit either"
        elif self.processes.size > 1:
            reason = "processes that wait for each other cannot take a step again"
        elif self.gradients and self.gradients.every:
            reason = "gradients that are split by source need the whole batch"
        elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            reason = "a step that is recorded as a CUDA graph cannot be taken again (capture=False)"
        asked = f"a batch of {count} images does not fit into memory ({str(error)[:200]})"
        if reason:
            raise RuntimeError(
                f"{asked}, and {reason}. Try a smaller batch_size, mixed_precision=True, smaller "
                "images, a narrower network, or torchrun on more GPUs"
            ) from error
        warnings.warn(
            f"{asked}: it is taken in two halves from now on, which gives the same gradient, but "
            "batch norm sees half batches. A smaller batch_size avoids this",
            stacklevel=5,
        )
        self.parts = 2


def _mean(parts: list[tuple[float, Metrics]]) -> Metrics:
    """Metrics of the whole batch, from each part's share of it and metrics."""
    if len(parts) == 1:
        return parts[0][1]

    def mean(source: str, which: int) -> Tensor:
        return torch.stack([share * metrics[source][which] for share, metrics in parts]).sum(0)

    return {
        source: (mean(source, 0), None if accuracy is None else mean(source, 1))
        for source, (_, accuracy) in parts[0][1].items()
    }


def _in_float(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    logits_by_source(output)  # refuses what is no named tuple
    return output._replace(**{k: v.float() for k, v in output._asdict().items() if v is not None})


def _metrics(output: Any, labels: Tensor, total: Tensor) -> Metrics:
    metrics: Metrics = {}
    with torch.no_grad():
        for source, values in logits_by_source(output).items():
            loss = F.cross_entropy(values.float(), labels)
            accuracy = (values.argmax(1) == labels).float().mean()
            metrics[source] = (loss, accuracy)
    metrics["total"] = (total.detach(), None)
    return metrics


class Captured:
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
        # A stream of its own: torch's default one stays on the GPU of the process's first graph.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            self._metrics = self._update(self._images, self._labels, weight, split)
        return graph


def make_optimizer(
    name: str, model: nn.Module, rate: float, momentum: float,
    weight_decay: float | Callable[[str], float], nesterov: bool, capture: bool,
) -> torch.optim.Optimizer:  # fmt: skip
    """SGD or Adam as `train` takes them; for `capture` as a CUDA graph can run them."""
    groups, device = _groups(model, weight_decay), next(model.parameters()).device
    rate, momentum = float(rate), float(momentum)  # numpy's too: checkpoints hold none of those
    # One pass over the memory instead of one per operation.
    fused = {"fused": device.type in ("cpu", "cuda")}
    if capture:  # a graph reads the learning rate from the device
        rate = torch.tensor(rate, device=device)
    if name == "adam":
        return torch.optim.Adam(groups, rate, capturable=capture, **fused)
    return torch.optim.SGD(groups, rate, momentum=momentum, nesterov=nesterov, **fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Change the learning rate of every group, where it is."""
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
        groups.setdefault(float(decay), []).append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


def rate_share(step: int, steps: int) -> float:
    """The share of the learning rate at a step, under a cosine.

    >>> [round(rate_share(step, 100), 3) for step in (0, 1, 2, 51, 99)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warm = max(1, round(0.02 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
