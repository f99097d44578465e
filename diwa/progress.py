"""One line of progress: a live `rich` line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 10.0
"""Without a terminal a line appears this often..."""
PLAIN_FRACTION = 0.05
"""...or after this share of the steps, but not more than once in `PLAIN_LEAST` seconds."""
PLAIN_LEAST = 2.0


class Progress:
    """Progress of one phase on standard error.

    Args:
        name: what is going on.
        total: steps of the whole phase.
        key: metric shown beside the steps, e.g. `world_model/loss`.
        quiet: show nothing.
    """

    def __init__(self, name: str, total: int, key: str | None, *, quiet: bool) -> None:
        self.name, self.total, self.key, self.quiet = name, total, key, quiet
        self._value = ""
        self._first: int | None = None
        self._began = self._shown = time.monotonic()
        self._shown_step = 0
        self._live: RichProgress | None = None
        if not quiet and sys.stderr.isatty():
            self._start_live()

    def _start_live(self) -> None:
        self._live = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[note]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = self._live.add_task(self.name, total=self.total, note="")
        self._live.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step number `step` (counted from 0) is done, with these metrics."""
        if self.quiet:
            return
        now, done = time.monotonic(), step + 1
        if self._first is None:
            # Speed is measured from here on, so a resumed phase does not look too fast.
            self._first, self._began, self._shown_step = done, now, step
        if self.key is not None and self.key in metrics:
            self._value = f"{self.key} {metrics[self.key]:.4g}"
        if self._live is not None:
            self._live.update(self._task, completed=done, note=self._note(done, now))
            return
        waited, advanced = now - self._shown, done - self._shown_step
        if waited >= PLAIN_SECONDS or (
            waited >= PLAIN_LEAST and advanced >= PLAIN_FRACTION * self.total
        ):
            self._shown, self._shown_step = now, done
            print(f"{self.name}  {done}/{self.total}  {self._note(done, now)}", file=sys.stderr)

    def _note(self, done: int, now: float) -> str:
        steps, seconds = done - (self._first or 0), now - self._began
        if steps <= 0 or seconds < 0.5:
            return self._value
        rate = steps / seconds
        left = max(self.total - done, 0) / rate
        speed = f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step"
        return f"{self._value}  {speed}  {clock(left)} left".strip()

    def message(self, text: str) -> None:
        """Print a line without breaking the live one."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr)

    def close(self, summary: str | None = None) -> None:
        """End the line; `summary` stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if summary is not None and not self.quiet:
            print(f"{self.name}  {summary}  {self._value}".rstrip(), file=sys.stderr)


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
