"""Batches ahead of time: read from disk by a thread, in pinned memory, copied while a GPU works."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DEPTH = 2
"""Batches that are ready or in the making while one is in use."""

Slot = dict[str, Tensor]
"""Host tensors that batches are put in again and again; empty: every batch has tensors anew."""


class Sampler(Protocol):
    """What makes batches: `StreamSampler`, or another whose batches are functions of `step`."""

    def batch(self, step: int, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]: ...


class _Made(NamedTuple):
    slot: Slot
    batch: dict[str, Tensor]


class _Sent(NamedTuple):
    """A batch on its way to the GPU: `slot` is free again once `event` has happened."""

    slot: Slot
    batch: dict[str, Tensor]
    event: torch.cuda.Event


class Prefetcher:
    """Batches 0, 1, 2 ... of a sampler on the CPU, made ahead and handed over on `device`.

    A thread fills pinned buffers, `DEPTH` ahead. On a GPU the copy of the next batch is on its way,
    on a stream of its own, while the step that uses this one runs. The thread calls nothing of
    CUDA, so it cannot disturb the capture of a graph. Batches are those of `sampler.batch(step)`
    whatever the timing; another than the next step may be asked for and starts the thread anew.

    Use as a context manager, or `close` it.

    Args:
        sampler: makes batches of CPU tensors.
        device: where the batches go.
        stop: no batch from this step on will be asked for.
        threaded: make batches ahead. False: when they are asked for, which is right on a CPU for
            data in memory, where the thread would compete with the training.
        reuse: buffers are filled again and again, as pinned ones are; by default on a GPU.
    """

    def __init__(
        self,
        sampler: Sampler,
        device: str | torch.device = "cpu",
        *,
        stop: int,
        threaded: bool = True,
        reuse: bool | None = None,
    ) -> None:
        self.sampler, self.device, self.stop = sampler, torch.device(device), stop
        self.threaded, cuda = threaded, self.device.type == "cuda"
        self._reuse, self._copies = cuda if reuse is None else reuse, None
        if cuda:
            self._copies = torch.cuda.Stream(self.device)
        self._thread: threading.Thread | None = None
        self._next = -1
        self._sent: list[_Sent] = []
        self._waited, self._since = 0.0, time.perf_counter()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of `step` on the device.

        Raises:
            Exception: whatever the sampler raised.
        """
        began = time.perf_counter()
        if not self.threaded:
            made = {k: v.to(self.device) for k, v in self.sampler.batch(step).items()}
        else:
            made = self._ahead(step)
        self._waited += time.perf_counter() - began
        return made

    def wait_share(self) -> float:
        """Share of the time since the last call, in [0, 1], that `batch` took of its caller."""
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return min(share, 1.0)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._closed.set()
            self._free.put({})  # whatever it waits for
            self._thread.join()
            self._thread = None
        for sent in self._sent:
            sent.event.synchronize()  # its pinned memory is about to go
        self._sent = []

    def _ahead(self, step: int) -> dict[str, Tensor]:
        if step != self._next or self._thread is None:
            self._start(step)
        self._next = step + 1
        if self._copies is None:
            made = self._receive()
            batch = {k: v.clone() for k, v in made.batch.items()} if self._reuse else made.batch
            self._free.put(made.slot)
            return batch
        sent = self._sent.pop() if self._sent else self._send(self._receive(), self._copies)
        sent.event.synchronize()  # sent during the step before, so this takes no time
        self._free.put(sent.slot)
        stream = torch.cuda.current_stream(self.device)
        for tensor in sent.batch.values():
            tensor.record_stream(stream)
        if self._next < self.stop and not self._ready.empty():
            self._sent.append(self._send(self._receive(), self._copies))
        return sent.batch

    def _send(self, made: _Made, stream: torch.cuda.Stream) -> _Sent:
        with torch.cuda.stream(stream):
            batch = {k: v.to(self.device, non_blocking=True) for k, v in made.batch.items()}
            event = torch.cuda.Event()
            event.record(stream)
        return _Sent(made.slot, batch, event)

    def _receive(self) -> _Made:
        made = self._ready.get()
        if isinstance(made, BaseException):
            self.close()
            raise made
        return made

    def _start(self, step: int) -> None:
        self.close()
        self._closed = threading.Event()
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Made | BaseException] = queue.SimpleQueue()
        like = self.sampler.batch(step) if self._reuse else {}
        for _ in range(DEPTH + 1 if self._reuse else DEPTH):
            pin = self._copies is not None
            self._free.put({k: torch.empty_like(v, pin_memory=pin) for k, v in like.items()})
        # A daemon, so that a process that is killed elsewhere does not wait for it.
        self._thread = threading.Thread(
            target=_produce,
            args=(self.sampler, range(step, max(self.stop, step + 1))),
            kwargs={"free": self._free, "ready": self._ready, "closed": self._closed},
            name="prefetch",
            daemon=True,
        )
        self._thread.start()


def _produce(
    sampler: Sampler,
    steps: range,
    *,
    free: queue.SimpleQueue[Slot],
    ready: queue.SimpleQueue[_Made | BaseException],
    closed: threading.Event,
) -> None:
    try:
        for step in steps:
            slot = free.get()
            if closed.is_set():
                return
            ready.put(_Made(slot, sampler.batch(step, slot or None)))
    except BaseException as error:  # raised again where the batch is asked for
        ready.put(error)
