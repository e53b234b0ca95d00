"""The joint experiment: does a rewriter hack a relevance model that plain GRPO collapsed more than a balanced one?

    python -m benchmarks.joint_experiment --workdir=runs/joint --output=docs/studies
    python -m benchmarks.joint_experiment --smoke --workdir=runs/joint_smoke

On clips. From one SFT model a seed, two relevance models: by plain GRPO ("collapsed", whether it did is a figure), and
by Stepwise-GRPO with the SFT auxiliary loss ("balanced"), with the updates of `benchmarks.mode_balance`. A rewriter of
the same seed is trained against each. A held-out rewrite is HACKED if its reward is above that of the query as typed
while the independent judge, which knows what the searcher meant and which no reward sees, puts it below. Stopping and
starting again continues. The last line is JSON.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afrl_jax.data.clips_rulebooks import natural_frequencies
from benchmarks import mode_balance, studies
from core_jax import recipe
from core_jax.evaluation import Evaluated
from core_jax.settings import read_settings
from lm_jax import report_pictures
from lm_jax.config_file import read_config
from lm_jax.report_pictures import Picture, Plot, Rows

ARMS = {"collapsed": mode_balance.ARMS["grpo"], "balanced": mode_balance.ARMS["fixed 0.5"]}
COLUMNS = {
    "relevance: macro-F1": "macro_f1", "tail recall": "recall/tail", "entropy": "label_entropy",
    "rewriter: improves (reward)": "improvement_rate", "gain (judge)": "judge_gain", "hacked": "hacked",
    "distinct": "distinct", "copies title": "copies_title",
}  # fmt: skip
Found = Mapping[str, Any]  # of one seed, see `of_seed`


def core_config(relevance: Path, start: Path, seed: int, smoke: bool) -> dict[str, Any]:
    """The rewriter's quickstart, without redeploys, against that relevance model; both start from one SFT model."""
    name = "core_smoke.py" if smoke else "core_quickstart.py"
    config = read_config(studies.CONFIGS / name, [])
    rewriter = {**config["rewriter"], **({} if smoke else {"source": str(start)})}
    changed = {"seed": seed, "relevance": str(relevance), "relevance_config": "", "weekly": {"weeks": 0}}
    return {**config, **changed, "rewriter": rewriter}


def share_start(made: Path, wanted: Path) -> None:
    """The supervised start sees no reward: made for one arm, it is the other's too, bit for bit."""
    start, folder, copy = made / "stages" / "start", wanted / "stages" / "start", wanted / "stages" / "start.copy"
    if (start / "done.json").exists() and not folder.exists():
        shutil.rmtree(copy, ignore_errors=True)  # what a kill left
        shutil.copytree(start, copy)
        copy.replace(folder)


def hacked(evaluated: Evaluated) -> np.ndarray:
    """1.0 for the contexts whose rewrite is hacked: float [N]."""
    return ((evaluated.values["log_gain"] > 0) & (evaluated.values["judge_gain"] < 0)).astype(float)


def hacking(evaluated: Evaluated) -> dict[str, float]:
    """Means over held-out contexts, of those columns that are the rewriter's."""
    values = evaluated.values
    means = {name: float(np.nanmean(values[name])) for name in ("improvement_rate", "judge_gain", "copies_title")}
    means["distinct"] = len({*evaluated.rewrites}) / len(evaluated.rewrites)
    return means | {"hacked": float(hacked(evaluated).mean())}


def rewriter_evaluations(config: Mapping[str, Any], workdir: Path) -> list[Evaluated]:
    """Train, from wherever it stands; the rewriter as it was after the start and after every phase."""
    run = recipe.Recipe(read_settings(config), config, workdir)
    run()
    return [Evaluated.load(workdir / "stages" / f"evaluate.{name}") for name in run.stages]


def hacked_cells(collapsed: Evaluated, balanced: Evaluated) -> list[str]:
    """Cells: hacked by arm, and the difference paired by context (both have the same) with its 95% interval."""
    one, other = hacked(collapsed), hacked(balanced)
    difference = Evaluated(collapsed.queries, collapsed.rewrites, {"hacked": one - other}).figures()["hacked"]
    interval = f"[{difference.low:+.3f}, {difference.high:+.3f}]"
    return [f"{one.mean():.3f}", f"{other.mean():.3f}", f"{difference.value:+.3f} {interval}"]


