"""`diwa convert`: CALVIN splits, LeRobot datasets and the checkpoints of DiWA, LUMOS and DPPO."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .errors import DiwaError, StoreError
from .skills import TaskName

FolderArgument = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class Calvin:
    """A CALVIN split, once, into an episode store. Killed, the same command goes on."""

    split_dir: FolderArgument
    """Folder of the split, such as task_D_D/training."""
    store_dir: FolderArgument
    """Store to make; it appears when it is complete."""
    size: int = 64
    """Frames are shrunk to this many pixels by area interpolation; 0 keeps their size."""
    exact: bool = False
    """Keep every array as recorded, so that `to-calvin` writes the split again bit for bit."""
    check: bool = False
    """Only decode every frame and list those that cannot be used."""
    overwrite: bool = False
    """Replace a store that is there already."""

    def __call__(self) -> None:
        from .data.calvin_convert import calvin_to_store
        from .data.calvin_format import CalvinSplit

        if self.check:
            split = CalvinSplit(self.split_dir)
            split.verify()
            with _Bar("checking", split.frames) as bar:
                damaged = split.damaged(progress=bar)
            if damaged:
                listed = "\n".join(damaged)
                raise StoreError(f"{len(damaged)} of {split.frames} frames are damaged:\n{listed}")
            print(f"{split.frames} frames of {len(split.episodes)} episodes are complete")
            return
        with _Bar("converting") as bar:
            store = calvin_to_store(
                self.split_dir,
                self.store_dir,
                size=self.size,
                exact=self.exact,
                overwrite=self.overwrite,
                progress=bar,
            )
        print(f"{store.path}: {store.frames} frames in {len(store)} episodes")


@dataclass(frozen=True)
class Demos:
    """Annotated segments of one skill out of a CALVIN split, with success labels."""

    split_dir: FolderArgument
    """Folder of the split; it needs lang_annotations."""
    store_dir: FolderArgument
    """Store to make."""
    task: TaskName
    """Skill."""
    n: int = 50
    """Segments, drawn at random; 0 takes all."""
    seed: int = 42
    """Of the draw."""
    size: int = 64
    """Pixels of the frames; 0 leaves them out."""
    overwrite: bool = False
    """Replace a store that is there already."""

    def __call__(self) -> None:
        from .data.calvin_convert import demonstrations_to_store

        store = demonstrations_to_store(
            self.split_dir,
            self.store_dir,
            self.task,
            n=self.n,
            seed=self.seed,
            size=self.size,
            overwrite=self.overwrite,
        )
        solved = sum(bool(episode.success.any()) for episode in store)  # type: ignore[union-attr]
        print(f"{store.path}: {len(store)} segments of {self.task}, {solved} solved by its rule")


@dataclass(frozen=True)
class LeRobot:
    """A LeRobot dataset (version 3), of one's own robot say, into an episode store."""

    dataset_dir: FolderArgument
    """Folder of the dataset; it holds meta/info.json."""
    store_dir: FolderArgument
    """Store to make; it appears when it is complete."""
    camera: tuple[str, ...] = ()
    """Cameras, KEY=NAME: the feature and its column in the store, such as
    observation.images.top=rgb_static observation.images.wrist=rgb_gripper."""
    action: str = "action"
    """Feature of the actions: 7 numbers, motion and rotation of the tool and the gripper."""
    action_dims: tuple[int, ...] = ()
    """Which of its numbers, in this order; all if not given."""
    action_scale: tuple[float, ...] = (1.0,)
    """Actions are multiplied by this, one number or seven, to lie in [-1, 1]..."""
    action_offset: tuple[float, ...] = (0.0,)
    """...and then shifted by this: scale 2 and offset -1 where a gripper has 0 closed to 1 open."""
    state: str = ""
    """Feature of the robot's state: kept whole as `state`, its first 15 numbers as `robot_obs`."""
    scene: str = ""
    """Feature of the scene state, 24 numbers."""
    success: str = ""
    """Feature that is true where the task is solved, such as next.success."""
    task: TaskName | None = None
    """Skill that the episodes show; play if not given."""
    sentence: str = ""
    """Only the episodes whose task, in words, is this one."""
    size: int = 64
    """Pictures are shrunk to squares of this many pixels by area interpolation; 0 keeps them."""
    overwrite: bool = False
    """Replace a store that is there already."""

    def __call__(self) -> None:
        from .data.lerobot_convert import LeRobotKeys, lerobot_to_store, parse_cameras

        keys = LeRobotKeys(
            parse_cameras(self.camera),
            self.action,
            self.action_dims,
            self.action_scale,
            self.action_offset,
            self.state,
            self.scene,
            self.success,
        )
        with _Bar("converting") as bar:
            store = lerobot_to_store(
                self.dataset_dir,
                self.store_dir,
                keys,
                task=self.task or "",
                sentence=self.sentence,
                size=self.size,
                overwrite=self.overwrite,
                progress=bar,
            )
        print(
            f"{store.path}: {store.frames} frames in {len(store)} episodes, "
            f"{store.source['fps']:g} per second"
        )


