"""A run that is told to stop saves where it stands first."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from trainkit.launch.console import log
from trainkit.launch.process.interruption import Interrupted
from trainkit.task.base import Task

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME = 0.5  # seconds: launchers hand on to a process what its process group has got already


class Preemption(Callback):
    """After SIGTERM or SIGUSR1 all ranks save at the end of the optimizer step in progress, and the run ends.

    Status "interrupted", exit code 128 + n as a shell says it (143, 138); resume= goes on as if nothing had happened.
    Where a validation follows the step, it comes first (callbacks/checkpoint.py says why); a signal during a validation
    counts when it is over. Before the first step and after the last one there is nothing to save and the run ends at
    once, as it does after a second signal, half a second later or more, which is left to the system.

    Several ranks agree, as each may be told at another moment or only one of them: after every step the number of the
    signal is reduced over a gloo group of their own, from memory the device does not see, and looked at one step later,
    by when it is long done. So nothing waits for a device or for the network, and the step that they save is the one
    after the step in which the first was told. Alone, a process looks at one attribute.

    Lightning's handlers are off: its SIGTERM broadcasts in the middle of whatever other collective is going on and ends
    the run between two micro-batches, it broadcasts and fetches a flag from the device before every micro-batch, and on
    SLURM its SIGUSR1 saves a file of another kind.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal that this process has got
        self.stopping = 0  # the one that all ranks know of, and stop for
        self._since = 0.0
        self._training = False
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._flag: torch.Tensor | None = None
        self._agreeing: Any = None  # the reduction under way

    def setup(self, trainer: Trainer, pl_module: Task, stage: str) -> None:  # type: ignore[override]
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may listen
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._before = {number: signal.signal(number, self._told) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        if trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")
        self._training = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if trainer.fit_loop._should_accumulate():
            return
        if self._group is None:
            self.stopping = self.received
        else:
            self._agreed()
            if not self.stopping:
                self._flag = torch.tensor([self.received])
                self._agreeing = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if self.stopping and trainer.is_global_zero:
            log.info("%s: the run ends after step %d", signal.Signals(self.stopping).name, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        if self._training and self._group is None:
            self.stopping = self.received
        elif self._training:
            self._agreed()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self._end(trainer)  # what was to be done after the step is done, and callbacks/checkpoint.py has saved

    def on_train_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._training = False
        self._agreed()

    def on_test_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._end(trainer)

    def teardown(self, trainer: Trainer, pl_module: Task, stage: str) -> None:  # type: ignore[override]
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: Task, exception: BaseException) -> None:  # type: ignore[override]
        self._restore()

    def _agreed(self) -> None:
        """Takes up what the ranks have said after the step before."""
        if self._agreeing is not None and self._flag is not None:
            self._agreeing.wait()
            self._agreeing = None
            self.stopping = int(self._flag[0])

    def _told(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received and now - self._since > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received, self._since = number, now
            if not self._training:
                raise Interrupted(number, "came when there was nothing to save")

    def _end(self, trainer: Trainer) -> None:
        if self.stopping:
            saved = ", which is saved" if trainer.checkpoint_callback is not None else ""
            raise Interrupted(self.stopping, f"stopped it after step {trainer.global_step}{saved}")

    def _restore(self) -> None:
        self._training = False
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
