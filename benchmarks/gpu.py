"""Operators on a GPU against eager torch and against CUDA graphs of torch: one result file.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json [--only TEXT] [--seconds 150]

Every case first compares its result with float64; variants are timed in turn, round by round, with
CUDA events over at least 2 ms, and medians of rounds are reported. A CUDA graph is captured before
it is timed; its capture is not counted. `--device cpu --tiny` tries the code without a GPU, where
what needs one is skipped by name.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import diwa
from diwa import ops

from .gpu_cases import GraphCase, groups

ROUNDS, SAMPLE_S = 9, 2e-3


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """Replay of a CUDA graph of the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Clock:
    """Seconds of a number of calls, by CUDA events or, without a GPU, by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, call: Callable[[], Any], number: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(number):
                call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def number(self, call: Callable[[], Any]) -> int:
        """Calls that fill a sample; warms up as well."""
        for _ in range(3):
            call()
        return max(1, min(1000, int(SAMPLE_S / max(self(call, 3) / 3, 1e-7)) + 1))


def measure(case: GraphCase, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """The item of the result file and its details.

    Raises:
        AssertionError: the result is not what is timed.
    """
    wrong, eager_wrong, bound = case.errors()
    assert wrong <= bound, f"error {wrong:.2e} against float64 is above {bound:.2e}"
    clock, calls = Clock(device), {"diwa": case.ours, **case.peers}
    for name in case.graph:
        if device.type != "cuda":
            case.skipped[f"graph of {name}"] = "no CUDA device"
            continue
        try:
            calls[f"graph of {name}"] = captured(calls[name])
        except RuntimeError as reason:
            case.skipped[f"graph of {name}"] = str(reason).splitlines()[0]
            torch.cuda.synchronize()
    numbers = {name: clock.number(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(clock(call, numbers[name]) / numbers[name])
    times = {name: statistics.median(s) for name, s in samples.items()}
    own = [name for name in ("graph of diwa", "diwa") if name in times]
    best = min(own, key=times.__getitem__)
    others = {n: t for n, t in times.items() if n not in own}
    peer = min(others, key=others.__getitem__)
    item = {
        "op": case.op,
        "case": case.case,
        "dtype": case.dtype,
        "median_s": times[best],
        "vs_original": times["original"] / times[best],
        "vs_best_compile": None,
        "best_peer": peer,
        "vs_best_peer": others[peer] / times[best],
        "roof_fraction": None,
        "error_vs_fp64": wrong,
        "eager_error_vs_fp64": eager_wrong,
    }
    details = {
        "item": f"{case.op} {case.case} {case.dtype}",
        "ours": best,
        "times_s": times,
        "flops_per_s": case.flops / times[best],
        "skipped": case.skipped,
    }
    if case.tail:
        single = sorted(_single(calls[best], clock.cuda) for _ in range(500))
        item["p99_s"] = single[int(0.99 * len(single))]
    return item, details


def _single(call: Callable[[], Any], cuda: bool) -> float:
    """Wall time of one call, until its result is there."""
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    """Of the processor that is measured, as in a file name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu_tried"
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def run(device: torch.device, only: str, tiny: bool, seconds: float) -> dict[str, Any]:
    """Content of a result file. What fails or is left out is named."""
    from diwa.info import versions

    meta = {**versions(str(device)), "device": device_name(device), "diwa": diwa.__version__}
    out: dict[str, Any] = {"meta": meta, "items": []}
    details: dict[str, Any] = {"items": [], "skipped": [], "failed": []}
    start = time.monotonic()
    for group, cases in groups(device, tiny).items():
        if only and only not in group:
            continue
        try:
            for case in cases():
                name = f"{case.op} {case.case} {case.dtype}"
                if time.monotonic() - start > seconds:
                    details["skipped"].append({"item": name, "reason": "out of time"})
                    continue
                try:
                    item, more = measure(case, device)
                except (AssertionError, RuntimeError, ops.BackendError) as reason:
                    details["failed"].append({"item": name, "reason": str(reason)[:300]})
                    print(f"{name:<40} FAILED: {str(reason).splitlines()[0]}", flush=True)
                    continue
                out["items"].append(item)
                details["items"].append(more)
                print(
                    f"{name:<40}{1e6 * item['median_s']:10.1f} us {item['vs_original']:7.1f}x "
                    f"original {item['vs_best_peer']:6.2f}x {item['best_peer']}, "
                    f"error {item['error_vs_fp64']:.1e}",
                    flush=True,
                )
        except Exception as reason:  # a group that cannot be built must not hide the others
            details["failed"].append({"item": group, "reason": f"{reason!r}"[:300]})
            print(f"{group:<40} FAILED: {reason!r}", flush=True)
    out["details"] = details
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="result file; none is written without it")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the code")
    parser.add_argument("--seconds", type=float, default=150.0, help="no case begins after this")
    arguments = parser.parse_args()
    result = run(torch.device(arguments.device), arguments.only, arguments.tiny, arguments.seconds)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["details"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
