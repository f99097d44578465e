"""All eight skills before and after imagined fine-tuning -> benchmarks/results/skills_state.json.

One run folder holds the play and the world model (`base`), one more per skill and seed uses them
through `from_run`. Where `base` exists with its own config.json (a longer or continued training of
the world model, say), that is used. Stages can be run alone, on different machines; finished phases
are skipped::

    python benchmarks/skills_state.py --folder runs/skills --stage collect
    python benchmarks/skills_state.py --folder runs/skills --stage learn --device cuda --jobs 4
    python benchmarks/skills_state.py --folder runs/skills --stage evaluate
    python benchmarks/skills_state.py --folder runs/skills --stage summarise

The committed result continued the world model of one run (`--preset medium --device cuda`, 205 s on
an H100) with finer reconstruction, on a CPU, after copying that run's `collect/`::

    diwa world-model --preset medium --run-dir runs/skills/base \\
        --world-model.init-from runs/first --world-model.steps 3000 \\
        --world-model.batch-size 32 --world-model.lr 3e-4 --world-model.lr-final-fraction 0.02 \\
        --world-model.state-weight 200 --world-model.detail-weight 4
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diwa.checkpoint import write_json
from diwa.config import Config, from_dict, to_dict
from diwa.envs import SIMULATORS, TASKS
from diwa.phases.evaluate import summary
from diwa.presets import PRESETS
from diwa.run import RunFolder

RESULT = Path(__file__).parent / "results" / "skills_state.json"
STAGES = ("collect", "learn", "evaluate", "summarise")


def base_config(args: argparse.Namespace) -> Config:
    """Configuration of the shared play and world model."""
    return dataclasses.replace(args.settings, env=args.env, device=args.device, threads=1)


def base_run(args: argparse.Namespace) -> RunFolder:
    """The run that lends its play and world model, with whatever settings made it."""
    path = args.folder / "base"
    saved = path / "config.json"
    if not saved.exists():
        return RunFolder(path, base_config(args))
    config = from_dict(Config, {**json.loads(saved.read_text()), "device": args.device})
    write_json(saved, to_dict(config))  # with settings that are newer than the run
    return RunFolder(path, config, quiet=True)


def training_of(base: Path) -> list[dict[str, Any]]:
    """How a world model was trained, one entry per run that continued another."""
    config = json.loads((base / "config.json").read_text())["world_model"]
    result = json.loads((base / "world_model" / "result.json").read_text())
    keys = ("steps", "batch_size", "seq_len", "lr", "state_weight", "detail_weight")
    own = {k: config[k] for k in keys}
    own["frozen_encoder_steps"] = config.get("frozen_encoder_steps", 0)
    own.update(seconds=result["seconds"], device=result["device"])
    source = config.get("init_from")
    return [*(training_of(Path(source)) if source else []), own]


def skill_config(args: argparse.Namespace, task: str, seed: int) -> Config:
    """Configuration of one skill and seed."""
    base, from_run = base_config(args), str(args.folder / "base")
    collect = dataclasses.replace(base.collect, demos=dict(args.demos).get(task, 0))
    return dataclasses.replace(base, task=task, seed=seed, from_run=from_run, collect=collect)


def skill_folder(args: argparse.Namespace, task: str, seed: int) -> Path:
    """Run folder of one skill and seed."""
    return args.folder / f"{task}-{seed}"


def open_run(args: argparse.Namespace, task: str, seed: int) -> tuple[Config, RunFolder]:
    """The run of one skill and seed; settings of the machine may differ between stages."""
    path = skill_folder(args, task, seed)
    config = skill_config(args, task, seed)
    saved = path / "config.json"
    if saved.exists():  # device and source folder belong to the machine, not to the run
        text = json.loads(saved.read_text())
        text.update(device=config.device, from_run=config.from_run, threads=config.threads)
        write_json(saved, text)
    return config, RunFolder(path, config, quiet=True)


def collect_stage(args: argparse.Namespace) -> None:
    """Play once, then demonstrations and starts of every skill and seed."""
    from diwa.phases.collect import collect

    run = base_run(args)
    collect(run.config, run)
    for task, seed in args.pairs:
        collect(*open_run(args, task, seed))
        print(f"collected {task} seed {seed}", flush=True)


def learn_one(args: argparse.Namespace, task: str, seed: int) -> str:
    """Pre-training, reward and fine-tuning of one skill."""
    from diwa.phases.finetune import finetune
    from diwa.phases.pretrain import pretrain
    from diwa.phases.reward import train_reward
    from diwa.phases.world_model import train_world_model

    config, run = open_run(args, task, seed)
    train_world_model(config, run)
    pretrain(config, run)
    train_reward(config, run)
    result = finetune(config, run)
    return f"{task} {seed}: dream {result['imagined_start']:.2f} -> {result['imagined_final']:.2f}"


def evaluate_one(args: argparse.Namespace, task: str, seed: int) -> str:
    """Base and fine-tuned policy in the simulator."""
    from diwa.phases.evaluate import evaluate_run

    result = evaluate_run(*open_run(args, task, seed))
    rates = [f"{k} {result[k]['success']:.2f}" for k in ("base", "finetuned") if k in result]
    return f"{task} {seed}: {', '.join(rates)}"


def learn_world_model(args: argparse.Namespace) -> None:
    """The shared world model."""
    from diwa.phases.world_model import train_world_model

    run = base_run(args)
    train_world_model(run.config, run)


def for_all(args: argparse.Namespace, work: Callable[..., str], jobs: int) -> None:
    """Run `work` for every skill and seed in `jobs` processes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(work, args, task, seed) for task, seed in args.pairs]
        for future in concurrent.futures.as_completed(futures):
            print(future.result(), flush=True)


