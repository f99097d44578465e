"""Writes benchmarks/README.md and its plots from a result file.

python benchmarks/page.py [results/cpu.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "cpu.json"

BARS: list[tuple[str, float | None, float | None]] = [
    ("denoise_chain B=256 fp32", 5.3, 1.25),
    ("denoise_chain B=256 bf16", 9.7, 1.25),
    ("denoise_chain B=1 fp32", 18.0, 3.0),
    ("denoise_chain B=1 bf16", 32.0, 3.0),
    ("rollout_logprob B=64 fp32", 9.5, None),
    ("rollout_logprob B=64 bf16", 17.5, None),
    ("rssm_imagine B=16 fp32", 2.4, 1.35),
    ("rssm_imagine B=256 fp32", 1.5, 1.25),
    ("rssm_imagine B=16 bf16", 4.8, 1.4),
    ("rssm_imagine B=256 bf16", 2.75, 1.1),
    ("chain_log_prob grouped,B=256 fp32", 3.9, 1.15),
    ("rssm_observe T=50,B=16 fp32", 1.9, 1.8),
    ("rssm_observe T=50,B=16 bf16", 2.8, 1.8),
    ("finetune_iteration 50x36x4,epochs=10 fp32", 4.0, None),
    ("finetune_iteration 50x36x4,epochs=10 mixed", 4.3, None),
]
"""Item, wanted speed-up over the original and over the best torch.compile of the same algebra. They
were set on a processor with AVX-512 and AVX512_BF16."""

OPS = {
    "gru_cell": "one step of torch.nn.GRUCell",
    "mish": "activation of one hidden layer",
    "rssm_imagine": "4 prior steps (one action chunk) of B dreams, one call",
    "denoise_chain": "20 denoising steps of B states, 10 of them fine-tuned",
    "chain_log_prob": "log-probabilities of B states x 10 steps, forward and backward",
    "rollout_logprob": "chain and its log-probabilities, as PPO needs them",
    "policy_inference": "one evaluated action chunk for one robot",
    "rssm_observe": "posterior scan over T frames with KL, forward and backward",
    "finetune_iteration": "50 dreams x 36 chunks x 4 actions, then 10 PPO epochs",
}


def name(item: dict[str, Any]) -> str:
    """As `diwa bench --list` prints it."""
    return f"{item['op']} {item['case']} {item['dtype']}"


def times(value: float | None) -> str:
    """A speed-up."""
    return "-" if value is None else f"{value:.2f}x"


def duration(seconds: float) -> str:
    """With three digits."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def bars(result: dict[str, Any]) -> list[str]:
    """Markdown table of the bars; a missed one stands there as missed."""
    items = {name(item): item for item in result["items"]}
    lines = [
        "| item (paper size) | over the original (bar) | over best torch.compile (bar) | |",
        "|---|---|---|---|",
    ]
    for key, original, compiled in BARS:
        if key not in items:
            lines.append(f"| {key} | not measured | | |")
            continue
        got = items[key]["vs_original"], items[key]["vs_best_compile"]
        cells, verdicts = [], []
        for value, bar in zip(got, (original, compiled), strict=True):
            cells.append(times(value) + (f" ({bar:g}x)" if bar else ""))
            if bar and value is not None:
                verdicts.append(value >= bar)
        met = "met" if all(verdicts) else "**missed**" if not any(verdicts) else "**partly**"
        lines.append(f"| {key} | {cells[0]} | {cells[1]} | {met} |")
    return lines


