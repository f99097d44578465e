"""The report of a run: table, numbers, plots, videos and one page that shows them.

`report/report.json` holds every number of the report and is what other programs should read.
"""

from __future__ import annotations

import html
import sys
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import Config
from .errors import RunError
from .progress import clock
from .run import PHASES, RunFolder

NAMES = {"base": "before: cloned from demonstrations", "finetuned": "after: PPO in imagination"}

SUCCESS_HEAD = ("policy", "success", "95 % interval", "episodes")

CAPTIONS = {
    "success.png": "Success in the simulator from starts that no training has seen, with 95 % "
    "Wilson intervals.",
    "finetune.png": "Success in dreams, with exploration, beside success in the simulator. A gap "
    "between them is the model's error that the policy lives on.",
    "dream.png": "What happened in held-out play, and what the world model predicted from ten "
    "frames and the actions alone.",
    "open_loop.png": "Mean error of that prediction, beside predicting that nothing moves.",
    "pictures.png": "Dreamed pictures, from two frames and the actions, compared with real ones "
    "and with repeating the last frame that was seen.",
    "ppo.png": "Fine-tuning.",
    "training.png": "Losses of the other phases.",
    "before_after.mp4": "Before on the left, after on the right, from the same starts (first those "
    "that only the fine-tuned policy solved); the frame turns green when the skill is done.",
    "dream.mp4": "Held-out play on the left, dreamed from the same ten frames and actions on the "
    "right.",
    "dream_pictures.mp4": "Pictures of held-out play on the left, dreamed from two frames and the "
    "actions on the right.",
}
"""File of the report -> what it shows, in the order of the page."""


def report(config: Config, run: RunFolder) -> dict[str, Any]:
    """The report as the last phase of a run: made unless it is newer than all results."""
    made = run.dir("report") / "report.json"
    results = [run.dir(name) / "result.json" for name in PHASES]
    newest = max((path.stat().st_mtime for path in results if path.exists()), default=0.0)
    if made.exists() and made.stat().st_mtime >= newest:
        return checkpoint.read_json(made)
    return make_report(run)


def make_report(run: RunFolder) -> dict[str, Any]:
    """Write `report/` from what the phases that are done have left; return `report.json`'s content.

    What needs a package that is not installed is left out, with one line that says so.

    Raises:
        RunError: no phase is done.
    """
    folder = run.dir("report")
    numbers = collect_numbers(run)
    folder.mkdir(exist_ok=True)
    numbers["skipped"] = []
    for module, make in (("plots", _plots), ("videos", _videos)):
        try:
            make(run, folder)
        except ImportError as error:
            missing = error.name or error
            line = f'{module} left out, {missing} is missing: pip install "diwa[all]"'
            numbers["skipped"].append(line)
            if not run.quiet:
                print(f"report  {line}", file=sys.stderr)
    numbers["files"] = [name for name in CAPTIONS if (folder / name).exists()]
    table = markdown_table(numbers)
    checkpoint.write_bytes(folder / "report.md", (table + "\n").encode())
    checkpoint.write_bytes(folder / "index.html", page(numbers).encode())
    checkpoint.write_json(folder / "report.json", numbers)
    if not run.quiet:
        print(f"report  {folder / 'index.html'}", file=sys.stderr)
    return numbers


def _plots(run: RunFolder, folder: Path) -> None:
    from . import plots

    plots.draw_all(run, folder)


def _videos(run: RunFolder, folder: Path) -> None:
    from . import video

    video.film_all(run, folder)


def collect_numbers(run: RunFolder) -> dict[str, Any]:
    """All numbers of a run, from the results of the phases that are done.

    Raises:
        RunError: no phase is done.
    """
    results = {
        name: run.result(name) for name in PHASES if (run.dir(name) / "result.json").exists()
    }
    if not results:
        raise RunError(f"nothing to report in {run.path}; `diwa run --run-dir {run.path}` first")
    collected, tuned = results.get("collect", {}), results.get("finetune", {})
    evaluated = results.get("evaluate", {})
    success = {name: evaluated[name] for name in NAMES if name in evaluated}
    numbers: dict[str, Any] = {
        "task": run.config.task,
        "preset": run.config.preset,
        "seed": run.config.seed,
        "versions": checkpoint.read_json(run.path / "versions.json"),
        "phases_done": list(results),
        "success": {k: {f: v[f] for f in ("success", "n", "ci")} for k, v in success.items()},
        "play_transitions": collected.get("play_transitions"),
        "demos": collected.get("demos"),
        "imagined_start": tuned.get("imagined_start"),
        "imagined_final": tuned.get("imagined_final"),
        "finetune_env_steps": tuned.get("finetune_env_steps"),
        "seconds": {name: result["seconds"] for name, result in results.items()},
        "reward": {k: v for k, v in results.get("reward", {}).items() if isinstance(v, dict)},
        "open_loop": {
            name: {"unit": e["unit"], "model": e["model"][-1], "constant": e["constant"][-1]}
            for name, e in results.get("world_model", {}).get("open_loop", {}).items()
        },
    }
    return numbers


def percent(value: float | None) -> str:
    """0.4 -> "40 %"; a dash for None."""
    return "-" if value is None else f"{100 * value:.0f} %"


