"""Instruction evolution on clips: does the loop recover the rules that were taken away, and does the model read them?

    python -m benchmarks.instruction_evolution --workdir=runs/instruction_evolution --output=docs/studies
    python -m benchmarks.instruction_evolution --smoke --workdir=runs/instruction_evolution_smoke

Two judges, each from a base instruction without the rare rules: "ideal", who follows every word - what the loop can do;
"model", trained by configs/afrl_rulebooks.py to read - what it does. Beside both, as many random edits, and the full
rulebook as ceiling, in its own words and in words that training never showed. And on real judgments, CrowdFlower's shop
search: "zero-shot", SmolLM2-135M as it is (`make smollm2`), from a task of one line; left out where data or weights
are not there. Test pairs are graded after the last round only. Stopping and starting again continues. The last line is
JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from afrl_jax.data import clips_rulebooks, sources
from afrl_jax.evaluation import BUCKETS
from afrl_jax.instructions.ideal_reader import IdealReader
from afrl_jax.instructions.probe import ModelJudge
from afrl_jax.instructions.run import EvolutionSettings, evolve_instruction
from afrl_jax.schema import Instruction, Judgment, Scale
from afrl_jax.scoring import RelevanceModel
from benchmarks import studies
from lm_jax import report_pictures, run_log
from lm_jax.config_file import read_config
from lm_jax.report_pictures import Picture, Plot, Rows
from lm_jax.run_folder import RunFolder

COMMAND = "python -m benchmarks.instruction_evolution --workdir=runs/instruction_evolution --output=docs/studies"
FULL, HELD_OUT = "full rulebook", "full rulebook, held-out wording"
ZERO_SHOT = "zero-shot"
SMOLLM2 = "weights/smollm2-135m-instruct-q4_1.gguf"
COLUMNS = {"macro-F1": "macro_f1", **{name: f"rule_recall/{name}" for name in BUCKETS}}


def ideal(seed: int, workdir: Path, smoke: bool) -> dict[str, float]:
    """Metrics of the loop with a judge that follows every word."""
    queries, rounds = (30, 1) if smoke else (300, 4)
    mix = {"rule_balance": 0.5}
    decided = {
        "dev_new": clips_rulebooks.decided_groups(3 * seed, "dev", queries, 8, **mix),
        "dev_replay": clips_rulebooks.decided_groups(3 * seed + 1, "dev", queries // 2, 8, **mix),
        "test": clips_rulebooks.decided_groups(3 * seed + 2, "test", queries, 8, **mix),
    }
    settings = EvolutionSettings(rounds=rounds, seed=seed)
    RunFolder(workdir, {"settings": dataclasses.asdict(settings), "queries": queries})
    file = workdir / "report" / "metrics.json"
    if not file.exists():
        evolve_instruction(
            IdealReader(one for some in decided.values() for one in some),
            clips_rulebooks.base_instruction(),
            {name: [one.judgment for one in some] for name, some in decided.items()},
            settings,
            workdir,
            references={FULL: clips_rulebooks.full_rulebook()},
            rule_frequency=clips_rulebooks.natural_frequencies(),
        )
    return json.loads(file.read_text())


def model(seed: int, workdir: Path, smoke: bool) -> dict[str, float]:
    """Metrics of the loop with the model that the config trains."""
    config: dict[str, Any] = read_config(studies.CONFIGS / "afrl_rulebooks.py", [])
    config["seed"] = seed
    if smoke:
        small = studies.base_config(True)
        config["teacher"] = small["teacher"]
        config["text"] |= {"steps": 2}
        for name in ("grade", "read"):
            config[name] |= {"steps": 2}
        config["data"]["texts"]["texts"] = 100
        for source in config["data"].values():
            source |= {"queries": 40 if "keep" in source else 12} if "queries" in source else {}
        config["evolve"] |= {"rounds": 1, "clusters": 1, "edits": 1, "synthesize": 0}
        config["evaluation"] |= {"explained_pairs": 0, "resamples": 20}
    studies.run(config, workdir)
    return json.loads((workdir / "evolution" / "report" / "metrics.json").read_text())


def zero_shot(seed: int, workdir: Path, smoke: bool, data_root: Path) -> dict[str, float]:
    """Metrics of the loop on shop search. A query has some forty pairs, much alike: a few of each are judged."""
    settings = EvolutionSettings(rounds=1 if smoke else 2, clusters=1 if smoke else 3, edits=2, seed=seed)
    RunFolder(workdir, {"settings": dataclasses.asdict(settings), "data": str(data_root), "smoke": smoke})
    file = workdir / "report" / "metrics.json"
    if not file.exists():
        base = Instruction("Judge how well the product matches the shopping query.", Scale(("1", "2", "3", "4")))
        train, dev = data_root / "crowdflower" / "train", data_root / "crowdflower" / "dev"
        parts = {
            "calibration": (train, (0.0, 0.2), 3), "dev_new": (train, (0.2, 0.7), 3),
            "dev_replay": (train, (0.7, 1.0), 3), "test": (dev, (0.0, 1.0), 15),
        }  # fmt: skip
        sets = {
            name: _thinned({"format": "folder", "path": str(path), "keep": keep}, base, pairs, seed)[
                : 8 if smoke else None
            ]
            for name, (path, keep, pairs) in parts.items()
        }
        judge = ModelJudge(RelevanceModel.load(SMOLLM2, instruction=base), sets.pop("calibration"))
        evolve_instruction(judge, base, sets, settings, workdir)
    return json.loads(file.read_text())


def _thinned(source: Mapping[str, Any], base: Instruction, pairs: int, seed: int) -> list[Judgment]:
    """At most so many pairs of each query, drawn by the seed."""
    of_query: dict[str, list[Judgment]] = {}
    for judgment in sources.open_judgments(source, base, 0):
        of_query.setdefault(judgment.query.query_id, []).append(judgment)
    random = np.random.default_rng(seed)
    return [some[i] for some in of_query.values() for i in sorted(random.permutation(len(some))[:pairs])]


def _tested_names(metrics: Mapping[str, float]) -> dict[str, str]:
    """ "base", "mined 1", ..., "random" and the references -> how the metrics name them."""
    rounds = sorted({int(key.split()[2].split("/")[0]) for key in metrics if key.startswith("mined round ")})
    names = {"base": "mined round 0"} | {f"mined {number}": f"mined round {number}" for number in rounds[1:]}
    last = max(int(key.split()[2].split("/")[0]) for key in metrics if key.startswith("random round "))
    names |= {"random": f"random round {last}", FULL: FULL, HELD_OUT: HELD_OUT}
    return {name: prefix for name, prefix in names.items() if f"{prefix}/macro_f1" in metrics}


def by_round(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Tested figures by name of the instruction."""
    return {
        name: {column: metrics[f"{prefix}/{key}"] for column, key in COLUMNS.items() if f"{prefix}/{key}" in metrics}
        for name, prefix in _tested_names(metrics).items()
    }