def summarise(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the results of the run folders in the published schema."""
    base = base_run(args)
    training = training_of(base.path)
    shared = {
        "collect": base.result("collect")["seconds"],
        "world_model": sum(stage["seconds"] for stage in training),
    }
    tasks: dict[str, Any] = {}
    for task in args.tasks:
        runs = [open_run(args, task, seed)[1] for t, seed in args.pairs if t == task]
        evaluated = [run.result("evaluate") for run in runs]
        tuned = [run.result("finetune") for run in runs]
        phases = ("collect", "pretrain", "reward", "finetune", "evaluate")
        seconds = {p: statistics.mean(r.result(p)["seconds"] for r in runs) for p in phases}
        seconds["play (shared)"] = shared["collect"]
        seconds["world_model (shared)"] = shared["world_model"]
        tasks[task] = {
            **{
                policy: summary(np.concatenate([e[policy]["episodes"] for e in evaluated]))
                for policy in ("base", "finetuned")
            },
            "per_seed": [[e["base"]["success"], e["finetuned"]["success"]] for e in evaluated],
            "imagined_start": statistics.mean(t["imagined_start"] for t in tuned),
            "imagined_final": statistics.mean(t["imagined_final"] for t in tuned),
            "seeds": len(runs),
            "finetune_env_steps": sum(t["finetune_env_steps"] for t in tuned),
            "play_transitions": runs[0].result("collect")["play_transitions"],
            "demos": runs[0].result("collect")["demos"],
            "reward": runs[0].result("reward"),
            "seconds": {k: round(v, 1) for k, v in seconds.items()},
        }
    gains = [t["finetuned"]["success"] - t["base"]["success"] for t in tasks.values()]
    gaps = [abs(t["imagined_final"] - t["finetuned"]["success"]) for t in tasks.values()]
    learned_on = json.loads((skill_folder(args, *args.pairs[0]) / "versions.json").read_text())
    devices = " then ".join(dict.fromkeys(stage["device"] for stage in training))
    device = f"{learned_on['device']}; world model on {devices}"
    return {
        "meta": {
            "commit": learned_on["commit"],
            "date": datetime.date.today().isoformat(),
            "device": device,
            "versions": learned_on,
            "preset": args.preset,
        },
        "mean_gain": statistics.mean(gains),
        "mean_gap": statistics.mean(gaps),
        "world_model_training": training,
        "open_loop": base.result("world_model")["open_loop"],
        "tasks": tasks,
    }


def demos_of_task(text: str) -> tuple[str, int]:
    """`open_drawer=2` -> (`open_drawer`, 2)."""
    task, _, number = text.partition("=")
    if task not in TASKS or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=NUMBER")
    return task, int(number)


def make_parser(description: str, stages: tuple[str, ...] = STAGES) -> argparse.ArgumentParser:
    """Command line of this and similar benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, default=Path("runs/skills"))
    parser.add_argument("--stage", choices=(*stages, "all"), default="all")
    parser.add_argument("--env", choices=tuple(SIMULATORS), default="playtable")
    parser.add_argument("--preset", default="medium", choices=sorted(PRESETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument(
        "--second-seed-tasks", nargs="*", choices=TASKS, help="skills that run all seeds, not one"
    )
    parser.add_argument("--jobs", type=int, default=2, help="skills that learn at the same time")
    parser.add_argument(
        "--demos", nargs="*", type=demos_of_task, default=[], metavar="TASK=NUMBER",
        help="demonstrations of a skill, instead of those in diwa.skills",
    )  # fmt: skip
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with `pairs` of skill and seed."""
    args = parser.parse_args()
    args.folder, args.settings = args.folder.resolve(), PRESETS[args.preset]
    repeated = args.tasks if args.second_seed_tasks is None else args.second_seed_tasks
    args.pairs = [
        (task, seed)
        for seed in args.seeds
        for task in args.tasks
        if seed == args.seeds[0] or task in repeated
    ]
    return args


def run_stages(args: argparse.Namespace, stages: tuple[str, ...]) -> None:
    """Collecting, learning and evaluating, as far as chosen."""
    if "collect" in stages:
        collect_stage(args)
    if "learn" in stages:
        learn_world_model(args)
        for_all(args, learn_one, args.jobs)
    if "evaluate" in stages:
        for_all(args, evaluate_one, 1)


def publish(result: dict[str, Any], path: Path) -> None:
    """Write a result and print it as a table."""
    write_json(path, result)
    for task, t in result["tasks"].items():
        print(
            f"{task:20s} {t['base']['success']:.2f} -> {t['finetuned']['success']:.2f}"
            f"  dream {t['imagined_start']:.2f} -> {t['imagined_final']:.2f}"
        )
    print(f"mean gain {result['mean_gain']:+.3f}, mean gap {result['mean_gap']:.3f}")


def main() -> None:
    """Run the chosen stages."""
    args = parse(make_parser(__doc__.splitlines()[0]))
    stages = STAGES if args.stage == "all" else (args.stage,)
    run_stages(args, stages)
    if "summarise" in stages:
        publish(summarise(args), RESULT)


if __name__ == "__main__":
    main()
