"""The three plots of benchmarks/README.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  # after the backend is chosen

COLOURS = {"fp32": "#1f77b4", "bf16": "#d95f02", "mixed": "#7570b3"}


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write speedup.png, batch.png and roof.png."""
    _speedup(result["items"], folder / "speedup.png")
    _batch(result, folder / "batch.png")
    _roof(result, folder / "roof.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _speedup(items: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * max(len(items), 1)))
    for row, item in enumerate(reversed(items)):
        axes.barh(row, item["vs_original"], color=COLOURS[item["dtype"]], height=0.7)
        axes.plot(item["vs_best_peer"], row, "k|", markersize=9)
    axes.set_yticks(range(len(items)))
    labels = [f"{i['op']} {i['case']} {i['dtype']}" for i in reversed(items)]
    axes.set_yticklabels(labels, fontsize=7)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_ylim(-0.7, len(items) - 0.3)
    axes.set_xlabel("speed-up: bar over the original's form, | over the best peer")
    _save(figure, path)


def _batch(result: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    peers = {detail["item"]: detail["peers_s"] for detail in result["details"]["items"]}
    for axes, op in zip(panels, ("denoise_chain", "rssm_imagine"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for item in result["items"]:
            match = re.fullmatch(r"B=(\d+)", item["case"])
            if item["op"] != op or not match:
                continue
            b = int(match[1])
            lines.setdefault(f"diwa {item['dtype']}", []).append((b, item["median_s"] / b))
            others = peers[f"{op} {item['case']} {item['dtype']}"]
            if item["dtype"] == "fp32":
                lines.setdefault("original", []).append((b, others["original"] / b))
                lines.setdefault("best peer", []).append((b, min(others.values()) / b))
        for label, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            axes.loglog(x, [1e6 * v for v in y], "o-", label=label)
        axes.set(title=op, xlabel="batch", ylabel="us per state")
        if lines:
            axes.legend(fontsize=8)
        axes.grid(True, which="both", alpha=0.2)
    _save(figure, path)


def _roof(result: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 4))
    details = {detail["item"]: detail for detail in result["details"]["items"]}
    seen = set()
    for item in result["items"]:
        detail = details[f"{item['op']} {item['case']} {item['dtype']}"]
        if not detail["gflop"]:
            continue
        label = item["dtype"] if item["dtype"] not in seen else None
        seen.add(item["dtype"])
        rate = item["roof_fraction"] * detail["roof_gflop_per_s"]
        axes.plot(detail["gflop"], rate, "o", color=COLOURS[item["dtype"]], label=label)
        axes.annotate(f"{item['op']} {item['case']}", (detail["gflop"], rate), fontsize=5)
    for dtype, roof in result["details"]["roofs"].items():
        axes.axhline(roof["gflop_per_s"], color=COLOURS[dtype], linestyle="--", linewidth=1)
        where = (0.01, roof["gflop_per_s"])
        axes.annotate(f"roof {dtype}", where, xycoords=("axes fraction", "data"), fontsize=8)
    axes.set(xscale="log", yscale="log", ylabel="useful GFLOP/s")
    axes.set_xlabel("useful GFLOP of one call")
    if seen:
        axes.legend(fontsize=8)
    axes.grid(True, which="both", alpha=0.2)
    _save(figure, path)
