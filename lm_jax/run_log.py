"""What a run tells while it runs: log.jsonl and TensorBoard events for programs, a progress line for people."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import rich.console
import rich.progress

Item = TypeVar("Item")
console = rich.console.Console(stderr=True, highlight=False)


_silent = False


def silence() -> None:
    """Tell and log nothing from here on: another process of the run does."""
    global _silent
    _silent = True


class RunLog:
    """Appends one record a step to `workdir`/log.jsonl and to TensorBoard events in `workdir`/tensorboard/STAGE."""

    def __init__(self, workdir: Path):
        self._workdir, self._path = workdir, workdir / "log.jsonl"
        self._events: dict[str, Any] = {}

    def _events_of(self, stage: str, step: int):
        """Where events of a stage go. The first to be written here hides those that TensorBoard has from it on."""
        if stage not in self._events:
            from tensorboardX import SummaryWriter  # slow: it looks for torch

            self._events[stage] = SummaryWriter(str(self._workdir / "tensorboard" / stage), purge_step=step)
        return self._events[stage]

    def seconds(self, stage: str) -> float:
        """What a stage has taken so far, over all the times it was resumed: the `seconds` of its newest record.

        0 in a process that logs nothing: the one that does may be writing.
        """
        if _silent or not self._path.exists():
            return 0.0
        return next((r.get("seconds", 0.0) for r in reversed(read_log(self._path)) if r["stage"] == stage), 0.0)

    def resume(self, stage: str, step: int) -> None:
        """Forget records of `stage` from `step` on and any half-written line: they will be written again."""
        if _silent or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line a kill cut short
            if record["stage"] != stage or record["step"] < step:
                kept.append(line + "\n")
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """One record; numbers that are not finite become null."""
        if _silent:
            return
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._events_of(stage, step).add_scalar(name, value, step)

    def close(self) -> None:
        """Write what waits of the events, if there are any; a later record opens them anew."""
        for events in self._events.values():
            events.close()
        self._events.clear()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl, a line a step. A last line that a kill cut short is left out.

    Any other line that is no JSON raises ValueError with its number.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line.endswith("\n"):
                raise ValueError(f"{path}:{number}: not a log record: {line.strip()!r}") from error
    return records


def say(message: str) -> None:
    """A line for the person who watches."""
    if not _silent:
        console.print(message, markup=False, soft_wrap=True)


def progress(items: Iterable[Item], title: str, total: int, start: int = 0, every: float = 30.0) -> Iterator[Item]:
    """Go through `items` with a progress bar and ETA; where nobody watches, one plain line every `every` seconds."""
    if sys.stderr.isatty() and not _silent:
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("ETA"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
        )
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, completed=start, note="")
            for item in items:
                yield item
                bar.update(task, advance=1, note=_note)
        return
    began = told = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - told > every:
            left = (now - began) / count * (total - start - count)
            say(f"{title}: {start + count}/{total}, {left:.0f} s left  {_note}")
            told = now


_note = ""


def set_note(note: str) -> None:
    """What the progress line says at its end: the figures of the last step."""
    global _note
    _note = note