def success_rows(numbers: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (policy, success, interval, episodes) of the before/after table."""
    rows = []
    for name, entry in numbers["success"].items():
        low, high = entry["ci"]
        interval = f"{100 * low:.0f} to {100 * high:.0f} %"
        rows.append((NAMES[name], percent(entry["success"]), interval, str(entry["n"])))
    return rows


def facts(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """What belongs beside the success rates: (what, value)."""
    success, out = numbers["success"], []
    if len(success) == len(NAMES):
        gain = 100 * (success["finetuned"]["success"] - success["base"]["success"])
        out.append(("gain", f"{gain:+.0f} points"))
    if numbers["imagined_start"] is not None:
        start, final = percent(numbers["imagined_start"]), percent(numbers["imagined_final"])
        out.append(("success in dreams", f"{start} before, {final} after"))
        out.append(("simulator steps in fine-tuning", str(numbers["finetune_env_steps"])))
    if numbers["play_transitions"] is not None:
        out.append(("play transitions", f"{numbers['play_transitions']:,}"))
        out.append(("demonstrations", str(numbers["demos"])))
    seconds = numbers["seconds"]
    each = ", ".join(f"{name} {clock(value)}" for name, value in seconds.items())
    out.append(("time", f"{clock(sum(seconds.values()))} ({each})"))
    return out


def markdown_table(numbers: dict[str, Any]) -> str:
    """The before/after table and the facts beside it, as Markdown."""
    rows = [f"| {' | '.join(row)} |" for row in success_rows(numbers)]
    head = [f"| {numbers['task']} | success | 95 % interval | episodes |", "|---|---|---|---|"]
    lines = [*head, *rows, ""] if rows else []
    return "\n".join([*lines, *(f"- {name}: {value}" for name, value in facts(numbers))])


def print_summary(run: RunFolder) -> None:
    """Print the before/after table on standard output: framed on a terminal, else Markdown."""
    numbers = collect_numbers(run)
    if not sys.stdout.isatty():
        print(markdown_table(numbers))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{numbers['task']} in the simulator", title_justify="left")
    for title in SUCCESS_HEAD:
        table.add_column(title, justify="left" if title == "policy" else "right")
    for row in success_rows(numbers):
        table.add_row(*row)
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    for name, value in facts(numbers):
        console.print(f"[dim]{name}[/dim]  {value}")
    console.print(f"[dim]report[/dim]  {run.dir('report') / 'index.html'}", soft_wrap=True)


def page(numbers: dict[str, Any]) -> str:
    """index.html: the table, plots and videos, with relative links."""
    title = html.escape(f"diwa: {numbers['task']}")
    origin = f"preset {numbers['preset']}, seed {numbers['seed']}"
    open_loop = [
        (name.replace("_", " "), *(f"{e[k]:.3g} {e['unit']}" for k in ("model", "constant")))
        for name, e in numbers["open_loop"].items()
    ]
    versions = " · ".join(f"{k} {v}" for k, v in numbers["versions"].items() if k != "later")
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f"<style>{_CSS}</style>",
        f"<h1>{title}</h1><p>{html.escape(origin)}</p>",
        _table(SUCCESS_HEAD, success_rows(numbers)) if numbers["success"] else "",
        _table(None, facts(numbers)),
        *(_figure(name) for name in numbers["files"]),
        "<h2>World model, error at the last step of the prediction</h2>" if open_loop else "",
        _table(("quantity", "model", "nothing moves"), open_loop) if open_loop else "",
        _reward_section(numbers["reward"]),
        *(f"<p>{html.escape(line)}</p>" for line in numbers["skipped"]),
        f"<footer>{html.escape(versions)} · <a href='report.json'>report.json</a> · "
        "<a href='../config.json'>config.json</a></footer></html>",
    ]
    return "\n".join(part for part in parts if part)


def _reward_section(reward: dict[str, Any]) -> str:
    """Precision and recall of the rewards on held-out windows, failures included."""
    rows = []
    keys = ("precision", "recall", "episode_recall", "episode_false_positive")
    for judge, kinds in reward.items():
        for kind, scores in kinds.items():
            if isinstance(scores, dict):
                rows.append((judge, kind, *(percent(scores.get(key)) for key in keys)))
    if not rows:
        return ""
    head = ("reward", "latents", "precision", "recall", "solved seen", "failed but rewarded")
    return "<h2>Reward on held-out play</h2>" + _table(head, rows)


def _table(head: tuple[str, ...] | None, rows: list[Any]) -> str:
    def line(tag: str, cells: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return (
        f"<table>{line('th', head) if head else ''}{''.join(line('td', r) for r in rows)}</table>"
    )


def _figure(name: str) -> str:
    caption = CAPTIONS[name]
    if name.endswith(".mp4"):
        media = f'<video src="{name}" controls loop muted autoplay></video>'
    else:
        media = f'<a href="{name}"><img src="{name}" alt="{html.escape(caption)}"></a>'
    return f"<figure>{media}<figcaption>{html.escape(caption)}</figcaption></figure>"


_CSS = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .9rem .25rem 0;text-align:left}
th{border-bottom:1px solid #999}figure{margin:2rem 0}img,video{max-width:100%}
figcaption,footer{color:#666;font-size:.9rem}
"""