def table(result: dict[str, Any]) -> list[str]:
    """Markdown table of every item."""
    lines = [
        "| item | time | original | compile | best peer | of roof | error | eager's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item in result["items"]:
        used = item["roof_fraction"]
        lines.append(
            f"| {name(item)} | {duration(item['median_s'])} | {times(item['vs_original'])} "
            f"| {times(item['vs_best_compile'])} | {times(item['vs_best_peer'])} "
            f"({item['best_peer']}) | {'-' if used is None else f'{100 * used:.0f} %'} "
            f"| {item['error_vs_fp64']:.0e} | {item['eager_error_vs_fp64']:.0e} |"
        )
    return lines


def left_out(result: dict[str, Any]) -> list[str]:
    """What was skipped or failed, with the reason."""
    details = result["details"]
    lines = [f"- FAILED {row['item']}: {row['reason']}" for row in details["failed"]]
    lines += [f"- {row['item']}: {row['reason']}" for row in details["skipped"]]
    peers: dict[str, str] = {}
    for detail in details["items"]:
        peers.update(detail["skipped_peers"])
    lines += [f"- peer `{peer}`: {reason}" for peer, reason in peers.items()]
    return lines or ["- nothing"]


def tails(result: dict[str, Any]) -> list[str]:
    """Latency of the policy on a robot."""
    medians = {name(item): item["median_s"] for item in result["items"]}
    rows = [d for d in result["details"]["items"] if "p99_s" in d]
    return [
        f"- {d['item']}: median {duration(medians[d['item']])}, 99th percentile "
        f"{duration(d['p99_s'])}; original {duration(d['peers_s']['original'])} and "
        f"{duration(d['original_p99_s'])}"
        for d in rows
    ]


def bf16_note(result: dict[str, Any]) -> str:
    """Which bfloat16 path was measured."""
    if result["details"]["native_bf16"]:
        return "torch's bfloat16 products are native here and among the peers."
    return (
        "This processor has no bfloat16 arithmetic. bf16 items run diwa's generic path, which "
        "reads half the bytes and multiplies in float32; torch's own bfloat16 has no native "
        "products here and is no peer. So bf16 items are compared with the float32 peers and held "
        "against the float32 roof. The AVX512_BF16 path was **not measured**, and nothing is "
        "claimed of its speed."
    )


def page(result: dict[str, Any]) -> str:
    """The README."""
    meta, details = result["meta"], result["details"]
    roofs = ", ".join(
        f"{dtype} {roof['gflop_per_s']:.0f} GFLOP/s ({roof['by']})"
        for dtype, roof in details["roofs"].items()
    )
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items() if v is not None)
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "Written by `python benchmarks/page.py` from [results/cpu.json](results/cpu.json); "
            "`make bench` measures and writes both. `diwa bench --help` has the options, "
            "`diwa bench --compare OLD NEW` finds regressions between two files.",
            "",
            f"- **Where:** {meta['device']}, {meta['threads']} thread(s), {meta['date']}, commit "
            f"{meta['commit']}",
            f"- **With:** {versions}",
            f"- **Roof:** {roofs}, the fastest matrix product of torch, measured again in every "
            "round. Of roof = arithmetic that the result needs / time / roof.",
            "- **How:** correctness first (largest error against float64, beside that of the "
            "original in float32), then rounds in which every peer is sampled once in turn; "
            "ratios within a round, medians over rounds; processor time for one thread.",
            f"- **bfloat16:** {bf16_note(result)}",
            "- **original** is the form of published code, written by us in [peers](peers), with "
            "its waste named there; **compile** the best torch.compile (inductor, frozen weights) "
            "of the leaner forms; **best peer** the fastest of all that are no part of diwa.",
            "",
            "## Bars",
            "",
            "The bars were set on a processor with AVX-512 and AVX512_BF16.",
            "",
            *bars(result),
            "",
            "![Speed-up of every item over the original and over the best peer](plots/speedup.png)",
            "",
            "## All items",
            "",
            *(f"- `{op}`: {text}" for op, text in OPS.items()),
            "",
            *table(result),
            "",
            "![Time per state against the batch](plots/batch.png)",
            "![Reached and possible GFLOP/s](plots/roof.png)",
            "",
            "## Latency of one robot",
            "",
            *(tails(result) or ["not measured"]),
            "",
            "## Left out",
            "",
            *left_out(result),
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Write README.md and plots/ beside this file, or in --out."""
    parser = argparse.ArgumentParser(description="Write benchmarks/README.md from a result file.")
    parser.add_argument("result", type=Path, nargs="?", default=RESULT)
    parser.add_argument("--out", type=Path, default=HERE, help="folder")
    options = parser.parse_args(arguments)
    if not options.result.exists():
        print(f"{options.result} does not exist; run `diwa bench`", file=sys.stderr)
        return 2
    result = json.loads(options.result.read_text(encoding="utf-8"))
    sys.path.insert(0, str(HERE))
    from page_plots import draw

    (options.out / "plots").mkdir(parents=True, exist_ok=True)
    draw(result, options.out / "plots")
    (options.out / "README.md").write_text(page(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
