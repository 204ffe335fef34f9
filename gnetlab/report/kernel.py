"""Kernels that are forked from a process which has loaded what notebooks import.

A cold kernel spends seconds on importing torch, pandas and matplotlib; a forked one has them. It
is still a kernel of ipykernel's in a process of its own. Linux only: macOS's libraries do not bear
a fork, Windows has none; there, and wherever something cannot be forked, kernels start cold.

`fork()`   a kernel-to-be, which waits for its connection file
`manager()`  the class that makes papermill use it
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
import uuid
from multiprocessing import resource_tracker
from typing import Any

COLD = "GNETLAB_COLD_KERNEL"  # set, every kernel starts as Jupyter starts it
_PDEATHSIG, _SUBREAPER = 1, 36  # of prctl(2)


def may_fork() -> bool:
    """Whether kernels are to be forked on this system."""
    return sys.platform == "linux" and COLD not in os.environ


def can_fork() -> bool:
    """Whether this process may be forked: CUDA does not bear it, once it was used."""
    torch = sys.modules.get("torch")
    return may_fork() and (torch is None or not torch.cuda.is_initialized())


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose own parent has ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


class Forked:
    """A kernel-to-be; behaves as the `subprocess.Popen` that jupyter_client expects."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int, order: int) -> None:
        self.pid, self._order, self.returncode = pid, order, None

    def become(self, arguments: list[str], environment: dict[str, str], folder: str) -> None:
        """Tell the process to become a kernel with these arguments."""
        with os.fdopen(self._order, "w") as pipe:
            json.dump({"argv": arguments, "env": environment, "cwd": folder}, pipe)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        return self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork() -> Forked:
    """Fork a kernel-to-be; call this while the process has one thread, and no event loop."""
    parent = os.getpid()
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read)
        return Forked(pid, write)
    code = 1
    try:
        os.close(write)
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:  # else it ended before that call
            code = _kernel(read)
    except BaseException:  # nothing of the parent's may run in here
        traceback.print_exc()
    finally:
        os._exit(code)


def _kernel(read: int) -> int:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with os.fdopen(read) as pipe:
        order = pipe.read()
    if not order:  # not needed
        return 0
    order = json.loads(order)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    if "torch" in sys.modules and "GNETLAB_CORES" in os.environ:  # OMP_NUM_THREADS comes too late
        sys.modules["torch"].set_num_threads(int(os.environ["GNETLAB_CORES"]))
    # One of its own, as a cold kernel has: the runner's would speak of what a kernel left behind.
    tracker = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None
    from ipykernel.kernelapp import IPKernelApp

    sys.argv = ["ipykernel_launcher", *order["argv"]]
    IPKernelApp.launch_instance(argv=order["argv"])
    return 0


def _is_ours(command: list[str]) -> bool:
    """Not that of a user's own specification, which starts what it says."""
    return command[0] == sys.executable and "ipykernel_launcher" in command


def manager(kernel: Forked) -> type:
    """A kernel manager whose kernel is `kernel`."""
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_client.provisioning import LocalProvisioner

    class ForkedProvisioner(LocalProvisioner):
        async def pre_launch(self, **options: Any) -> dict[str, Any]:
            if _is_ours(self.parent.format_kernel_cmd()):
                # A TCP port that is free when it is chosen may be another's when the kernel binds
                # it. A name is nobody else's; with @ there is no file of it (Linux).
                self.parent.transport, self.parent.ip = "ipc", f"@gnetlab-{uuid.uuid4()}"
            return await super().pre_launch(**options)

        async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
            if not _is_ours(cmd):
                return await super().launch_kernel(cmd, **options)
            arguments = cmd[cmd.index("ipykernel_launcher") + 1 :]
            kernel.become(arguments, options["env"], options.get("cwd") or os.getcwd())
            self.process, self.pid, self.pgid = kernel, kernel.pid, kernel.pid
            return self.connection_info

    class ForkedManager(AsyncKernelManager):
        async def _async_pre_start_kernel(self, **options: Any) -> Any:
            self.provisioner = ForkedProvisioner(
                kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self
            )
            return await super()._async_pre_start_kernel(**options)

    return ForkedManager
