"""Two skills from pixels, before and after fine-tuning -> benchmarks/results/vision_small.json.

The hybrid world model sees two cameras of 64 x 64 pixels and the robot's own state. Everything runs
on a CPU: play with one fixture (both directions of the slider), the world model, then both skills
in processes of their own. Finished phases are skipped::

    python -m benchmarks.vision_small --folder runs/vision

The committed result trained the world model in two goes, the second with the encoder at rest::

    diwa collect --preset pixels --task move_slider_left --run-dir runs/vision/first
    diwa world-model --run-dir runs/vision/first
    diwa world-model --preset pixels --task move_slider_left --run-dir runs/vision/base \\
        --world-model.init-from runs/vision/first --world-model.steps 8000 \\
        --world-model.frozen-encoder-steps 8000 --world-model.lr 7e-4

where `runs/vision/base/collect` is a link to that of `first`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import skills_state
from diwa.checkpoint import write_json
from diwa.config import Config
from diwa.nn.vision import CAMERAS
from diwa.phases.evaluate import evaluate_run
from diwa.presets import PRESETS

RESULT = Path(__file__).parent / "results" / "vision_small.json"
PLOT = Path(__file__).parent / "plots" / "dream_pictures.png"
STEPS = (0, 2, 5, 10, 20, 30, 40, 60, 79)
"""Of the first held-out window, in the plot."""
SETTINGS = dataclasses.replace(PRESETS["pixels"], task="move_slider_left")
DEMOS = {"move_slider_left": 2, "move_slider_right": 1}
"""Demonstrations with which imitation alone succeeds in about half of the validation episodes."""
SHOWN = ("observation", "image_size", "cnn_depth", "image_weight", "image_stride")


def cpu_seconds() -> float:
    """Processor time of this process and its children that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def note_cpu(folder: Path, name: str, before: float) -> None:
    """Keep what one stage of a run took; wall time says little on a shared machine."""
    path = folder / "cpu_seconds.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**known, name: round(cpu_seconds() - before, 1)})


def shared_stages(args: argparse.Namespace) -> None:
    """Play and world model of the shared run, unless they are there."""
    from diwa.phases.collect import collect
    from diwa.phases.world_model import train_world_model

    run = skills_state.base_run(args)
    for name, phase in (("collect", collect), ("world_model", train_world_model)):
        if not (run.dir(name) / "result.json").exists():
            before = cpu_seconds()
            phase(run.config, run)
            note_cpu(run.path, name, before)


def one_skill(args: argparse.Namespace, task: str, seed: int) -> str:
    """Demonstrations, policy, fine-tuning and evaluation of one skill."""
    from diwa.phases.collect import collect

    before = cpu_seconds()
    config, run = skills_state.open_run(args, task, seed)
    collect(config, run)
    learned = skills_state.learn_one(args, task, seed)
    result = evaluate_run(config, run)
    note_cpu(run.path, "skill", before)
    rates = " -> ".join(f"{result[k]['success']:.2f}" for k in ("base", "finetuned"))
    return f"{learned}, real {rates}"


def summarise(args: argparse.Namespace) -> dict[str, Any]:
    """The schema of skills_state.json with the scores of the dreamed pictures and times."""
    base = skills_state.base_run(args)
    folders = [base.path, *(skills_state.skill_folder(args, *pair) for pair in args.pairs)]
    cpu = {}
    for folder in folders:
        path = folder / "cpu_seconds.json"
        cpu[folder.name] = json.loads(path.read_text()) if path.exists() else {}
    config: Config = base.config
    model = base.result("world_model")
    return {
        **skills_state.summarise(args),
        "open_loop_pictures": model["open_loop_pictures"],
        "world_model": {
            **{name: getattr(config.world_model, name) for name in SHOWN},
            "parameters": model["parameters"],
        },
        "cpu_seconds": cpu,
    }


def draw(films: Path, path: Path) -> None:
    """Real pictures above dreamed ones, of both cameras."""
    import matplotlib.pyplot as plt

    with np.load(films) as seen:
        rows = [
            np.concatenate([seen[f"{kind}_{camera}"][0, step] for step in STEPS], 1)
            for camera in CAMERAS
            for kind in ("real", "dream")
        ]
    plt.imsave(path, np.concatenate(rows))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/vision"))
    parser.add_argument("--tasks", nargs="+", default=list(DEMOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="skills that learn at the same time")
    args = parser.parse_args()
    args.folder, args.settings = args.folder.resolve(), SETTINGS
    args.device, args.preset, args.env = "cpu", SETTINGS.preset, SETTINGS.env
    args.demos = list(DEMOS.items())
    args.pairs = [(task, seed) for seed in args.seeds for task in args.tasks]
    return args


def main() -> None:
    """Run what is not done yet and write the result."""
    args = parse()
    shared_stages(args)
    skills_state.for_all(args, one_skill, args.jobs)
    result = summarise(args)
    write_json(RESULT, result)
    draw(skills_state.base_run(args).dir("world_model") / "dream_pictures.npz", PLOT)
    for task, t in result["tasks"].items():
        print(f"{task:20s} {t['base']['success']:.2f} -> {t['finetuned']['success']:.2f}")
    for camera, scores in result["open_loop_pictures"]["cameras"].items():
        ends = [scores["psnr"][k] for k in ("model", "copy")]
        print(f"{camera}: PSNR {ends[0][0]:.1f} to {ends[0][-1]:.1f} dB, copy {ends[1][-1]:.1f} dB")


if __name__ == "__main__":
    main()
