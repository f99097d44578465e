"""Base policy, DiWA and online DPPO side by side: `diwa compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diwa.checkpoint import read_json
from diwa.errors import RunError


def _result(folder: Path, phase: str) -> dict[str, Any]:
    path = folder / phase / "result.json"
    if not path.exists():
        flag = " --online" if phase == "online" else ""
        command = "finetune" if phase == "online" else phase
        raise RunError(
            f"{path} does not exist; run `diwa {command}{flag} --run-dir {folder}` first"
        )
    return read_json(path)


def steps_to_match(online: dict[str, Any], success: float) -> int | None:
    """Simulator steps at the first evaluation of the baseline that reached `success`, or None."""
    for evaluation in online["evaluations"]:
        if evaluation["success"] >= success:
            return int(evaluation["env_steps"])
    return None


def comparison(folder: Path) -> dict[str, Any]:
    """One run: success of base and DiWA with intervals, and the baseline's steps.

    Raises:
        RunError: the folder is no run, or a phase is missing.
    """
    if not (folder / "config.json").exists():
        raise RunError(f"{folder} is no run folder: it has no config.json")
    config = read_json(folder / "config.json")
    evaluated, online = _result(folder, "evaluate"), _result(folder, "online")
    if "finetuned" not in evaluated:
        raise RunError(f"{folder} has no fine-tuned policy; run `diwa finetune` first")
    tuned = evaluated["finetuned"]
    return {
        "task": config["task"],
        "base": {k: evaluated["base"][k] for k in ("success", "n", "ci")},
        "diwa": {k: tuned[k] for k in ("success", "n", "ci")},
        "diwa_env_steps": _result(folder, "finetune")["finetune_env_steps"],
        "online_dppo_env_steps": steps_to_match(online, tuned["success"]),
        "online_dppo_steps_taken": online["env_steps"],
        "online_dppo_success": online["evaluations"][-1]["success"],
        "online_evaluations": online["evaluations"],
    }


def main(arguments: Sequence[str]) -> int:
    """Run `diwa compare FOLDER ...`: print the table of several runs."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        "diwa compare", description="Base policy, DiWA and the online baseline, as a table."
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="folders of evaluated runs")
    rows = [comparison(folder) for folder in parser.parse_args(arguments).run_dir]
    table = Table("skill", "base", "DiWA (0 steps)", "online DPPO", "steps DPPO needed to match")
    for row in rows:
        steps = row["online_dppo_env_steps"]
        needed = f"{steps:,}" if steps else f"not within {row['online_dppo_steps_taken']:,}"
        table.add_row(
            row["task"],
            *(f"{row[k]['success']:.0%} ({row[k]['n']} episodes)" for k in ("base", "diwa")),
            f"{row['online_dppo_success']:.0%}",
            needed,
        )
    Console().print(table)
    return 0