@dataclass(frozen=True)
class ToCalvin:
    """An episode store into a split in CALVIN's layout."""

    store_dir: FolderArgument
    """An episode store."""
    split_dir: FolderArgument
    """Folder to make; it appears when it is complete."""
    first_frame: int = 0
    """Number of the first frame, where the store does not know it."""

    def __call__(self) -> None:
        from .data.calvin_convert import store_to_calvin

        with _Bar("writing") as bar:
            store_to_calvin(
                self.store_dir, self.split_dir, first_frame=self.first_frame, progress=bar
            )
        print(f"{self.split_dir}: written")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of DiWA, LUMOS or DPPO into a model folder of safetensors. Runs no pickle."""

    file: FolderArgument
    """Checkpoint file (.ckpt, .pt)."""
    out_dir: FolderArgument
    """Model folder to make."""
    kind: Literal["world-model", "policy", "reward"]
    """What is in it."""
    weights: Literal["auto", "ema", "model"] = "auto"
    """Which dict of a policy checkpoint; auto takes the average (ema) where there is one."""
    denoising_steps: int = 20
    """K of a policy, which its weights do not tell."""
    ft_steps: int = 10
    """Kf of a fine-tuned policy, which its weights do not tell."""
    stoch_classes: int = 32
    """C of a world model, which its weights do not tell."""
    rename: tuple[str, ...] = ()
    """Prefixes of names to replace, OLD=NEW, for checkpoints with other names."""
    skip_unknown: bool = False
    """Keep tensors that have no place here in extra.safetensors instead of refusing."""

    def __call__(self) -> None:
        from .convert import convert_checkpoint

        print(
            convert_checkpoint(
                self.file,
                self.out_dir,
                self.kind,
                weights=self.weights,
                denoising_steps=self.denoising_steps,
                ft_steps=self.ft_steps,
                stoch_classes=self.stoch_classes,
                rename=self.rename,
                skip_unknown=self.skip_unknown,
            ).describe()
        )


@dataclass(frozen=True)
class ToCheckpoint:
    """A model folder back into a checkpoint file with the original's names."""

    model_dir: FolderArgument
    """Folder made by `diwa convert checkpoint` or by a run."""
    file: FolderArgument
    """Checkpoint file to write."""

    def __call__(self) -> None:
        from .convert import export_checkpoint

        export_checkpoint(self.model_dir, self.file)
        print(f"{self.file}: written")


COMMANDS: dict[str, type] = {
    "calvin": Calvin,
    "demos": Demos,
    "lerobot": LeRobot,
    "to-calvin": ToCalvin,
    "checkpoint": Checkpoint,
    "to-checkpoint": ToCheckpoint,
}


class _Bar:
    """The progress line as a callback of (done, total)."""

    def __init__(self, name: str, total: int = 0) -> None:
        from .progress import Progress

        self._make: Callable[[int], Any] = lambda n: Progress(name, n, None, quiet=False)
        self._bar = self._make(total) if total else None

    def __enter__(self) -> _Bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._make(total)
        self._bar.update(done - 1, {})

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def main(arguments: Sequence[str]) -> int:
    """Run `diwa convert ARGUMENTS` and return 0.

    Raises:
        DiwaError: no such conversion, or it failed.
        SystemExit: mistakes in flags, explained by tyro; also `--help`.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `diwa convert {close[0]}`?" if close else "see `diwa convert --help`."
        raise DiwaError(f"there is no conversion '{name}'; {hint}")
    tyro.cli(COMMANDS[name], prog=f"diwa convert {name}", args=rest)()
    return 0


def _overview() -> str:
    lines = ["usage: diwa convert WHAT FROM TO [--flag VALUE] ...", ""]
    lines += [
        f"  {name:<14} {(cls.__doc__ or '').splitlines()[0]}" for name, cls in COMMANDS.items()
    ]
    lines += ["", "`diwa convert WHAT --help` lists every flag."]
    return "\n".join(lines)
