"""What keeps PPO honest in dreams: the behaviour-cloning coefficient, the reward, the policy.

Fine-tunes one skill of an existing run again, once per coefficient of the cloning term and reward,
and once with a Gaussian policy, and evaluates each policy in dreams (judged by the reward it was
trained on) and in the simulator: benchmarks/results/bc_sweep.json.
Play, world model, demonstrations, base policy and reward are those of the run, which stays as it
is. Without the term a policy may learn what only the world model believes (success in dreams up,
in the simulator not); with too much of it, it stays what it was. Rows that are finished are kept::

    python benchmarks/bc_sweep.py --from-run runs/skills/move_slider_left-0 --folder runs/bc_sweep
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

from diwa.checkpoint import write_json
from diwa.config import Config, from_dict
from diwa.info import device_name
from diwa.phases.collect import TEST_STARTS
from diwa.phases.evaluate import evaluate_agent, load_agents, summary, task_starts
from diwa.phases.finetune import finetune
from diwa.phases.pretrain import pretrain
from diwa.phases.reward import train_reward
from diwa.run import RunFolder

RESULT = Path(__file__).parent / "results" / "bc_sweep.json"
PLOT = Path(__file__).parent / "plots" / "bc_sweep.png"
COEFFICIENTS = (0.0, 0.5, 0.05, 0.1, 0.025, 0.01)
"""The paper's, the telling ones first."""
REWARDS: dict[str, dict[str, Any]] = {
    "decoder": {"kind": "decoder"},
    "classifier": {"kind": "classifier", "false_positives": 1.0},
    "calibrated": {"kind": "classifier", "windows": 1500, "steps": 3000},
}
"""The task's rule, the classifier as in the paper, and one of more data and a careful threshold."""
REUSED = ("collect", "world_model", "pretrain", "reward")


def variant(source: Config, reward: str, coefficient: float) -> Config:
    """The run's settings with another reward and weight of the cloning term (section 7.5)."""
    return dataclasses.replace(
        source,
        reward=dataclasses.replace(source.reward, **REWARDS[reward]),
        finetune=dataclasses.replace(source.finetune, bc_coef=coefficient),
    )


def gaussian(source: Config) -> Config:
    """The run's settings with the other policy (section 7.2)."""
    policy = dataclasses.replace(source.policy, kind="gaussian")
    return dataclasses.replace(source, policy=policy)


def fits(phase: str, source: Config, config: Config) -> bool:
    """Whether what a phase of the source made is what `config` would make."""
    same = source.world_model.observation == config.world_model.observation
    if phase == "pretrain":
        return same and source.policy.kind == config.policy.kind
    if phase == "reward":  # the classifier is trained, its threshold chosen, for either kind
        return same and dataclasses.replace(source.reward, kind=config.reward.kind) == config.reward
    return same or phase == "collect"


def prepare(source: Path, path: Path, config: Config) -> RunFolder:
    """A run folder that begins with the phases of the source, up to its fine-tuning, that fit."""
    run = RunFolder(path, config, quiet=True)
    made_by = read_config(source)
    for name in REUSED:
        if fits(name, made_by, config) and not run.dir(name).exists():
            partial = run.path / f".{name}.copying"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / name, partial)
            partial.rename(run.dir(name))
    return run


def read_config(run: Path) -> Config:
    """The settings of a run folder."""
    return from_dict(Config, json.loads((run / "config.json").read_text()))


def measure(run: RunFolder, reward: str, episodes: int, new_base: bool) -> dict[str, Any]:
    """Fine-tune and evaluate on the test starts; the base policy, too, where it is another."""
    file, config = run.path / "row.json", run.config
    if file.exists() and (row := json.loads(file.read_text()))["finetuned"]["n"] == episodes:
        return row
    pretrain(config, run)
    train_reward(config, run)
    result = finetune(config, run)
    starts = task_starts(config.task, episodes, TEST_STARTS, config.env)
    agents = load_agents(config, run)
    real = {
        name: summary(evaluate_agent(agent, config, starts, seed=config.seed))
        for name, agent in agents.items()
        if name == "finetuned" or new_base
    }
    rows = run.metrics("finetune")
    row = {
        "bc_coef": config.finetune.bc_coef,
        "reward": reward,
        "policy": config.policy.kind,
        **real,
        "imagined_start": result["imagined_start"],
        "imagined_final": result["imagined_final"],
        "imagined_curve": [round(r["finetune/imagined_success"], 3) for r in rows],
        "seconds": round(result["seconds"]),
    }
    write_json(file, row)
    return row


