"""The `diwa` command: every phase, the whole run, the report and information for bug reports.

Nothing heavy is imported before the command line has been understood, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from .config import Config, from_dict, to_dict
from .errors import DiwaError, RunError
from .presets import PRESETS

if TYPE_CHECKING:
    from .run import RunFolder

USAGE_ERROR = 2
INTERRUPTED = 130

COMMANDS = {
    "run": "all phases in order, then the report; the same command resumes",
    "collect": "1. play, demonstrations and labelled episodes from scripted experts",
    "world-model": "2. learn the world model from play",
    "pretrain": "3. clone the demonstrations into a diffusion policy",
    "reward": "4. learn to see success in latent states",
    "finetune": "5. improve the policy by PPO inside the world model",
    "evaluate": "6. success before and after, in the simulator",
    "report": "7. table, plots, videos and a page that shows them",
    "compare": "base policy, DiWA and the online baseline of several runs, as a table",
    "bench": "speed of the operators on this machine, against plain torch and others",
    "convert": "CALVIN and LeRobot data, checkpoints of DiWA, LUMOS and DPPO, in and out",
    "info": "versions, devices and operators, to be pasted in bug reports",
}
FUNCTIONS = {
    "collect": "diwa.phases.collect:collect",
    "world_model": "diwa.phases.world_model:train_world_model",
    "pretrain": "diwa.phases.pretrain:pretrain",
    "reward": "diwa.phases.reward:train_reward",
    "finetune": "diwa.phases.finetune:finetune",
    "evaluate": "diwa.phases.evaluate:evaluate_run",
    "report": "diwa.report:report",
}
"""Phase -> function of (config, run folder), in the order of a run."""

ONLINE = "diwa.phases.online:finetune_online"
"""The baseline that `diwa finetune --online` runs, which is no phase of a run."""

PARALLEL = ("world-model", "finetune")
"""Commands that `torchrun` may start in several processes."""

TOOLS = {
    "compare": "diwa.compare:main",
    "bench": "diwa.bench:main",
    "convert": "diwa.convert_cli:main",
    "info": "diwa.info:main",
}
"""Command with flags of its own -> function of its arguments that returns the exit code."""

NO_DECODER = (
    "reward.kind decoder reads the scene off the world model, and a vision world model predicts "
    "pictures only; add --reward.kind classifier or use --observation hybrid"
)

SHORT = {"--observation": "--world-model.observation"}
"""Short name of a setting -> its flag."""

SECTIONS = {"policy": "pretrain"}
"""Phase that the settings of a section first matter to, where the names differ."""

EXTRAS = {
    "gymnasium": "sim",
    "pybullet": "sim",
    "pybullet_data": "sim",
    "matplotlib": "report",
    "imageio": "report",
    "imageio_ffmpeg": "report",
    "triton": "triton",
}
"""Module -> extra that installs it."""


@dataclass(frozen=True)
class Options:
    """Flags that every command with a run folder has."""

    config: Path | None = None
    """A config.json whose values are the defaults, instead of a preset."""
    run_dir: Path | None = None
    """Folder of the run [runs/PRESET-TASK-sSEED]. If it exists, its settings are the defaults."""
    overwrite: bool = False
    """Do it again: forget what the folder holds of this phase and those after it."""
    online: bool = False
    """`diwa finetune` only: PPO in the simulator instead, the baseline that DiWA is compared to."""
    # An empty name, so that settings are `--task` and `--world-model.steps`.
    settings: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["small"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for an error, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # As an exception, SIGTERM ends worker processes and leaves nothing half-written.
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DiwaError, ImportError, OSError) as error:
        if os.environ.get("DIWA_DEBUG") == "1":
            raise
        print(f"diwa: {explain(error)}", file=sys.stderr)
        return USAGE_ERROR


def explain(error: Exception) -> str:
    """A short message for a person: what is wrong and the way out."""
    if isinstance(error, DiwaError):
        return str(error)
    debug = "(DIWA_DEBUG=1 shows where)"
    if isinstance(error, ImportError):
        module = (error.name or "").partition(".")[0]
        if module in EXTRAS:
            return f'{module} is not installed; run `pip install "diwa[{EXTRAS[module]}]"`'
        if "pip install" in str(error):
            return str(error)
        return f"{error} {debug}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        return (
            f"the disk is full{where}\n"
            "Free some space and run the same command again: it goes on from the last checkpoint."
        )
    return f"{error} {debug}"


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"diwa {importlib.import_module('diwa').__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean `diwa {close[0]}`?" if close else f"there are {', '.join(COMMANDS)}."
        raise DiwaError(f"there is no command '{command}'; {hint}")
    if command in TOOLS:
        return _load(TOOLS[command])(rest)
    return _run(command, parse(command, rest))


def _overview() -> str:
    lines = [
        f"usage: diwa COMMAND [--preset {'|'.join(PRESETS)}] [--task TASK] [--run-dir DIR] ...",
        "",
        "Improves a robot's diffusion policy by reinforcement learning in a learned world model.",
        "",
        *(f"  {name:<12} {text}" for name, text in COMMANDS.items()),
        "",
        "`diwa run --preset small` does everything. `diwa COMMAND --help` lists every setting.",
    ]
    return "\n".join(lines)


def parse(command: str, arguments: Sequence[str]) -> Options:
    """Options of a command; settings start from a preset, a config.json or the run folder's own.

    Raises:
        DiwaError: no such preset or file, or a value that cannot be.
        SystemExit: other mistakes, explained by tyro with the nearest flag; also `--help`.
    """
    parts = [argument.partition("=") for argument in arguments]
    options = tyro.cli(
        Options,
        prog=f"diwa {command}",
        description=COMMANDS[command].lstrip("1234567. "),
        args=[SHORT.get(flag, flag) + sign + value for flag, sign, value in parts],
        default=Options(settings=_base(arguments)),
    )
    check(options.settings)
    return options


def _base(arguments: Sequence[str]) -> Config:
    """Settings that the other flags change."""
    first = argparse.ArgumentParser("diwa", add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--run-dir", "--run_dir", type=Path)
    known, _ = first.parse_known_args(arguments)
    if known.preset and known.config:
        raise DiwaError("--preset and --config both give the defaults; use one of them")
    if known.preset:
        if known.preset not in PRESETS:
            raise DiwaError(
                f"there is no preset '{known.preset}'; choose from {', '.join(PRESETS)}"
            )
        return PRESETS[known.preset]
    if known.config:
        return load_config(known.config)
    if known.run_dir and (known.run_dir / "config.json").exists():
        return load_config(known.run_dir / "config.json")
    return PRESETS["small"]


def load_config(path: Path) -> Config:
    """Read a config.json.

    Raises:
        DiwaError: it is missing, damaged, or has a setting or a type that `Config` has not.
    """
    from .checkpoint import read_json

    if path.is_dir():
        path = path / "config.json"
    values = read_json(path)
    try:
        config = from_dict(Config, values)
    except (ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is no configuration of this version of diwa: {error}") from None
    check(config, str(path))
    return config


def check(config: Config, source: str = "settings") -> None:
    """Refuse values of the wrong type and values that no setting can have.

    Raises:
        DiwaError: names the setting, its value and what is allowed.
    """
    from typing import get_args, get_type_hints

    def visit(part: Any, prefix: str) -> None:
        for name, hint in get_type_hints(type(part)).items():
            value, label = getattr(part, name), f"{source}: {prefix}{name}"
            if dataclasses.is_dataclass(value):
                visit(value, f"{prefix}{name}.")
            elif get_args(hint) and not isinstance(hint, types.UnionType):
                if value not in get_args(hint):
                    raise DiwaError(
                        f"{label} is {value!r}; choose from {', '.join(get_args(hint))}"
                    )
            elif not isinstance(value, (int, float) if hint is float else hint):
                raise DiwaError(f"{label} is {value!r}; it must be of type {hint}")
            elif isinstance(value, (int, float)) and not value >= 0:
                raise DiwaError(f"{label} is {value}; it must not be negative")

    visit(config, "")
    if config.world_model.observation == "vision" and config.reward.kind == "decoder":
        raise DiwaError(f"{source}: {NO_DECODER}")
    model = config.world_model
    if model.frozen_encoder_steps >= max(model.steps, 1) and not model.init_from:
        raise DiwaError(
            f"{source}: world_model.frozen_encoder_steps is {model.frozen_encoder_steps}; it must "
            f"be less than world_model.steps ({model.steps}), or the encoder never learns"
        )
    if not 1 <= config.finetune.ft_denoising_steps <= config.policy.denoising_steps:
        raise DiwaError(
            f"{source}: finetune.ft_denoising_steps is {config.finetune.ft_denoising_steps}; "
            f"it must be 1 to policy.denoising_steps ({config.policy.denoising_steps})"
        )


def _run(command: str, options: Options) -> int:
    from . import parallel

    if options.online and command != "finetune":
        raise DiwaError("--online belongs to `diwa finetune`")
    if parallel.launched() and (options.online or command not in PARALLEL):
        raise DiwaError(
            f"`diwa {command}{' --online' if options.online else ''}` is one process, start it "
            f"without torchrun; several are for {', '.join(PARALLEL)}"
        )
    with parallel.session(options.settings.device):
        return _run_online(options) if options.online else _run_phases(command, options)


def _run_phases(command: str, options: Options) -> int:
    from . import run as runs

    names = list(FUNCTIONS) if command == "run" else [command.replace("-", "_")]
    run = open_run(options, names[0])
    try:
        if command == "report":
            runs.discard(run.path, names)  # asked for by name it is made anew
        for name in names:
            phase_function(name)(run.config, run)
        if command == "run" or command in ("evaluate", "report"):
            from .report import print_summary

            print_summary(run)
    finally:
        run.close()
    return 0


def _run_online(options: Options) -> int:
    from . import run as runs

    path = _run_path(options)
    if options.overwrite and runs.saved_config(path) is not None:
        runs.discard(path, ["online"])
    run = open_run(dataclasses.replace(options, overwrite=False), "finetune")
    try:
        result = phase_function("online")(run.config, run)
    finally:
        run.close()
    last = result["evaluations"][-1]
    print(f"{result['env_steps']:,} simulator steps, success {last['success']:.0%}")
    return 0


def phase_function(name: str) -> Callable[[Config, RunFolder], dict[str, Any]]:
    """The function of a phase, imported now."""
    return _load(ONLINE if name == "online" else FUNCTIONS[name])


def _load(target: str) -> Callable[..., Any]:
    """The function `module:name`, imported now."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _run_path(options: Options) -> Path:
    """The run folder of a command."""
    config = options.settings
    return options.run_dir or Path("runs") / f"{config.preset}-{config.task}-s{config.seed}"


