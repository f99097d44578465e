"""Skills in CALVIN itself before and after imagined fine-tuning -> benchmarks/results/calvin.json.

Needs a clone of calvin_env (`tools/get_calvin_env.sh`). Scene D, state observations; folders,
stages and schema are those of `skills_state.py`, which does the work. One stage more, `cross`,
compares the two simulators: the scripted experts in both, and the policies that were trained in
PlayTable (the folders of `skills_state.py`, `--playtable`) in both, as they are and from the same
starts::

    export CALVIN_ENV_ROOT=...
    python benchmarks/calvin_state.py --folder runs/calvin --playtable runs/skills

The committed result continued PlayTable's world model on 120,000 transitions of play in CALVIN::

    diwa collect --preset medium --env calvin --run-dir runs/calvin/base SETTINGS
    diwa world-model --preset medium --env calvin --run-dir runs/calvin/base SETTINGS

where SETTINGS are `--collect.play-transitions 120000 --world-model.init-from runs/skills/base` and
`--world-model.steps 1500 --world-model.batch-size 32 --world-model.lr 3e-4
--world-model.lr-final-fraction 0.02 --world-model.state-weight 200 --world-model.detail-weight 4`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import playtable_fidelity
import skills_state

from diwa.agent import Agent, load_policy, load_world_model
from diwa.checkpoint import read_json, write_json
from diwa.envs import SIMULATORS
from diwa.phases.evaluate import evaluate_agent, summary, task_starts
from diwa.presets import PRESETS

RESULT = Path(__file__).parent / "results" / "calvin.json"
STAGES = ("collect", "learn", "evaluate", "cross", "summarise")
TASKS = (
    "open_drawer",
    "close_drawer",
    "move_slider_left",
    "move_slider_right",
    "turn_on_lightbulb",
    "turn_off_led",
)
CROSS_STARTS = 4_000_000
"""Seed of the starts of the comparison, other than those of training and evaluation."""


def policies(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """Success of a PlayTable run's policies in each simulator, from the same starts."""
    folder = args.playtable / f"{task}-0"
    model = load_world_model(args.playtable / "base" / "world_model")
    base, _ = load_policy(folder / "pretrain")
    tuned, ft_steps = load_policy(folder / "finetune")
    agents = {"base": Agent(model, base), "finetuned": Agent(model, tuned, base, ft_steps)}
    starts = task_starts(task, args.cross_episodes, CROSS_STARTS)
    found: dict[str, Any] = {}
    for simulator in SIMULATORS:
        config = dataclasses.replace(PRESETS[args.preset], task=task, env=simulator)
        found[simulator] = {
            name: summary(evaluate_agent(agent, config, starts)) for name, agent in agents.items()
        }
        rates = [f"{name} {rate['success']:.2f}" for name, rate in found[simulator].items()]
        print(f"{task} in {simulator}: {', '.join(rates)}", flush=True)
    return found


def cross(args: argparse.Namespace) -> dict[str, Any]:
    """Experts and PlayTable's policies in both simulators."""
    import torch

    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    experts = {}
    for simulator in SIMULATORS:  # a process of its own for each
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            experts[simulator] = pool.submit(
                playtable_fidelity.experts, args.cross_episodes, simulator
            ).result()
        shares = [f"{t} {e['share_solved']:.2f}" for t, e in experts[simulator].items()]
        print(f"experts in {simulator}: {', '.join(shares)}", flush=True)
    tried = {task: policies(args, task) for task in args.tasks}
    return {"experts": experts, "playtable_policies": tried}


def main() -> None:
    """Run the chosen stages."""
    parser = skills_state.make_parser(__doc__.splitlines()[0], STAGES)
    parser.set_defaults(folder=Path("runs/calvin"), env="calvin", tasks=list(TASKS), seeds=[0])
    parser.add_argument("--playtable", type=Path, default=Path("runs/skills"))
    parser.add_argument("--cross-episodes", type=int, default=50)
    args = skills_state.parse(parser)
    stages = STAGES if args.stage == "all" else (args.stage,)
    skills_state.run_stages(args, stages)
    compared = args.folder / "cross.json"
    if "cross" in stages:
        write_json(compared, cross(args))
    if "summarise" in stages:
        result = skills_state.summarise(args)
        result["meta"]["simulator"] = "calvin_env, scene D"
        result["cross_simulator"] = read_json(compared)
        skills_state.publish(result, RESULT)


if __name__ == "__main__":
    main()
