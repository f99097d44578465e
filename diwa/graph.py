"""Run a step as one CUDA graph where that is possible, eagerly elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Step = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class GraphedStep:
    """Calls `fn(inputs) -> outputs`; on CUDA the third call captures it and later ones replay.

    `fn` must have static shapes, no host synchronisation and no host-side state; tensors that it
    changes in place (parameters, optimizer state) are changed by the replay too. Outputs are the
    graph's own buffers: read them before the next call.

    Args:
        fn: the step.
        device: where the inputs live; only a CUDA device is captured.
        warmup: eager calls before the capture (they are real steps).
    """

    def __init__(self, fn: Step, device: torch.device | str, warmup: int = 3) -> None:
        self.fn, self.device, self.warmup = fn, torch.device(device), warmup
        self.enabled = self.device.type == "cuda"
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.enabled:
            return self.fn(dict(inputs))
        if self._graph is None:
            if self._calls < self.warmup:
                return self._eager(inputs)
            self._capture(inputs)
            if self._graph is None:
                return self._eager(inputs)
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        self._graph.replay()
        return dict(self._outputs)  # callers may take entries out

    def _eager(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._calls += 1
        stream = torch.cuda.Stream(self.device)  # capture wants warm-up on a side stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            outputs = self.fn(dict(inputs))
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return outputs

    def _capture(self, inputs: Mapping[str, Tensor]) -> None:
        static = {name: value.clone() for name, value in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = self.fn(dict(static))
        except RuntimeError as error:
            print(f"diwa: CUDA graph refused, running eagerly: {error}", file=sys.stderr)
            self.enabled = False
            torch.cuda.synchronize(self.device)
            return
        self._graph, self._inputs, self._outputs = graph, static, outputs
