"""What the studies share: many small runs of the recipe, resumable; figures over seeds; tables and pictures.

A run lives in <workdir>/<name>/seed<n>. Starting a study again goes on where it stopped; a finished run is read.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from afrl_jax.evaluation import BUCKETS, Predictions, frequency_bucket
from afrl_jax.model_evaluation import Evaluated
from afrl_jax.recipe import Recipe
from afrl_jax.settings import read_settings
from lm_jax import run_log
from lm_jax.config_file import read_config
from lm_jax.program import before_jax
from lm_jax.report_pictures import Plot
from lm_jax.run_folder import refuse_other_config

CONFIGS = Path(__file__).parents[1] / "configs"


def arguments(description: str, workdir: str, data_root: str = "") -> argparse.Namespace:
    """The command line of a study: --workdir, --seeds, --output, --smoke, --arms, and --data_root where it has one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path(workdir), help="where the runs live, or go on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for the page and its pictures; default WORKDIR/study")
    parser.add_argument("--arms", help="names of arms, comma separated; default all")
    parser.add_argument("--smoke", action="store_true", help="the sizes of configs/afrl_smoke.py: checks that all runs")
    if data_root:
        parser.add_argument(
            "--data_root", type=Path, default=Path(data_root), help=f"real data sets; default {data_root}"
        )
    parsed = parser.parse_args()
    parsed.output = parsed.output or parsed.workdir / "study"
    if parsed.smoke:
        parsed.seeds = min(parsed.seeds, 2)
    before_jax()
    return parsed


def base_config(smoke: bool) -> dict[str, Any]:
    """The quickstart's config, or the smoke run's, of which a study changes what it studies."""
    return read_config(CONFIGS / ("afrl_smoke.py" if smoke else "afrl_quickstart.py"), [])


def run(config: Mapping[str, Any], workdir: Path) -> None:
    """Run a config to its end, from wherever it stands.

    Raises:
        ConfigChanged: the folder holds a run of another config, finished or not.
    """
    refuse_other_config(workdir, config)
    if not (workdir / "stages" / "export" / "done.json").exists():
        run_log.say(f"--- {workdir}")
        workdir.parent.mkdir(parents=True, exist_ok=True)
        Recipe(read_settings(config), config, workdir)()


def seconds_of(workdir: Path) -> float:
    """What all stages of a finished run took, whenever that was."""
    return sum(json.loads(file.read_text()).get("seconds", 0.0) for file in (workdir / "stages").glob("*/done.json"))


def predictions_of(workdir: Path, name: str) -> Predictions:
    """What a run's model of that name ("sft", "rl") said of the test pairs."""
    return Evaluated.load(workdir / "stages" / f"evaluate.{name}").predictions


def buckets(frequency: Mapping[int, float]) -> dict[str, list[int]]:
    """head, torso and tail rules."""
    found: dict[str, list[int]] = {name: [] for name in BUCKETS}
    for rule, share in sorted(frequency.items()):
        found[frequency_bucket(share)].append(rule)
    return found


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the 95% t interval over seeds); the half is infinite for a single seed."""
    known = np.array([value for value in values if value is not None and math.isfinite(value)], float)
    if known.size == 0:
        return math.nan, math.inf
    if known.size == 1:
        return float(known[0]), math.inf
    return float(known.mean()), float(stats.t.ppf(0.975, known.size - 1) * known.std(ddof=1) / np.sqrt(known.size))


def cell(values: Sequence[float], *, signed: bool = False) -> str:
    """A figure for a table: mean ± half interval over seeds."""
    mean, half = over_seeds(values)
    if math.isnan(mean):
        return "–"
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return text if math.isinf(half) else f"{text} ± {half:.3f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_page(folder: Path, name: str, parts: Sequence[str], plots: Sequence[Plot], records: Any) -> None:
    """<name>.md, <name>.json with every figure behind it, and the pictures with their CSV files, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for plot in plots:
        if plot.rows:
            plot.save(folder)
            shown.append(f"## {plot.title}\n\n{plot.caption}\n\n![{plot.title}]({plot.name}.png)")
    (folder / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n\n".join([*parts, *shown]) + "\n")
    run_log.say(f"{folder / name}.md")


def chosen(arms: Mapping[str, Callable], names: str | None) -> dict[str, Callable]:
    """The arms of that comma separated list, by default all; ValueError for one that is none."""
    if not names:
        return dict(arms)
    wanted = names.split(",")
    if unknown := set(wanted) - set(arms):
        raise ValueError(f"--arms: {', '.join(sorted(unknown))}: unknown; there are {', '.join(arms)}")
    return {name: arms[name] for name in wanted}
