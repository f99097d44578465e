"""The suite: which cases there are, and how they are run. `diwa bench` is its command line."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diwa.ops import support_table

from . import chain, finetune, pointwise, rssm
from .harness import Case, Clock, GateError, Roof, Settings, Skip, Sum, measure, meta, native_bf16
from .inputs import COMPACT, PAPER, TINY, Size


@dataclass(frozen=True)
class Entry:
    """A case that can be built.

    Attributes:
        op, case, dtype: of the item.
        build: builds it; the argument says whether to compile peers. May raise `Skip`.
        quick: part of `--quick`.
    """

    op: str
    case: str
    dtype: str
    build: Callable[[bool], Case | Sum]
    quick: bool = False

    @property
    def name(self) -> str:
        """`op case dtype`, what `--only` searches."""
        return f"{self.op} {self.case} {self.dtype}"


QUICK = {
    "gru_cell B=64 fp32",
    "mish B=256 fp32",
    "rssm_imagine B=16 fp32",
    "rssm_imagine B=16 bf16",
    "denoise_chain B=16 fp32",
    "denoise_chain B=16 bf16",
    "rollout_logprob B=64 fp32",
    "chain_log_prob grouped,B=64 fp32",
    "rssm_observe T=10,B=4 fp32",
    "policy_inference B=1 fp32",
}
"""What CI runs, one item per operator."""


def entries(sizes: Iterable[Size] = (PAPER, COMPACT)) -> Iterator[Entry]:
    """All cases; the dtypes of one case in succession, which share their peers."""
    for size in sizes:
        yield from _of_size(size)


def _of_size(size: Size) -> Iterator[Entry]:
    paper = size is not COMPACT
    batches = (1, 16, 64, 256) if size is not TINY else (1, 5)
    one, most = batches[0], batches[-1]

    def entry(op: str, case: str, dtype: str, build: Callable[..., Any], *args: Any) -> Entry:
        name = size.case(case)
        quick = f"{op} {name} {dtype}" in QUICK
        return Entry(op, name, dtype, lambda c: build(size, *args, c), quick)

    if paper:
        for b in (64, 256) if size is PAPER else batches:
            yield entry("gru_cell", f"B={b}", "fp32", pointwise.gru_cell, b)
            yield entry("mish", f"B={b}", "fp32", pointwise.mish, b)
    for op, build in (("rssm_imagine", rssm.rssm_imagine), ("denoise_chain", chain.denoise_chain)):
        for b in batches:
            for dtype in ("fp32", "bf16"):
                yield entry(op, f"B={b}", dtype, build, b, dtype)
    for b in (64, most) if size is PAPER else (most,):
        for form in ("grouped", "shuffled"):
            name = f"{form},B={b}"
            yield entry("chain_log_prob", name, "fp32", chain.chain_log_prob, b, form)
    if not paper:
        return
    for dtype in ("fp32", "bf16", "mixed"):
        b = 64 if size is PAPER else most
        yield entry("rollout_logprob", f"B={b}", dtype, chain.rollout_logprob, b, dtype)
    for dtype in ("fp32", "bf16"):
        yield entry("policy_inference", f"B={one}", dtype, chain.policy_inference, one, dtype)
    for frames, b in ((10, 4), (50, 16)) if size is PAPER else ((3, 2),):
        for dtype in ("fp32", "bf16"):
            case = f"T={frames},B={b}"
            yield entry("rssm_observe", case, dtype, rssm.rssm_observe, frames, b, dtype)
    config = finetune.paper_config() if size is PAPER else finetune.tiny_config()
    for dtype in ("fp32", "mixed"):
        build = finetune.finetune_iteration
        yield entry("finetune_iteration", finetune.case(config), dtype, build, config, dtype)


NEEDS = {
    "rollout_logprob": "denoise_chain",
    "policy_inference": "denoise_chain",
    "finetune_iteration": "denoise_chain",
}
"""Operator behind an item, where it has another name."""


def check_native(op: str) -> None:
    """diwa's own side must run on a compiled operator: plain torch would be timed against itself.

    Raises:
        Skip: the reason why it does not.
    """
    name = NEEDS.get(op, op)
    for row in support_table():
        if row["op"] == name and row["backend"] == "cpu":
            if not row["available"]:
                raise Skip(str(row["reason"]))
            return
    raise Skip(f"diwa.ops.{name} has no compiled variant")


@contextmanager
def _quiet() -> Iterator[None]:
    """float64 and references run on the plain implementation; no need to say so every time."""
    log = logging.getLogger("diwa")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@_quiet()
def run(
    chosen: list[Entry], settings: Settings, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure entries and return the content of a result file.

    `details` holds what the items have no room for: times of every peer, the roof, and what was
    left out or failed its gate, by name and with the reason.
    """
    torch.set_num_threads(settings.threads)
    clock = Clock(settings.threads)
    roofs = {"fp32": Roof(clock)}
    if native_bf16():
        roofs["bf16"] = Roof(clock, torch.bfloat16)
    out: dict[str, Any] = {"meta": meta(settings.threads), "items": []}
    details: dict[str, Any] = {
        "roofs": {n: {"gflop_per_s": r.flops_per_s / 1e9, "by": r.kind} for n, r in roofs.items()},
        "native_bf16": native_bf16(),
        "items": [],
        "skipped": [],
        "failed": [],
    }
    out["details"] = details
    for name, roof in details["roofs"].items():
        say(f"roof {name}: {roof['gflop_per_s']:.0f} GFLOP/s ({roof['by']})")
    before = ("", "")
    for entry in chosen:
        start = time.perf_counter()
        if (entry.op, entry.case) != before:  # the items of a case share their compiled peers
            torch._dynamo.reset()
            before = (entry.op, entry.case)
        try:
            check_native(entry.op)
            case = entry.build(settings.compile)
            roof = roofs.get("bf16" if entry.dtype == "bf16" else "fp32", roofs["fp32"])
            item, detail = measure(case, settings, roof)
        except Skip as reason:
            details["skipped"].append({"item": entry.name, "reason": str(reason)})
            say(f"{entry.name:<44} skipped: {reason}")
            continue
        except GateError as reason:
            details["failed"].append({"item": entry.name, "reason": str(reason)})
            say(f"{entry.name:<44} FAILED: {reason}")
            continue
        out["items"].append(item)
        details["items"].append(detail)
        say(f"{line(item)}  [{time.perf_counter() - start:.0f} s]")
    return out


def line(item: dict[str, Any]) -> str:
    """One item for a person."""

    def ratio(value: float | None) -> str:
        return f"{value:6.2f}x" if value is not None else "      -"

    used = item["roof_fraction"]
    return (
        f"{item['op'] + ' ' + item['case'] + ' ' + item['dtype']:<44}"
        f"{1e3 * item['median_s']:10.3f} ms {ratio(item['vs_original'])} original"
        f" {ratio(item['vs_best_compile'])} compile {ratio(item['vs_best_peer'])} best"
        f" {'' if used is None else f'{100 * used:4.0f} % roof'}  err {item['error_vs_fp64']:.1e}"
    )
