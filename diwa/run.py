"""Run folders: settings, versions, metrics, progress, checkpoints and resuming of phases.

A run folder holds everything about one run:

    config.json  versions.json  metrics.jsonl  tensorboard/
    <phase>/     model.safetensors  config.json  result.json   (training_state/ until it is done)

The same command continues an interrupted run: a phase with a `result.json` is done, one with a
`training_state/` goes on from there, and gives the same numbers as if it had never stopped.

Of several processes (`parallel`) the main one writes and shows progress; the others make the same
calls, wait where they have to, and read what it wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from . import checkpoint, parallel
from .config import Config, from_dict, to_dict
from .errors import RunError
from .info import versions
from .progress import Progress, clock

PHASES = ("collect", "world_model", "pretrain", "reward", "finetune", "evaluate", "report")
"""In the order in which a run goes through them."""

Generators = Mapping[str, torch.Generator | np.random.Generator]


class RunFolder:
    """The folder of one run. Making it writes `config.json` and `versions.json`.

    Args:
        path: the folder; made if it does not exist.
        config: settings of the run.
        quiet: show no progress.

    Raises:
        RunError: the folder belongs to a run with other settings.
    """

    def __init__(self, path: str | Path, config: Config, *, quiet: bool = False) -> None:
        self.path, self.config = Path(path), config
        self.quiet = quiet or not parallel.is_main()
        self._metrics: TextIO | None = None
        parallel.on_main(self._make)

    def _make(self) -> None:
        config, saved = self.config, saved_config(self.path)
        if saved is not None:
            _check_same(self.path, saved, to_dict(config))
        elif self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; give another --run-dir")
        else:
            checkpoint.write_json(self.path / "config.json", to_dict(config))
        if not (self.path / "versions.json").exists():
            checkpoint.write_json(self.path / "versions.json", versions(config.device))

    def note_versions(self) -> None:
        """Called when there is work to do: adds this session's versions if they are others."""
        path, now = self.path / "versions.json", versions(self.config.device)
        first = checkpoint.read_json(path)
        later = first.pop("later", [])
        if now != (later[-1] if later else first):
            checkpoint.write_json(path, {**first, "later": [*later, now]})

    def dir(self, name: str) -> Path:
        """Folder of phase `name` (not made)."""
        return self.path / name

    def phase(self, name: str, total: int, key: str | None = None) -> Phase:
        """Context manager of one phase of `total` steps; `key` is the metric progress shows."""
        return Phase(self, name, total, key)

    def result(self, name: str) -> dict[str, Any]:
        """Result of a finished phase.

        Raises:
            RunError: the phase has not been finished; names the command that does it.
        """
        path = self.dir(name) / "result.json"
        if not path.exists():
            raise RunError(
                f"phase '{name}' of {self.path} is not done; "
                f"run `diwa {name.replace('_', '-')} --run-dir {self.path}` first"
            )
        return checkpoint.read_json(path)

    def metrics(self, phase: str | None = None) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl`, all or those of one phase."""
        rows = _rows(self.path / "metrics.jsonl")
        return [row for _, row in rows if phase is None or row["phase"] == phase]

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row to `metrics.jsonl`; it is in the file when this returns."""
        if self._metrics is None:
            path = self.path / "metrics.jsonl"
            self._metrics = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._metrics.write(json.dumps(row) + "\n")

    def truncate_metrics(self, phase: str, start: int) -> None:
        """Drop the rows of `phase` with step >= `start`, and a row cut off by a kill."""
        path = self.path / "metrics.jsonl"
        self.close()
        if path.exists():
            kept = [
                line for line, row in _rows(path) if row["phase"] != phase or row["step"] < start
            ]
            checkpoint.write_bytes(path, "".join(kept).encode())

    def close(self) -> None:
        """Close the metrics file; it opens again when needed."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


class Phase:
    """One phase of a run, used as `with run.phase(...) as phase`.

    Attributes:
        dir: folder of the phase; exists inside the `with` block unless `done`.
        done: the phase was finished before; `result` holds its result.
        start: first step still to do.
    """

    def __init__(self, run: RunFolder, name: str, total: int, key: str | None) -> None:
        self.run, self.name, self.total, self.key = run, name, total, key
        self.dir = run.dir(name)
        self.done = (self.dir / "result.json").exists()
        self.result: dict[str, Any] | None = run.result(name) if self.done else None
        self.start = 0
        self._seconds_before = 0.0
        self._truncated = False
        self._writer: Any = None

    @property
    def _state_dir(self) -> Path:
        return self.dir / "training_state"

    def __enter__(self) -> Phase:
        self._began = time.monotonic()
        self._progress = Progress(
            self.name, self.total, self.key, quiet=self.run.quiet or self.done
        )
        if self.result is not None:
            if not self.run.quiet:
                spent = clock(self.result.get("seconds", 0))
                print(f"{self.name}  done before, in {spent}", file=sys.stderr)
            return self
        parallel.on_main(self._open)
        return self

    def _open(self) -> None:
        self.run.note_versions()
        self.dir.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._sweep()

    def __exit__(self, *_: object) -> None:
        finished = (self.dir / "result.json").exists()
        summary = f"done in {clock(self._seconds())}" if finished and not self.done else None
        self._progress.close(summary)
        if self._writer is not None:
            self._writer.close()
        self.run.close()
        if not self.done and parallel.is_main():
            self._sweep()
            os.close(self._lock_fd)
            (self.dir / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # stays unless it is empty
                self.dir.rmdir()

    def _lock(self) -> None:
        """Hold the folder for this process; two would mix up their metrics and checkpoints."""
        self._lock_fd = os.open(self.dir / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            self._progress.close()
            raise RunError(
                f"another process is working on {self.dir}; wait for it or give another --run-dir"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _sweep(self) -> None:
        """Remove files that a killed process was in the middle of writing."""
        for folder in (self.dir, self._state_dir):
            for path in folder.glob(f".*{checkpoint.TEMP_SUFFIX}"):
                path.unlink(missing_ok=True)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def restore(self, modules: Mapping[str, Any], generators: Generators) -> dict[str, Any]:
        """Continue from the last checkpoint, if there is one: loads it in place, sets `start`.

        Args:
            modules: the modules and optimizers that `checkpoint` is given.
            generators: the random generators that `checkpoint` is given.

        Returns:
            The `extra` of the checkpoint; empty when the phase starts afresh.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit.
        """
        state = checkpoint.load_training_state(
            self._state_dir, modules=modules, generators=generators
        )
        extra: dict[str, Any] = {}
        if state is not None:
            self.start, self._seconds_before, extra = (
                state["step"],
                state["seconds"],
                state["extra"],
            )
            self._progress.message(f"{self.name}  resumes at step {self.start}/{self.total}")
        parallel.on_main(self._truncate)  # also: nobody goes on before all have read the checkpoint
        return extra

    def _truncate(self) -> None:
        self.run.truncate_metrics(self.name, self.start)
        self._truncated = True

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of step `step`, counted from 0: JSONL, TensorBoard, progress.

        Of several processes the main one's are logged.

        Raises:
            RunError: a metric is NaN or infinite; names it and the step.
        """
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise RunError(
                    f"phase '{self.name}': {name} is {value} at step {step}. Check the data, or "
                    f"lower the learning rate (`diwa {self.name.replace('_', '-')} --help`); "
                    "what was done until the last checkpoint is kept."
                )
        if not parallel.is_main():
            return
        if not self._truncated:
            self._truncate()
        row = {"phase": self.name, "step": step, "time": round(time.time(), 3), **values}
        self.run.append_metrics(row)
        if self._writer is None:
            self._writer = _tensorboard(self.run.path / "tensorboard" / self.name, self.start)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._progress.update(step, values)

    def message(self, text: str) -> None:
        """Show a line beside the progress."""
        self._progress.message(text)

    def checkpoint(
        self,
        step: int,
        modules: Mapping[str, Any],
        generators: Generators,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the state after `step` steps are done, atomically; of the main process.

        Args:
            modules: name -> module, optimizer or anything else with a `state_dict`.
            generators: name -> random generator of torch or NumPy.
            extra: more to be kept: nested dicts and lists of tensors, arrays, numbers, strings.
        """
        if not parallel.is_main():
            return
        values = {"step": step, "seconds": self._seconds(), "extra": dict(extra or {})}
        checkpoint.save_training_state(
            self._state_dir, modules=modules, generators=generators, values=values
        )

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write `result` with the `seconds` the phase took over all sessions, and return it.

        Of several processes the main one's is written, and returned in all.
        """
        parallel.on_main(lambda: self._finish(result))
        self.result = self.run.result(self.name)
        return self.result

    def _finish(self, result: Mapping[str, Any]) -> None:
        values = {**result, "seconds": round(self._seconds(), 3)}
        checkpoint.write_json(self.dir / "result.json", values)
        shutil.rmtree(self._state_dir, ignore_errors=True)


class _NoWriter:
    """Stands in for TensorBoard's writer where TensorBoard is not installed."""

    def add_scalar(self, *_: object) -> None: ...

    def close(self) -> None: ...


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return _NoWriter()
    return SummaryWriter(str(folder), purge_step=start or None)


def saved_config(path: Path) -> dict[str, Any] | None:
    """`config.json` of a run folder as a dict, None where there is none.

    Settings that are newer than the run get their defaults, which is what it ran with.
    """
    file = Path(path) / "config.json"
    if not file.exists():
        return None
    values = checkpoint.read_json(file)
    try:
        return to_dict(from_dict(Config, values))
    except (ValueError, TypeError, AttributeError):  # damaged, or of another version: compare as is
        return values


def discard(path: Path, phases: Iterable[str]) -> None:
    """Delete the outputs, curves and metrics of some phases of a run folder."""
    names = set(phases)
    for name in names:
        shutil.rmtree(path / name, ignore_errors=True)
        shutil.rmtree(path / "tensorboard" / name, ignore_errors=True)
    metrics = path / "metrics.jsonl"
    if metrics.exists():
        kept = [line for line, row in _rows(metrics) if row["phase"] not in names]
        checkpoint.write_bytes(metrics, "".join(kept).encode())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"world_model.steps": 3000, ...}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as {"finetune.gamma": (old value, new value)}."""
    a, b = flatten(old), flatten(new)
    names = [*a, *(name for name in b if name not in a)]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changed = differences(old, new)
    if changed:
        lines = "\n".join(f"  {name}: {a} there, {b} now" for name, (a, b) in changed.items())
        raise RunError(
            f"{path} belongs to a run with other settings:\n{lines}\n"
            "Give another --run-dir, the same settings, or --overwrite."
        )


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of `metrics.jsonl` with their content; a line cut off by a kill is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if line.endswith("\n"):
                yield line, row