def real_table(metrics: Mapping[str, float]) -> str:
    """Figures of a single run by instruction, with 95% intervals over the test queries."""
    columns = {"macro-F1": "macro_f1", "QWK": "quadratic_weighted_kappa", "pair accuracy": "pair_accuracy"}
    rows = [
        [name, *("{:.3f} [{:.3f}, {:.3f}]".format(*(metrics[f"{prefix}/{key}{end}"] for end in ("", "/low", "/high")))
                 for key in columns.values())]
        for name, prefix in _tested_names(metrics).items()
    ]  # fmt: skip
    return studies.markdown_table(["instruction", *columns], rows)


def table(seeds: list[dict[str, dict[str, float]]]) -> str:
    """Figures by instruction, mean over seeds; a seed whose loop ended early has its last round in the later ones."""
    names = list(dict.fromkeys(name for seed in seeds for name in seed))
    names.sort(key=lambda name: (name in (FULL, HELD_OUT), name == "random"))
    rows = [
        [name, *(studies.cell([_at(seed, name).get(column, np.nan) for seed in seeds]) for column in COLUMNS)]
        for name in names
    ]
    return studies.markdown_table(["instruction", *COLUMNS], rows)


def _at(seed: Mapping[str, dict[str, float]], name: str) -> dict[str, float]:
    return seed.get(name) or (_last(seed) if name.startswith("mined ") else {})


