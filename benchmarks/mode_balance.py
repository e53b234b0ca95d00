"""The mode-balance study: does RL alone lose rare rules, does an SFT auxiliary loss keep them, and what is to blame?

    python -m benchmarks.mode_balance --workdir=runs/mode_balance --output=docs/studies
    python -m benchmarks.mode_balance --smoke --workdir=runs/mode_balance_smoke

On clips. Every arm of a seed starts from the same SFT model and makes the same number of updates with the same
rollouts a step; every arm that sees experts sees the same number of expert rows a step, from the same rule-stratified
set, and the arm "sft" is those alone. Two arms are unequal by what they are: "gated" sees the right answers of its own
prompts, where their group was dead, and "rehearsal" right answers of the start model. Nothing is tuned for one arm.
Stopping and starting again continues.

The world: prompts in the natural mix, experts in even shares, tests with even shares so that rare rules can be counted;
head, torso and tail are told by the natural mix. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from afrl_jax.data.clips_rulebooks import natural_frequencies
from afrl_jax.evaluation import BUCKETS, Predictions, evaluate_predictions
from benchmarks import studies
from lm_jax import report_pictures
from lm_jax.report_pictures import Picture, Plot, Rows
from lm_jax.run_log import read_log

CURVE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)  # lambda
LOST = 0.10  # a rule is lost where its recall falls by more than this below the SFT start
LEAST_PAIRS = 20  # of a rule, to say so
NO_EXPERTS = {"rollouts": {"expert_rows": 0}, "experts_from": "", "sft_weight": 0.0}


@dataclasses.dataclass(frozen=True)
class Arm:
    """Changes of the RL stage; `supervised` replaces it by SFT on the expert rows alone."""

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    supervised: bool = False


ARMS: dict[str, Arm] = {
    "sft": Arm(supervised=True),
    "grpo": Arm({**NO_EXPERTS, "rollouts": {"expert_rows": 0, "stepwise": False}}),
    "stepwise": Arm(NO_EXPERTS),
    "stepwise + kl": Arm({**NO_EXPERTS, "kl": 0.05}),
    "exact": Arm({**NO_EXPERTS, "rollouts": {"expert_rows": 0, "label": "exact"}}),
    **{f"fixed {weight:g}": Arm({"arm": "fixed", "sft_weight": weight}) for weight in CURVE},
    "decay": Arm({"arm": "decay", "sft_weight": 0.5, "sft_weight_end": 0.02}),
    "gated": Arm({"arm": "gated", "sft_weight": 0.5, "rollouts": {"gated": True}}),
    "token": Arm({"arm": "token", "sft_weight": 0.5}),
    "rehearsal": Arm({"arm": "rehearsal", "sft_weight": 0.5}),
    "exact + fixed 0.5": Arm({"arm": "fixed", "sft_weight": 0.5, "rollouts": {"label": "exact"}}),
}


def start_config(seed: int, smoke: bool) -> dict[str, Any]:
    """The SFT model that every arm of a seed starts from."""
    config = studies.base_config(smoke)
    last = [name for name in config["stages"] if config[name]["kind"] == "sft"][-1]
    names = config["stages"][: config["stages"].index(last) + 1]
    stages = tuple(name for name in names if config[name].get("model", "teacher") == "teacher")
    test = {**config["data"]["dev"], "rule_balance": 0.8}
    if not smoke:
        test["queries"] = 400
    config["data"] = {**config["data"], "dev": test}
    return {**config, "seed": seed, "stages": stages, "title": "mode balance: SFT start"}


def arm_config(arm: Arm, seed: int, start: Path, smoke: bool) -> dict[str, Any]:
    """One arm: a stage from the exported SFT model."""
    base = start_config(seed, smoke)
    source = str(start / "export")
    config = {key: base[key] for key in ("data", "student", "show_rules", "evaluation") if key in base}
    quick = studies.base_config(smoke)["rl"]
    steps = 4 if smoke else 60
    experts = {"expert_rows": 2 if smoke else 4}
    prompts = quick["prompts_from"]
    common = {"steps": steps, "learning_rate": 5e-5, "schedule": "constant", "save_every": steps}
    if arm.supervised:
        size = {"rows": experts["expert_rows"], "row_tokens": base[base["stages"][-1]]["row_tokens"]}
        stage = {"kind": "sft", "mixture": {"expert": 1.0}, **size, **common}
    else:
        rollouts = {**quick["rollouts"], **experts, **arm.changes.get("rollouts", {})}
        changes = {key: value for key, value in arm.changes.items() if key != "rollouts"}
        stage = {"kind": "rl", "prompts_from": prompts, "experts_from": "expert", **common}
        stage |= {**changes, "rollouts": rollouts}
    model = {"teacher": {"source": source}, "tokenizer": source}
    return {**config, **model, "seed": seed, "title": "mode balance", "stages": ("arm",), "arm": stage}


def measured(
    predictions: Predictions, start: Predictions, frequency: Mapping[int, float], workdir: Path | None
) -> dict[str, float]:
    """The columns of the study for one run, beside its start on the same pairs."""
    figures = {k: f.value for k, f in evaluate_predictions(predictions, rule_frequency=frequency, resamples=1).items()}
    before = {k: f.value for k, f in evaluate_predictions(start, rule_frequency=frequency, resamples=1).items()}
    pairs = dict(zip(*np.unique(predictions.rule, return_counts=True), strict=True))
    counted = [rule for rule, count in pairs.items() if count >= LEAST_PAIRS]
    falls = {rule: before[f"rule_recall/{rule}"] - figures[f"rule_recall/{rule}"] for rule in counted}
    names = ("accuracy", "macro_f1", "label_entropy", "pass@8", "ece_before_calibration")
    found = {name: figures[name] for name in names if name in figures}
    found |= {f"recall/{bucket}": figures.get(f"rule_recall/{bucket}", np.nan) for bucket in BUCKETS}
    found["rules_lost"] = sum(fall > LOST for fall in falls.values())
    found["rules_counted"] = len(falls)
    right, was = predictions.predicted == predictions.grade, start.predicted == start.grade
    for bucket, rules in studies.buckets(frequency).items():
        inside = np.isin(predictions.rule, rules)
        found[f"solved_now_only/{bucket}"] = int(np.sum(inside & right & ~was))
        found[f"solved_before_only/{bucket}"] = int(np.sum(inside & was & ~right))
    if workdir is not None:
        found |= _logged(workdir, frequency)
    return {name: float(value) for name, value in found.items()}


def _logged(workdir: Path, frequency: Mapping[int, float]) -> dict[str, float]:
    """Rewards of the first and last quarter of the run, and the share of dead groups by bucket."""
    records = [record for record in read_log(workdir / "log.jsonl") if record["stage"] == "arm"]
    rewards = [record["reward"] for record in records if record.get("reward") is not None]
    found = {}
    if rewards:
        quarter = max(1, len(rewards) // 4)
        found = {"reward/first": np.mean(rewards[:quarter]), "reward/last": np.mean(rewards[-quarter:])}
    for bucket, rules in studies.buckets(frequency).items():
        dead = [record[key] for record in records for rule in rules if (key := f"dead_groups/{rule}") in record]
        if dead:
            found[f"dead_groups/{bucket}"] = np.mean(dead)
    return found


COLUMNS = {
    "macro-F1": "macro_f1", "head": "recall/head", "torso": "recall/torso", "tail": "recall/tail",
    "rules lost": "rules_lost", "entropy": "label_entropy", "pass@8": "pass@8", "ECE": "ece_before_calibration",
    "reward": "reward/last", "dead head": "dead_groups/head", "dead tail": "dead_groups/tail",
}  # fmt: skip


def verdict(found: Mapping[str, list[dict[str, float]]]) -> str:
    """Plain sentences, each from a difference paired by seed with its 95% t interval."""

    def difference(one: str, other: str, name: str) -> tuple[str, str]:
        pairs = zip(found[one], found[other], strict=True)
        values = [a[name] - b[name] for a, b in pairs]
        mean, half = studies.over_seeds(values)
        word = "no difference seen" if not np.isfinite(half) or abs(mean) <= half else "higher" if mean > 0 else "lower"
        return word, studies.cell(values, signed=True)

    questions = {
        "Does RL alone lose the tail? Stepwise-GRPO against the SFT start": ("stepwise", "start"),
        "Does the auxiliary loss keep it? fixed 0.5 against Stepwise-GRPO": ("fixed 0.5", "stepwise"),
        "Is it RL at all? fixed 0.5 against SFT alone": ("fixed 0.5", "sft"),
        "Is sampling to blame? The exact expectation against sampled labels": ("exact", "stepwise"),
        "Is the KL direction to blame? With a KL term against without": ("stepwise + kl", "stepwise"),
    }
    lines = []
    for question, (one, other) in questions.items():
        if one in found and other in found:
            answers = [f"{c} {' '.join(difference(one, other, n)[::-1])}" for c, n in COLUMNS.items() if n in
                       ("recall/tail", "recall/head", "macro_f1", "rules_lost")]  # fmt: skip
            lines.append(f"- **{question}**: {'; '.join(answers)}.")
    return "\n".join(lines)


def _exclusive(seeds: list[dict[str, float]]) -> str:
    """+X/−Y of head, torso and tail: pairs that only the arm solves, and that only the start solved."""
    keys = ("solved_now_only", "solved_before_only")
    now, before = ([np.mean([s[f"{key}/{bucket}"] for s in seeds]) for bucket in BUCKETS] for key in keys)
    return " ".join(f"+{x:.0f}/−{y:.0f}" for x, y in zip(now, before, strict=True))


def _curve_rows(found: Mapping[str, list[dict[str, float]]]) -> Rows:
    weights = {"stepwise": 0.0} | {f"fixed {weight:g}": weight for weight in CURVE}
    if len(weights.keys() & found.keys()) < 3:  # no curve
        return []
    return [
        {"lambda": weight, "seed": seed, "bucket": bucket, "recall": of_seed[f"recall/{bucket}"]}
        for name, weight in weights.items()
        for seed, of_seed in enumerate(found.get(name, []))
        for bucket in BUCKETS
    ]


def _arm_rows(found: Mapping[str, list[dict[str, float]]]) -> Rows:
    return [
        {"arm": name, "seed": seed, "bucket": bucket, "recall": of_seed[f"recall/{bucket}"]}
        for name, seeds in found.items()
        for seed, of_seed in enumerate(seeds)
        for bucket in BUCKETS
    ]


def _draw(rows: Rows, across: str) -> Picture:
    """A line a bucket, faint dots the seeds, over lambda or over the arms."""
    places = report_pictures.distinct(rows, across)
    picture = report_pictures.blank(report_pictures.WIDTH, 4)
    panel = picture.subplots()
    for bucket, color in report_pictures.colors_of(BUCKETS).items():
        of_bucket = [row for row in rows if row["bucket"] == bucket]
        panel.plot([places.index(row[across]) for row in of_bucket], [row["recall"] for row in of_bucket], "o",
                   color=color, alpha=0.35, markersize=4)  # fmt: skip
        means = [np.nanmean([row["recall"] for row in of_bucket if row[across] == place]) for place in places]
        panel.plot(range(len(places)), means, "o-", color=color, label=bucket)
    turned = {} if across == "lambda" else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    panel.set_xticks(range(len(places)), [f"{p:g}" if across == "lambda" else p for p in places], **turned)
    panel.set(xlabel=across, ylabel="recall of the rules")
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    report_pictures.shared_legend(picture)
    return picture


def main() -> None:
    """Run what is missing, then write the page."""
    parsed = studies.arguments(__doc__, "runs/mode_balance")
    arms = studies.chosen(ARMS, parsed.arms)
    frequency = natural_frequencies()
    found: dict[str, list[dict[str, float]]] = {"start": [], **{name: [] for name in arms}}
    seconds = 0.0
    for seed in range(parsed.seeds):
        start = parsed.workdir / "start" / f"seed{seed}"
        studies.run(start_config(seed, parsed.smoke), start)
        before = studies.predictions_of(start, "sft")
        found["start"].append(measured(before, before, frequency, None))
        seconds += studies.seconds_of(start)
        for name, arm in arms.items():
            workdir = parsed.workdir / name.replace(" ", "_") / f"seed{seed}"
            studies.run(arm_config(arm, seed, start, parsed.smoke), workdir)
            after = studies.predictions_of(workdir, "sft" if arm.supervised else "rl")
            found[name].append(measured(after, before, frequency, workdir))
            seconds += studies.seconds_of(workdir)
    rows = [
        [name, *(studies.cell([s.get(key, np.nan) for s in seeds]) for key in COLUMNS.values()), _exclusive(seeds)]
        for name, seeds in found.items()
    ]
    compared = [key for key in COLUMNS.values() if key in found["start"][0] and key != "rules_lost"]
    changes = [
        [name, *(studies.cell([a[key] - b[key] for a, b in zip(seeds, found["start"], strict=True)], signed=True)
                 for key in compared)]
        for name, seeds in found.items() if name != "start"
    ]  # fmt: skip
    parts = [
        "# Mode balance",
        f"{parsed.seeds} seeds, mean ± half of the 95% t interval over seeds. {seconds / 60:.0f} minutes of runs. "
        f"Rules lost: recall more than {LOST:.0%} below the start, of those with at least {LEAST_PAIRS} test pairs. "
        "The last column is what the arm alone solves and what only the start solved, head, torso, tail, in pairs.",
        "```\npython -m benchmarks.mode_balance --workdir=runs/mode_balance --output=docs/studies"
        + (f' --arms="{parsed.arms}"' if parsed.arms else "")
        + "\n```",
        "The start is the SFT model of `configs/afrl_quickstart.py`, which grades more than four of five pairs right: "
        "it has rules to gain and rules to lose. Every arm makes 60 updates at one learning rate, 5e-5, set before any "
        "arm ran and tuned for none.",
        verdict(found),
        "What each arm changed of its start, paired by seed:",
        studies.markdown_table(["arm", *(c for c, key in COLUMNS.items() if key in compared)], changes),
        "The figures themselves; how far seeds lie apart is mostly how far their starts do:",
        studies.markdown_table(["arm", *COLUMNS, "+X/−Y"], rows),
    ]
    plots = [
        Plot("mode_balance_curve", "The lambda curve", "Recall by rule frequency; 0 is Stepwise-GRPO alone.",
             _curve_rows(found), functools.partial(_draw, across="lambda")),
        Plot("mode_balance_arms", "All arms", "Recall by rule frequency; dots are seeds.", _arm_rows(found),
             functools.partial(_draw, across="arm")),
    ]  # fmt: skip
    studies.write_page(parsed.output, "mode_balance", parts, plots, found)
    print(json.dumps({name: studies.over_seeds([s["recall/tail"] for s in seeds])[0] for name, seeds in found.items()}))


if __name__ == "__main__":
    main()