def open_run(options: Options, first_phase: str) -> RunFolder:
    """Open the run folder, after `--overwrite` has made room for `first_phase` and later ones.

    Raises:
        RunError: the folder has other settings, or is no run folder.
    """
    import torch

    from . import parallel
    from . import run as runs

    config = options.settings
    parallel.on_main(lambda: _prepare(options, first_phase))
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    return runs.RunFolder(_run_path(options), config)


def _prepare(options: Options, first_phase: str) -> None:
    """Check what a run folder is to be used for, and make room in it."""
    from . import run as runs
    from .device import check_device

    config, path = options.settings, _run_path(options)
    saved = runs.saved_config(path)
    if saved is None and path.is_dir() and any(path.iterdir()):
        raise RunError(f"{path} is neither empty nor a run folder; give another --run-dir")
    check_device(config.device)
    if options.overwrite and saved is not None:
        phases = list(FUNCTIONS)[list(FUNCTIONS).index(first_phase) :]
        _check_overwrite(path, runs.differences(saved, to_dict(config)), phases)
        runs.discard(path, phases)
        (path / "config.json").unlink()
        if phases == list(FUNCTIONS):
            (path / "versions.json").unlink(missing_ok=True)


def _check_overwrite(path: Path, changed: dict[str, tuple[Any, Any]], phases: list[str]) -> None:
    """Settings of earlier phases, whose outputs stay, must stay as well."""
    if phases == list(FUNCTIONS):
        return
    for name, (old, new) in changed.items():
        section = name.partition(".")[0]
        if SECTIONS.get(section, section) not in (*phases, "device", "threads", "preset"):
            raise RunError(
                f"{name} is {old} in {path}, {new} now, and earlier phases used it;\n"
                "give another --run-dir, or `diwa run --overwrite` to start from nothing"
            )
