"""Run a step as one CUDA graph where that is possible, eagerly elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]


class _Captured(NamedTuple):
    """A graph and the buffers that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class GraphedStep:
    """Calls `fn(inputs) -> outputs`; on CUDA the fourth call captures it and later ones replay.

    `fn` must do the same work in every call, without reading the device; what it keeps from call to
    call must be tensors that it changes in place (parameters, optimizer state, counters), which a
    replay changes too. Random numbers belong into the inputs: a generator that a refused capture
    has drawn from can be of no use afterwards. Outputs are the graph's own buffers: read them
    before the next call. Inputs of other shapes get a graph of their own. On a CPU, and after a
    refusal, which is said in one line, `fn` is simply called.

    Args:
        fn: the step.
        device: where the inputs live; only a CUDA device is captured.
        warmup: eager calls before the capture (they are real steps), for each set of shapes.
        writes: tensors that `fn` changes in place. torch counts a tensor's version up when it is
            changed, but not in a replay; here it is, so that packed weights are seen to be old.
        name: of the step, for the line that says why it is not captured.
        refusal: why it must not be captured; empty if it may.
    """

    def __init__(
        self,
        fn: Step,
        device: torch.device | str,
        warmup: int = 3,
        *,
        writes: Sequence[Tensor] = (),
        name: str = "step",
        refusal: str = "",
    ) -> None:
        self.fn, self.device, self.warmup = fn, torch.device(device), warmup
        self.name, self.writes = name, list(writes)
        self.enabled = self.device.type == "cuda"
        self._calls: dict[Shapes, int] = {}
        self._captured: dict[Shapes, _Captured] = {}
        self._side: torch.cuda.Stream | None = None
        if self.enabled and refusal:
            self._refuse(refusal)

    @property
    def captured(self) -> bool:
        """Whether there is a graph to be replayed."""
        return bool(self._captured)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.enabled:
            return self.fn(dict(inputs))
        shapes = tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        if shapes not in self._captured:
            calls = self._calls.get(shapes, 0)
            if calls < self.warmup:
                self._calls[shapes] = calls + 1
                return self._eager(inputs)
            if not self._capture(shapes, inputs):
                return self.fn(dict(inputs))
        graph, static, outputs = self._captured[shapes]
        for name, value in inputs.items():
            static[name].copy_(value)
        graph.replay()
        if self.writes:
            torch.autograd.graph.increment_version(self.writes)
        return dict(outputs)  # callers may take entries out

    def _refuse(self, reason: str) -> None:
        print(f"diwa: no CUDA graph of the {self.name}, it runs eagerly: {reason}", file=sys.stderr)
        self.enabled = False

    def _eager(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Capture wants warm-up on a side stream. Always the same one: memory belongs to a stream.
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            outputs = self.fn(dict(inputs))
        current.wait_stream(self._side)
        return outputs

    def _capture(self, shapes: Shapes, inputs: Mapping[str, Tensor]) -> bool:
        static = {name: value.clone() for name, value in inputs.items()}
        before = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = self.fn(dict(static))
        except RuntimeError as error:
            # An error in `fn` makes the end of the capture fail as well, and leaves its stream on.
            torch.cuda.set_stream(before)
            first = error.__context__ or error
            self._refuse(str(first).strip().partition("\n")[0])
            torch.cuda.synchronize(self.device)
            return False
        self._captured[shapes] = _Captured(graph, static, outputs)
        return True
