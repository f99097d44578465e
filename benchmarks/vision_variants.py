"""What the robot's pictures are turned into, and what judges a dream -> vision_variants.json.

The paper's three variants on one skill from pixels: a world model of the pictures alone with the
success classifier, the hybrid one with the classifier, and the hybrid one with the task's rule on
the decoded scene. Play, demonstrations and starts are those of a finished run of `vision_small.py`,
and so are the hybrid's world model and base policy; the pictures-only world model is trained here
with the same settings but for the weight of the pictures, which nothing else competes with::

    python benchmarks/vision_variants.py --from-run runs/vision/move_slider_left-0
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import bc_sweep

from diwa.checkpoint import write_json
from diwa.config import Config, WorldModelConfig
from diwa.phases.world_model import train_world_model
from diwa.run import RunFolder

RESULT = Path(__file__).parent / "results" / "vision_variants.json"
ROWS = (("vision", "calibrated"), ("hybrid", "calibrated"), ("hybrid", "decoder"))
"""Observation and reward."""


def pictures_only(base: Path, folder: Path) -> Path:
    """The world model of the pictures alone, on the play of the hybrid one, with the settings that
    this was first trained with; returns its run."""
    config = bc_sweep.read_config(base)
    if config.world_model.init_from:
        return pictures_only(Path(config.world_model.init_from), folder)
    model = dataclasses.replace(
        config.world_model, observation="vision", image_weight=WorldModelConfig.image_weight
    )
    run = RunFolder(folder, dataclasses.replace(config, world_model=model))
    if not run.dir("collect").exists():
        run.dir("collect").symlink_to((base / "collect").resolve())
    train_world_model(run.config, run)
    return folder


def variants(args: argparse.Namespace, source: Config) -> list[tuple[str, str, RunFolder]]:
    """Name, reward and run folder of the rows, ready to be fine-tuned."""
    rows = []
    base = args.from_run.parent / "base"
    lent = {"hybrid": base, "vision": pictures_only(base, args.folder / "vision-base")}
    for observation, reward in ROWS:
        config = dataclasses.replace(
            bc_sweep.variant(source, reward, source.finetune.bc_coef),
            from_run=str(lent[observation].resolve()),
            world_model=dataclasses.replace(source.world_model, observation=observation),
        )
        name = f"{observation}-{reward}"
        run = bc_sweep.prepare(args.from_run, args.folder / name, config)
        train_world_model(config, run)
        rows.append((name, reward, run))
    return rows


def main() -> None:
    """Measure the rows that are not there yet and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from-run", type=Path, required=True, help="a run of vision_small.py")
    parser.add_argument("--folder", type=Path, default=Path("runs/vision_variants"))
    parser.add_argument("--episodes", type=int, default=100, help="test episodes of each policy")
    args = parser.parse_args()
    args.from_run, args.folder = args.from_run.resolve(), args.folder.resolve()
    source = dataclasses.replace(
        bc_sweep.read_config(args.from_run), from_run=str(args.from_run.parent / "base")
    )
    rows: dict[str, Any] = {}
    for name, reward, run in variants(args, source):
        row = bc_sweep.measure(run, reward, args.episodes, new_base=True)
        seen = run.config.world_model.observation
        rows[name] = {"observation": seen, **row, "commit": bc_sweep.commit(run.path)}
        bc_sweep.show(name, row, row["base"])
    write_json(RESULT, {"meta": bc_sweep.describe(source), "rows": rows})


if __name__ == "__main__":
    main()