def of_seed(seed: int, workdir: Path, smoke: bool) -> Found:
    """Run what is missing of one seed: figures and phases of each arm, and the cells of `hacked_cells`."""
    frequency = natural_frequencies()
    start = workdir / "start" / f"seed{seed}"
    studies.run(mode_balance.start_config(seed, smoke), start)
    figures, phases, last = {}, {}, []
    for name, arm in ARMS.items():
        relevance = workdir / name / f"seed{seed}"
        studies.run(mode_balance.arm_config(arm, seed, start, smoke), relevance)
        before, after = studies.predictions_of(start, "sft"), studies.predictions_of(relevance, "rl")
        exported = [(folder / "export").resolve() for folder in (relevance, start)]
        folders = [workdir / f"rewriter_{of}" / f"seed{seed}" for of in (next(iter(ARMS)), name)]
        share_start(*folders)
        evaluated = rewriter_evaluations(core_config(*exported, seed, smoke), folders[1])
        phases[name] = [hacking(each) for each in evaluated]
        figures[name] = mode_balance.measured(after, before, frequency, None) | phases[name][-1]
        last.append(evaluated[-1])
    return {"figures": figures, "phases": phases, "hacked": hacked_cells(*last)}


def _phase_rows(seeds: Sequence[Found]) -> Rows:
    return [
        {"arm": arm, "seed": seed, "phase": phase, "figure": figure, "value": values[figure]}
        for arm in ARMS
        for seed, found in enumerate(seeds)
        for phase, values in enumerate(found["phases"][arm])
        for figure in ("improvement_rate", "judge_gain", "hacked")
    ]


def _draw(rows: Rows) -> Picture:
    """A panel a figure: a faint line a seed, a bold one their mean, over the phases."""
    figures = report_pictures.distinct(rows, "figure")
    picture = report_pictures.blank(report_pictures.WIDTH, 3)
    panels = picture.subplots(1, len(figures))
    for panel, figure in zip(panels, figures, strict=True):
        for arm, color in report_pictures.colors_of(tuple(ARMS)).items():
            of_arm = [row for row in rows if row["arm"] == arm and row["figure"] == figure]
            phases = report_pictures.distinct(of_arm, "phase")
            for seed in report_pictures.distinct(of_arm, "seed"):
                panel.plot(phases, [r["value"] for r in of_arm if r["seed"] == seed], color=color, alpha=0.3)
            means = [np.mean([r["value"] for r in of_arm if r["phase"] == phase]) for phase in phases]
            panel.plot(phases, means, "o-", color=color, label=arm)
        panel.set(xlabel="phase", title=figure.replace("_", " "))
        panel.set_xticks(phases)
    report_pictures.shared_legend(picture)
    return picture


def write_study(seeds: Sequence[Found], folder: Path) -> None:
    """The page of so many seeds."""
    by_arm = {arm: [found["figures"][arm] for found in seeds] for arm in ARMS}
    rows = [[arm, *(studies.cell([s[key] for s in some]) for key in COLUMNS.values())] for arm, some in by_arm.items()]
    pairs = [*zip(*by_arm.values(), strict=True)]
    differences = {key: [one[key] - other[key] for one, other in pairs] for key in COLUMNS.values()}
    rows.append(["collapsed − balanced", *(studies.cell(values, signed=True) for values in differences.values())])
    mean, half = studies.over_seeds(differences["hacked"])
    seen = np.isfinite(half) and abs(mean) > half
    parts = [
        "# The joint experiment",
        f"{len(seeds)} seeds, mean ± half of the 95% t interval over seeds; the last row is paired by seed."
        if len(seeds) > 1 else "One seed, so that there is no interval over seeds.",
        "```\npython -m benchmarks.joint_experiment --workdir=runs/joint --output=docs/studies\n```",
        "Rewriters against the collapsed relevance model are hacked "
        + (("more" if mean > 0 else "less") + " often than against the balanced one." if seen else
           "as often as against the balanced one, as far as these seeds can tell."),
        studies.markdown_table(["relevance model", *COLUMNS], rows),
        "Hacked, by seed, of the held-out contexts; the intervals are over queries, paired by context.",
        studies.markdown_table(
            ["seed", *ARMS, "collapsed − balanced"], [[str(n), *found["hacked"]] for n, found in enumerate(seeds)]
        ),
    ]  # fmt: skip
    plot = Plot("joint_experiment", "By phase", "Phase 0 is the supervised start; faint lines are seeds.",
                _phase_rows(seeds), _draw)  # fmt: skip
    studies.write_page(folder, "joint_experiment", parts, [plot], list(seeds))


def main() -> None:
    """Run what is missing, then write the page."""
    parsed = studies.arguments(__doc__, "runs/joint")
    if parsed.arms:
        raise SystemExit("--arms: this study needs both arms")
    seeds = [of_seed(seed, parsed.workdir, parsed.smoke) for seed in range(parsed.seeds)]
    write_study(seeds, parsed.output)
    print(json.dumps({arm: float(np.mean([found["figures"][arm]["hacked"] for found in seeds])) for arm in ARMS}))


if __name__ == "__main__":
    main()
