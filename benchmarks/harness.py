"""Timing engine: interleaved rounds in one process, a correctness gate, the roof, result files.

A case is one set of inputs and the functions that do the same work on it. In every round each
function is sampled once, in turn, next to a plain matrix product that stands for the machine's roof
at that moment; ratios are taken within a round and their median is reported. That keeps them honest
on a machine that is busy with something else. A sample lasts at least 10 ms.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MIN_SAMPLE_S = 0.01
KEYS = (
    "op",
    "case",
    "dtype",
    "median_s",
    "vs_original",
    "vs_best_compile",
    "best_peer",
    "vs_best_peer",
    "roof_fraction",
    "error_vs_fp64",
    "eager_error_vs_fp64",
)
"""Of every item of a result file, in this order."""


class Skip(Exception):
    """This case cannot run here; the message says why."""


class GateError(AssertionError):
    """A function does not compute what it is timed for."""


@dataclass
class Case:
    """One item of the suite.

    Attributes:
        ours: diwa's call.
        peers: name -> the same work by others. `original` is the form that published code has;
            names that begin with `compile` are torch.compile.
        errors: largest errors of (ours, the original in float32) against float64, and the bound
            that ours must keep; may also check the peers (raises `GateError`).
        flops: floating-point operations that the result needs (1 multiply-add = 2).
        tail: also report the 99th percentile of single calls.
        grad: the calls need autograd.
    """

    op: str
    case: str
    dtype: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    errors: Callable[[], tuple[float, float, float]]
    flops: float
    note: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    tail: bool = False
    grad: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.case} {self.dtype}"


@dataclass
class Sum:
    """An item that is a sum of parts, timed one by one: part -> (repetitions, name -> call).

    Other attributes as in `Case`; the names hold `diwa` and `original`.
    """

    op: str
    case: str
    dtype: str
    parts: dict[str, tuple[int, dict[str, Callable[[], Any]]]]
    errors: Callable[[], tuple[float, float, float]]
    flops: float
    note: str = "sum of its parts, each timed once per round and multiplied"
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.case} {self.dtype}"


class Clock:
    """Seconds of processor time for one thread, wall time for several (their times would add)."""

    def __init__(self, threads: int) -> None:
        self.now = time.process_time if threads == 1 else time.perf_counter

    def sample(self, call: Callable[[], Any], number: int) -> float:
        """Seconds per call, over `number` calls."""
        start = self.now()
        for _ in range(number):
            call()
        return (self.now() - start) / number

    def number(self, call: Callable[[], Any]) -> int:
        """Calls that fill a sample; warms up as well."""
        call()
        number = 1
        while (seconds := self.sample(call, number) * number) < MIN_SAMPLE_S:
            number = max(number + 1, int(number * 1.2 * MIN_SAMPLE_S / max(seconds, 1e-6)))
        return number


class Roof:
    """The fastest matrix product that torch has here, as a yardstick inside every round.

    Several sizes, plain and with prepacked weights, are tried once; the best one is kept.
    """

    def __init__(self, clock: Clock, dtype: torch.dtype = torch.float32) -> None:
        candidates = {}
        for n in (512, 1024):
            a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
            candidates[f"mm {n}"] = (_product(a, b), 2.0 * n**3)
            if torch.backends.mkldnn.is_available():
                candidates[f"packed {n}"] = (_packed_product(a, b), 2.0 * n**3)
        rates = {}
        for name, (call, flops) in candidates.items():
            number = clock.number(call)
            rates[name] = flops / min(clock.sample(call, number) for _ in range(3))
        self.kind = max(rates, key=rates.__getitem__)
        self.call, self.flops = candidates[self.kind]
        self.flops_per_s = rates[self.kind]


def _product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    out = torch.empty(len(a), b.shape[1], dtype=a.dtype)
    return lambda: torch.mm(a, b, out=out)


def _packed_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    mkldnn = torch.ops.mkldnn
    packed = mkldnn._reorder_linear_weight(b, len(a))
    return lambda: mkldnn._linear_pointwise(a, packed, None, "none", [], "")


def native_bf16() -> bool:
    """Whether torch's own bfloat16 products are native here."""
    mkldnn = torch.backends.mkldnn.is_available()
    return bool(mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass
class Settings:
    """How long and how much is measured."""

    threads: int = 1
    rounds: int = 9
    case_seconds: float = 60.0
    """Rounds of a case stop after this long, but not before the third."""
    compile: bool = True


def interleave(
    clock: Clock, calls: dict[str, Callable[[], Any]], settings: Settings
) -> dict[str, list[float]]:
    """Seconds per call of every function, one sample per round."""
    numbers = {name: clock.number(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), time.perf_counter()
    for i in range(settings.rounds):
        if i >= 3 and time.perf_counter() - start > settings.case_seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(clock.sample(calls[name], numbers[name]))
    return samples


def measure(case: Case | Sum, settings: Settings, roof: Roof) -> tuple[dict, dict]:
    """Gate, then time a case.

    Returns:
        the item of the result file and its details (times of every peer, notes).

    Raises:
        GateError: the error of ours is above its bound, or a peer computes something else.
    """
    error, eager_error, bound = case.errors()
    if not error <= bound:  # also when it is NaN
        raise GateError(f"{case.name}: error {error:.2e} against float64 is above {bound:.2e}")
    clock = Clock(settings.threads)
    if isinstance(case, Sum):
        samples, more = _sum_parts(clock, case, settings, roof)
    else:
        calls = {"diwa": case.ours, **case.peers, "roof": roof.call}
        with torch.set_grad_enabled(case.grad):
            _drop_uncompilable(calls, case.skipped)
            samples = interleave(clock, calls, settings)
            more = _tail(clock, case) if case.tail else {}
    ours, peers = samples["diwa"], [n for n in samples if n not in ("diwa", "roof")]
    ratios = {
        name: statistics.median(p / o for p, o in zip(samples[name], ours, strict=True))
        for name in peers
    }
    compiled = [r for name, r in ratios.items() if name.startswith("compile")]
    best = min(ratios, key=ratios.__getitem__)
    used = statistics.median(
        (case.flops / o) / (roof.flops / r) for o, r in zip(ours, samples["roof"], strict=True)
    )
    values = (
        case.op,
        case.case,
        case.dtype,
        statistics.median(ours),
        ratios["original"],
        min(compiled) if compiled else None,
        best,
        ratios[best],
        used if case.flops else None,
        error,
        eager_error,
    )
    details = {
        "item": case.name,
        "peers_s": {name: statistics.median(samples[name]) for name in peers},
        "vs": ratios,
        "rounds": len(ours),
        "spread": (max(ours) - min(ours)) / statistics.median(ours),
        "gflop": case.flops / 1e9,
        "roof_gflop_per_s": roof.flops / statistics.median(samples["roof"]) / 1e9,
        "skipped_peers": case.skipped,
        "note": case.note,
        **more,
    }
    return dict(zip(KEYS, values, strict=True)), details


def _sum_parts(
    clock: Clock, case: Sum, settings: Settings, roof: Roof
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Samples of the sum, round by round, and the medians of its parts."""
    total: dict[str, list[float]] = {}
    parts = {}
    for part, (repetitions, calls) in case.parts.items():
        samples = interleave(clock, {**calls, "roof": roof.call}, settings)
        parts[part] = {n: statistics.median(s) for n, s in samples.items() if n != "roof"}
        parts[part]["repetitions"] = repetitions
        for name, column in samples.items():
            times = 1 if name == "roof" else repetitions
            scaled = [times * s for s in column]
            before = total.get(name)
            if before is None or name == "roof":
                total[name] = scaled
            else:
                total[name] = [a + b for a, b in zip(before, scaled, strict=False)]
    rounds = min(len(column) for column in total.values())
    return {n: column[:rounds] for n, column in total.items()}, {"parts_s": parts}


def _drop_uncompilable(calls: dict[str, Callable[[], Any]], skipped: dict[str, str]) -> None:
    """Compile now; leave out, with the reason, what the compiler cannot do here."""
    for name in [n for n in calls if n.startswith("compile")]:
        try:
            calls[name]()
        except Exception as error:  # whatever a compiler backend raises
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del calls[name]


def _tail(clock: Clock, case: Case, calls: int = 200) -> dict[str, float]:
    """99th percentile of single calls, of ours and the original."""
    out = {}
    for name, call in (("p99_s", case.ours), ("original_p99_s", case.peers["original"])):
        times = sorted(clock.sample(call, 1) for _ in range(calls))
        out[name] = times[int(0.99 * calls)]
    return out


def meta(threads: int) -> dict[str, Any]:
    """Commit, date, device, threads and versions of a result file."""
    from diwa._native import cpu_isa
    from diwa.info import versions

    found = versions("cpu")
    commit, device = found.pop("commit"), found.pop("device")
    native = {"torch_isa": torch.backends.cpu.get_cpu_capability(), "diwa_isa": cpu_isa()}
    for module in ("torchrl", "sheeprl"):
        found[module] = _version(module)
    return {
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "threads": threads,
        "versions": {**found, **native, "machine": platform.machine()},
    }


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return None