def _last(seed: Mapping[str, dict[str, float]]) -> dict[str, float]:
    return seed[[key for key in seed if key == "base" or key.startswith("mined ")][-1]]


def _rows(found: Mapping[str, list[dict[str, float]]]) -> Rows:
    """One row a judge, seed, arm and round: macro-F1 on dev_new."""
    return [
        {"judge": judge, "seed": seed, "arm": key.split("/")[0], "round": int(key.split("/")[1]), "macro_f1": value}
        for judge, seeds in found.items()
        for seed, metrics in enumerate(seeds)
        for key, value in metrics.items()
        if key.endswith("/dev_new")
    ]


def _draw(rows: Rows) -> Picture:
    judges, arms = report_pictures.distinct(rows, "judge"), report_pictures.distinct(rows, "arm")
    picture = report_pictures.blank(report_pictures.WIDTH, 3.6)
    colors = report_pictures.colors_of(arms)
    panels = picture.subplots(1, len(judges), squeeze=False, sharey=True).flat
    for panel, judge in zip(panels, judges, strict=True):
        for arm in arms:
            for seed in report_pictures.distinct(rows, "seed"):
                line = [r for r in rows if (r["judge"], r["arm"], r["seed"]) == (judge, arm, seed)]
                label = arm if seed == 0 else None
                panel.plot([r["round"] for r in line], [r["macro_f1"] for r in line], "o-", color=colors[arm],
                           markersize=4, alpha=0.7, label=label)  # fmt: skip
        panel.set(title=judge, xlabel="round", ylabel="macro-F1 on dev_new" if judge == judges[0] else "")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    report_pictures.shared_legend(picture)
    return picture


def main() -> None:
    """Run what is missing, then write the page."""
    parsed = studies.arguments(__doc__, "runs/instruction_evolution", data_root="../shared/data")
    judges = studies.chosen({"ideal": ideal, "model": model, ZERO_SHOT: zero_shot}, parsed.arms)
    real = judges.pop(ZERO_SHOT, None)
    if real and not parsed.arms and not ((parsed.data_root / "crowdflower").is_dir() and Path(SMOLLM2).exists()):
        run_log.say(f"{ZERO_SHOT} is left out: it needs {parsed.data_root}/crowdflower and {SMOLLM2}")
        real = None
    found = {
        name: [judge(seed, parsed.workdir / name / f"seed{seed}", parsed.smoke) for seed in range(parsed.seeds)]
        for name, judge in judges.items()
    }
    tested = {name: [by_round(metrics) for metrics in seeds] for name, seeds in found.items()}
    shown = [f"## Judge: {name}\n\n{table(seeds)}" for name, seeds in tested.items()]
    if real:
        found[ZERO_SHOT] = [metrics := real(0, parsed.workdir / ZERO_SHOT, parsed.smoke, parsed.data_root)]
        tested[ZERO_SHOT] = [by_round(metrics)]
        told = "One run on shop search, from a task of one line; 95% intervals over test queries."
        shown.append(f"## Judge: SmolLM2-135M, zero-shot\n\n{told}\n\n{real_table(metrics)}")
    parts = [
        "# Instruction evolution",
        f"{parsed.seeds} seeds, mean ± half of the 95% t interval over seeds, on test pairs that no round saw. Head, "
        "torso and tail are rules by their share of the natural mix; the base lacks the tail.",
        f"```\n{COMMAND}\n```",
        *shown,
    ]
    caption = "A line a seed; the control has as many proposals in every round."
    plot = Plot("instruction_evolution", "By round", caption, _rows(found), _draw)
    studies.write_page(parsed.output, "instruction_evolution", parts, [plot], tested)
    print(json.dumps({name: [_last(seed)["macro-F1"] for seed in seeds] for name, seeds in tested.items()}))


if __name__ == "__main__":
    main()
