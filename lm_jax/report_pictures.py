"""The pictures of a report. Each is drawn from a list of rows alone, and those rows are the CSV beside the PNG.

A `draw_*` function turns rows into a matplotlib Figure. No global matplotlib state is touched.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

Rows = list[dict[str, Any]]

# Okabe and Ito's palette, told apart by every kind of colour vision; yellow left out on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
WIDTH = 10  # inches of a whole picture
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "savefig.dpi": 144,
}


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """A color for each name, the same whichever of them a picture shows."""
    return dict(zip(names, itertools.cycle(COLORS), strict=False))


class Plot(NamedTuple):
    """A picture to be: file name, what it shows, its rows and how to draw them."""

    name: str
    title: str
    caption: str
    rows: Rows
    draw: Callable[[Rows], Picture]

    def save(self, folder: Path) -> None:
        """Write <name>.csv and <name>.png into the folder."""
        with (folder / f"{self.name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        with matplotlib.rc_context(STYLE):
            self.draw(self.rows).savefig(folder / f"{self.name}.png")


def series_rows(records: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]) -> Rows:
    """One row a logged number (null is one that was not finite): stage, step, series, value."""
    return [
        {"stage": record["stage"], "step": record["step"], "series": name, "value": value}
        for record in records
        for name, value in record.items()
        if wanted(name) and value is not None
    ]


def draw_series(rows: Rows, unit: str) -> Picture:
    """A panel a stage, a line a series over steps: faint as logged, bold its running mean."""
    stages, names = distinct(rows, "stage"), distinct(rows, "series")
    columns = min(3, len(stages))
    lines = -(-len(stages) // columns)
    picture = blank(WIDTH, 2.8 * lines + 0.6)
    panels = list(picture.subplots(lines, columns, squeeze=False).flat)
    for panel, stage in zip(panels, stages, strict=False):
        for name, color in colors_of(names).items():
            points = [row for row in rows if row["stage"] == stage and row["series"] == name]
            if points:
                smoothed(panel, [row["step"] for row in points], [row["value"] for row in points], name, color)
        panel.set(title=stage, xlabel="step", ylabel=unit)
    for unused in panels[len(stages) :]:
        unused.remove()
    if len(names) > 1:
        shared_legend(picture)
    return picture


def smoothed(panel: Axes, steps: Sequence[float], values: Sequence[float], name: str, color: str) -> None:
    """Adds a line to a panel: faint as measured, bold its running mean over a 25th of the points."""
    window = max(1, len(values) // 25)
    kernel = np.ones(window)
    mean = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
    panel.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
    panel.plot(steps, mean, color=color, linewidth=1.8, label=name)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def shared_legend(picture: Picture) -> None:
    """One legend above all panels; what several panels show is named once."""
    handles = {
        name: handle for panel in picture.axes for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    columns = int(picture.get_figwidth() // 2.2)
    picture.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns)


def blank(width: float, height: float) -> Picture:
    """An empty picture of that many inches, whose parts make room for each other."""
    return Picture(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06))


def distinct(rows: Rows, column: str) -> list:
    """The values of a column, each once, in order of appearance."""
    return list(dict.fromkeys(row[column] for row in rows))
