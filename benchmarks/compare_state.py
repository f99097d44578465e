"""DiWA against online DPPO on the eight skills -> benchmarks/results/compare_state.json.

Needs the run folders of `skills_state.py` (first seed). The online baseline starts from the same
base policy, has the same PPO settings, and stops when it matches DiWA on the validation starts::

    python benchmarks/compare_state.py --folder runs/skills --jobs 2

In CALVIN, with the runs of `calvin_state.py`::

    python benchmarks/compare_state.py --folder runs/calvin --tasks open_drawer move_slider_right \\
        --out benchmarks/results/compare_calvin.json
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
from pathlib import Path
from typing import Any

from diwa.checkpoint import write_json
from diwa.compare import comparison
from diwa.config import Config, from_dict, to_dict
from diwa.envs.tasks import TASKS
from diwa.info import versions
from diwa.phases.evaluate import evaluate_agent, load_agents, task_starts
from diwa.run import RunFolder

RESULT = Path(__file__).parent / "results" / "compare_state.json"


def baseline(folder: Path, limit: int) -> str:
    """Online DPPO of one run until it matches DiWA there, or has taken `limit` steps."""
    import torch

    from diwa.phases.collect import VALIDATION_STARTS
    from diwa.phases.online import finetune_online

    torch.set_num_threads(1)
    here = {"from_run": str(folder.parent / "base"), "device": "cpu"}
    config = from_dict(Config, {**json.loads((folder / "config.json").read_text()), **here})
    write_json(folder / "config.json", to_dict(config))
    run = RunFolder(folder, config, quiet=True)
    starts = task_starts(config.task, config.online.eval_episodes, VALIDATION_STARTS, config.env)
    target = float(evaluate_agent(load_agents(config, run)["finetuned"], config, starts).mean())
    online = dataclasses.replace(config.online, target_success=target, max_env_steps=limit)
    result = finetune_online(dataclasses.replace(config, online=online), run)
    return f"{config.task}: DiWA {target:.2f}, online {result['evaluations']}"


def main() -> None:
    """Run the baselines and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/skills"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--limit", type=int, default=150_000, help="simulator steps per skill")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    folders = [args.folder.resolve() / f"{task}-0" for task in args.tasks]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for future in [pool.submit(baseline, folder, args.limit) for folder in folders]:
            print(future.result(), flush=True)
    rows = {task: matched(folder) for task, folder in zip(args.tasks, folders, strict=True)}
    total = sum(
        row["online_dppo_env_steps"] or row["online_dppo_steps_taken"] for row in rows.values()
    )
    simulator = json.loads((folders[0] / "config.json").read_text())["env"]
    meta = {
        "date": datetime.date.today().isoformat(),
        "versions": versions("cpu"),
        "simulator": simulator,
    }
    write_json(args.out, {"meta": meta, "online_dppo_env_steps_total": total, "tasks": rows})
    print(f"online DPPO took {total:,} simulator steps where DiWA took none")


def matched(folder: Path) -> dict[str, Any]:
    """Comparison of a run whose baseline stopped at DiWA's success on the same starts."""
    row = comparison(folder)
    reached = json.loads((folder / "online" / "result.json").read_text())["reached"]
    row["online_dppo_env_steps"] = row["online_dppo_steps_taken"] if reached else None
    return row


if __name__ == "__main__":
    main()
