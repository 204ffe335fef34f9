"""One training by several processes, each with a share of every batch: under `torchrun`.

`processes()`   those of this training; `ALONE` if this is the only one
`own_device()`  the device of this process: its own GPU, where there are some
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from gnetlab.measure.devices import resolve_device

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


@dataclass(frozen=True)
class Processes:
    """`size` processes in step with each other, of which this is number `rank`.

    All of them must call `wrap`, `sum`, `average`, `agree`, `wait` and `shared_out`, in the same
    order. A single one waits for nobody.
    """

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with the first process's weights; its gradients will be everyone's mean."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model)

    def rows(self, batch: Tensor) -> Tensor:
        """This process's part of a batch, whose length `size` divides."""
        return batch.chunk(self.size)[self.rank]

    def whole_batch(self) -> contextlib.AbstractContextManager:
        """Within it, dropout and batch norm of `rows` are as for the whole batch.

        Dropout needs equal random states; its masks are then those of one process, on the CPU bit
        for bit. Batch norm takes all processes' statistics, of which gradients know.
        """
        return contextlib.nullcontext() if self.size == 1 else _WholeBatch(self)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes; its gradient is the sum of theirs."""
        return tensor if self.size == 1 else _Sum.apply(tensor)

    def average(self, tensor: Tensor) -> Tensor:
        """Mean over the processes, without gradient."""
        return tensor if self.size == 1 else self.sum(tensor.detach()) / self.size

    def agree(self, number: int, about: str) -> None:
        """Raise ValueError unless all have the same number."""
        numbers: list[Any] = [number] * self.size
        if self.size > 1:
            dist.all_gather_object(numbers, number)
        if len(set(numbers)) > 1:
            raise ValueError(
                f"{about} differs between processes: {numbers}; give all of them the same, on a "
                "disk that all of them see"
            )

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def shared_out(self, items: list[Any]) -> Iterator[list[Any]]:
        """Within it, this process's part of the first one's items; it ends when all are done."""
        if self.size == 1:
            yield items
            return
        # gloo also beside nccl: it can wait for hours. After an error torchrun ends the others.
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
        lists = [items]
        dist.broadcast_object_list(lists, src=0, group=group)
        yield lists[0][self.rank :: self.size]
        dist.barrier(group)


ALONE = Processes(0, 1)


def processes(device: torch.device) -> Processes:
    """Those that `torchrun` started with this one; they are connected if they are not yet.

    By nccl on CUDA and by gloo elsewhere. Raises ValueError if `device` is another process's GPU.
    """
    if started() == 1 and not (dist.is_available() and dist.is_initialized()):
        return ALONE
    if not dist.is_initialized():
        if device.type == "cuda":
            if device != own_device("cuda"):
                raise ValueError(
                    f"the model of process {_local_rank()} is on {device}, and each process needs "
                    f"a GPU of its own, here {own_device('cuda')}: move model and data to what "
                    "gnetlab.measure.distributed.own_device() gives"
                )
            torch.cuda.set_device(device)
        _connect("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_disconnect)
    return Processes(dist.get_rank(), dist.get_world_size())


def started() -> int:
    """How many processes `torchrun` has started, as its environment says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: str | torch.device = "auto") -> torch.device:
    """`resolve_device`; under `torchrun`, "auto" and "cuda" are this process's own GPU."""
    name = str(device)
    if name in ("auto", "cuda") and started() > 1 and torch.cuda.device_count():
        name = f"cuda:{_local_rank() % torch.cuda.device_count()}"  # nothing is begun on the first
    return resolve_device(name)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def _connect(backend: str) -> None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    # torchrun's store outlives a restart, and holds the addresses of processes that are gone
    # (pytorch issue 135712): each attempt has names of its own.
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(None, gradient)


class _WholeBatch(TorchFunctionMode):
    # torch's SyncBatchNorm would need a GPU, and modules of its own in place of the model's.

    def __init__(self, among: Processes) -> None:
        super().__init__()
        self._among = among

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self, func: Callable, images: Tensor, p: float = 0.5, training: bool = True,
        inplace: bool = False,
    ) -> Tensor:  # fmt: skip
        if not training:
            return func(images, p, training, inplace)
        whole = torch.ones_like(torch.cat([images.detach()] * self._among.size))
        return images * self._among.rows(func(whole, p))

    def _batch_norm(
        self, images: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
        weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
        momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if not training:
            return F.batch_norm(
                images, running_mean, running_var, weight, bias, training, momentum, eps
            )
        values = images.to(torch.promote_types(images.dtype, torch.float32))
        mean, variance = self._statistics(values)
        if running_mean is not None:
            with torch.no_grad():
                count = values.numel() // len(mean) * self._among.size
                running_mean.lerp_(mean, momentum)
                running_var.lerp_(variance * (count / (count - 1)), momentum)
        scale = torch.rsqrt(variance + eps)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        shape = [1, -1] + [1] * (images.dim() - 2)
        return (values * scale.view(shape) + shift.view(shape)).to(images.dtype)

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel over all processes' values; one message."""
        over = [d for d in range(values.dim()) if d != 1]
        variance, mean = torch.var_mean(values, over, correction=0)
        own = torch.zeros(self._among.size, 1, 1, dtype=values.dtype, device=values.device)
        own[self._among.rank] = 1
        means, variances = self._among.sum(own * torch.stack([mean, variance])).unbind(1)
        # The parts are of equal size.
        return means.mean(0), variances.mean(0) + means.var(0, correction=0)