def base_success(run: RunFolder, episodes: int) -> dict[str, Any]:
    """The base policy on the same starts."""
    file = run.path / "base.json"
    if file.exists() and (found := json.loads(file.read_text()))["n"] == episodes:
        return found
    starts = task_starts(run.config.task, episodes, TEST_STARTS, run.config.env)
    agent = load_agents(run.config, run)["base"]
    found = summary(evaluate_agent(agent, run.config, starts, seed=run.config.seed))
    write_json(file, found)
    return found


def commit(run: Path) -> str:
    """That of the code which made a run folder."""
    return json.loads((run / "versions.json").read_text())["commit"]


def show(name: str, row: dict[str, Any], base: dict[str, Any]) -> None:
    """Print a row."""
    print(
        f"{name:18s} dream {row['imagined_start']:.2f} -> {row['imagined_final']:.2f}  "
        f"real {base['success']:.2f} -> {row['finetuned']['success']:.2f}",
        flush=True,
    )


def describe(source: Config) -> dict[str, Any]:
    """What a result was measured on; every row names its own commit."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name("cpu"),
        **{name: getattr(source, name) for name in ("preset", "task", "seed")},
        "iterations": source.finetune.iterations,
    }


def finished_rows(folder: Path) -> dict[str, Any]:
    """All rows measured so far, by reward and coefficient."""
    found = {
        f.parent.name: {**json.loads(f.read_text()), "commit": commit(f.parent)}
        for f in folder.glob("*/row.json")
    }
    key = ("policy", "reward", "bc_coef")
    return dict(sorted(found.items(), key=lambda item: [item[1][k] for k in key]))


def draw(result: dict[str, Any], path: Path) -> None:
    """Success over the coefficient, dreamed and in the simulator, a panel per reward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(REWARDS), figsize=(10, 3.4), sharey=True)
    rows = [row for row in result["rows"].values() if row["policy"] == "diffusion"]
    for axes, reward in zip(panels, REWARDS, strict=True):
        ours = sorted((r for r in rows if r["reward"] == reward), key=lambda r: r["bc_coef"])
        places = range(len(ours))
        real = [r["finetuned"]["success"] for r in ours]
        ends = [r["finetuned"]["ci"] for r in ours]
        around = [[abs(s - ci[i]) for s, ci in zip(real, ends, strict=True)] for i in (0, 1)]
        axes.errorbar(places, real, around, fmt="o-", capsize=3, label="simulator (95 %)")
        axes.plot(places, [r["imagined_final"] for r in ours], "s--", label="dreamed")
        axes.axhline(result["base"]["success"], color="grey", linewidth=0.8, label="base policy")
        axes.set_xticks(places, [f"{r['bc_coef']:g}" for r in ours])
        axes.set(title=f"reward: {reward}", xlabel="BC coefficient", ylim=(0, 1.05))
    panels[0].set_ylabel(f"success, {result['meta']['task']}")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from-run", type=Path, required=True, help="a finished run of one skill")
    parser.add_argument("--folder", type=Path, default=Path("runs/bc_sweep"))
    parser.add_argument("--coefficients", nargs="*", type=float, default=COEFFICIENTS)
    parser.add_argument("--rewards", nargs="*", choices=REWARDS, default=tuple(REWARDS))
    parser.add_argument("--gaussian", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--episodes", type=int, default=100, help="test episodes of each row")
    parser.add_argument("--iterations", type=int, help="PPO iterations, where not the run's own")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def main() -> None:
    """Measure row after row; the result is written after each."""
    args = parse()
    source = read_config(args.from_run)
    ppo = dataclasses.replace(source.finetune, eval_every=0)  # only the last policy is asked for
    if args.iterations:
        ppo = dataclasses.replace(ppo, iterations=args.iterations)
    source = dataclasses.replace(source, finetune=ppo)
    plan = [
        (f"{reward}-{c:g}", reward, variant(source, reward, c))
        for c in args.coefficients
        for reward in args.rewards
    ]
    if args.gaussian:
        plan.append(("gaussian", source.reward.kind, gaussian(source)))
    base = base_success(prepare(args.from_run, args.folder / "base", source), args.episodes)
    for name, reward, config in plan:
        run = prepare(args.from_run, args.folder / name, config)
        row = measure(run, reward, args.episodes, config.policy != source.policy)
        show(name, row, row.get("base", base))
        found = {"meta": describe(source), "base": base, "rows": finished_rows(args.folder)}
        write_json(args.out, found)
    if plan and args.out == RESULT:
        draw(found, PLOT)


if __name__ == "__main__":
    main()
