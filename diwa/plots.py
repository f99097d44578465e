"""Plots of a run as PNG files (needs matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from .checkpoint import write_bytes
from .envs.tasks import RULES
from .nn.encoders import FIXTURES
from .run import RunFolder
from .stats import wilson_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)

REAL, DREAM, OTHER = "#1b1b1b", "#d1495b", "#9aa5b1"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
}
WINDOWS = 3
"""Dreams drawn beside reality."""


def draw_all(run: RunFolder, folder: Path) -> None:
    """Draw what the run has data for into `folder`."""
    with plt.rc_context(STYLE):
        for draw in (_success, _finetune, _dream, _open_loop, _pictures, _ppo, _training):
            figure = draw(run)
            if figure is not None:
                _save(figure, folder / f"{draw.__name__.lstrip('_')}.png")


def _save(figure: Any, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    plt.close(figure)
    write_bytes(path, data.getvalue())


def _result(run: RunFolder, name: str) -> dict[str, Any]:
    return run.result(name) if (run.dir(name) / "result.json").exists() else {}


def _grid(n: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Figure with n axes; the rest of the last row stays empty."""
    columns = min(columns, n)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * size[0], rows * size[1]),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:n])


def _label(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")


def _interval_bar(axis: Any, x: float, rate: float, ci: Sequence[float], color: str) -> None:
    error = [[rate - ci[0]], [ci[1] - rate]]
    axis.errorbar(x, rate, yerr=error, fmt="o", color=color, capsize=3, markersize=4)


def _success(run: RunFolder) -> Any:
    entries = {k: v for k, v in _result(run, "evaluate").items() if k in ("base", "finetuned")}
    if not entries:
        return None
    figure, (axis,) = _grid(1, 1, (4.2, 3.4))
    for i, (name, entry) in enumerate(entries.items()):
        axis.bar(i, entry["success"], width=0.6, color=DREAM if name == "finetuned" else OTHER)
        _interval_bar(axis, i, entry["success"], entry["ci"], REAL)
        axis.text(i + 0.05, entry["success"] + 0.01, f"{entry['success']:.0%}", va="bottom")
    axis.set_xticks(range(len(entries)), ["before", "after"][: len(entries)])
    axis.set_xlim(-0.6, len(entries) - 0.4)
    axis.set_ylim(0, 1.08)
    axis.set_ylabel("success in the simulator")
    axis.set_title(f"{run.config.task}, {entries['base']['n']} episodes")
    axis.grid(axis="x", visible=False)
    return figure


def _finetune(run: RunFolder) -> Any:
    rows = run.metrics("finetune")
    if not rows:
        return None
    figure, (axis,) = _grid(1, 1, (7.0, 3.6))
    steps = [row["step"] + 1 for row in rows]
    imagined = [row["finetune/imagined_success"] for row in rows]
    axis.plot(steps, imagined, color=DREAM, label="dreamed, exploring")
    result, evaluated = _result(run, "finetune"), _result(run, "evaluate")
    ends = (0, max(steps))
    if result:
        dreamed = [result["imagined_start"], result["imagined_final"]]
        axis.plot(ends, dreamed, "D", color=DREAM, markersize=5, label="dreamed, as evaluated")
    n = run.config.finetune.eval_episodes
    for row in rows:
        rate = row.get("finetune/real_success")
        if rate is not None:
            _interval_bar(axis, row["step"] + 1, rate, wilson_interval(round(rate * n), n), OTHER)
    for x, name in zip(ends, ("base", "finetuned"), strict=True):
        if name in evaluated:
            entry = evaluated[name]
            _interval_bar(axis, x, entry["success"], entry["ci"], REAL)
    axis.plot([], [], "o", color=OTHER, markersize=4, label="real, validation starts")
    axis.plot([], [], "o", color=REAL, markersize=4, label="real, test starts")
    axis.set_ylim(-0.03, 1.03)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("iteration")
    axis.set_ylabel("success")
    axis.legend(loc="best")
    return figure


def _dream(run: RunFolder) -> Any:
    path = run.dir("world_model") / "dream.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        real, dream, names = file["real"], file["dream"], [str(name) for name in file["names"]]
    if not len(real):
        return None
    fixture = FIXTURES[RULES[run.config.task].index]
    shown = [q for q in ("tcp_x", "tcp_y", "tcp_z", "gripper_width", fixture) if q in names]
    columns = [names.index(q) for q in shown]
    figure, axes = _grid(len(shown) * WINDOWS, WINDOWS, (3.4, 1.6))
    for j, window in enumerate(most_moving(real[..., columns[-1]], WINDOWS)):
        for i, (name, column) in enumerate(zip(shown, columns, strict=True)):
            axis = axes[i * WINDOWS + j]
            axis.plot(real[window, :, column], color=REAL, label="real")
            axis.plot(dream[window, :, column], color=DREAM, ls="--", label="dreamed")
            _widen(axis)
            axis.set_title(name.replace("_", " ") if j == 0 else "", loc="left")
    axes[0].legend(loc="best")
    for axis in axes[-WINDOWS:]:
        axis.set_xlabel("step")
    return figure


def most_moving(values: NDArray[Any], n: int) -> list[int]:
    """Rows of `values [m, T]` with the widest range, at most n."""
    return np.argsort(np.ptp(values, axis=1), kind="stable")[::-1][:n].tolist()


def _widen(axis: Any, least: float = 0.02) -> None:
    """Keep a quantity that stands still from looking wild."""
    low, high = axis.get_ylim()
    if high - low < least:
        middle = (low + high) / 2
        axis.set_ylim(middle - least / 2, middle + least / 2)


def _open_loop(run: RunFolder) -> Any:
    errors = _result(run, "world_model").get("open_loop", {})
    if not errors:
        return None
    figure, axes = _grid(len(errors), 3, (3.2, 2.2))
    for axis, (name, entry) in zip(axes, errors.items(), strict=True):
        steps = range(1, len(entry["model"]) + 1)
        axis.plot(steps, entry["constant"], color=OTHER, label="nothing moves")
        axis.plot(steps, entry["model"], color=DREAM, label="world model")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{_label(name)} ({entry['unit']})", loc="left")
    axes[0].legend(loc="best")
    axes[-1].set_xlabel("steps ahead")
    return figure


def _pictures(run: RunFolder) -> Any:
    cameras = _result(run, "world_model").get("open_loop_pictures", {}).get("cameras", {})
    if not cameras:
        return None
    figure, axes = _grid(2 * len(cameras), 2, (3.6, 2.4))
    for i, (camera, scores) in enumerate(cameras.items()):
        for axis, (name, unit) in zip(
            axes[2 * i :], (("psnr", " (dB)"), ("ssim", "")), strict=False
        ):
            steps = range(1, len(scores[name]["model"]) + 1)
            axis.plot(steps, scores[name]["copy"], color=OTHER, label="last frame seen")
            axis.plot(steps, scores[name]["model"], color=DREAM, label="world model")
            axis.set_title(f"{_label(camera)}: {name.upper()}{unit}", loc="left")
            axis.set_xlabel("steps ahead")
    axes[0].legend(loc="best")
    return figure


def _curves(rows: list[dict[str, Any]], names: Iterable[str]) -> Any:
    names = list(names)
    if not names:
        return None
    figure, axes = _grid(len(names), 3, (3.2, 2.0))
    for axis, name in zip(axes, names, strict=True):
        points = [(row["step"] + 1, row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), color=REAL)
        axis.set_title(name.replace("_", " "), loc="left")
    return figure


def _ppo(run: RunFolder) -> Any:
    rows = run.metrics("finetune")
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("ppo/"))
    return _curves(rows, names)


def _training(run: RunFolder) -> Any:
    rows = [row for row in run.metrics() if row["phase"] in ("world_model", "pretrain", "reward")]
    names = dict.fromkeys(name for row in rows for name in row if "/" in name)
    return _curves(rows, names)
