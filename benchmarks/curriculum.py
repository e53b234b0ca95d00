"""The curriculum study: does the order of the stages matter, and does the order of the answer?

    python -m benchmarks.curriculum --workdir=runs/curriculum --output=docs/studies
    python -m benchmarks.curriculum --smoke --workdir=runs/curriculum_smoke

On clips. Every arm of a seed starts from one model, which has read domain text (S0) and a few judgments, as a
pretrained model has. Order: S1 single-rule cases, S2 near misses and conflicts, S3 RL on prompts with mixed groups, S4
RL on the natural mix with the SFT auxiliary loss; against the same sources shuffled, and against S4's natural mix and
objective alone - same steps, rows and tokens. Answer: the grade first and then why; the grade alone; the reason first
and the grade last, with half of the loss on the grade - same steps and rows, S1 and S2 only. Reason-first pays for its
score with a decode, so both accuracy and the seconds of scoring are told: of fresh pairs on either side, the decoder's
prompts sharing no prefix. Stages are short: what is asked is what order does, not how far a model gets. Stopping and
starting again continues. The last line is JSON.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.ticker import PercentFormatter

from afrl_jax.answer_format import AnswerFormat, render_explanation
from afrl_jax.data import batches, sources
from afrl_jax.data.clips_rulebooks import natural_frequencies
from afrl_jax.evaluation import BUCKETS, Predictions, evaluate_predictions, query_numbers
from afrl_jax.inputs import open_inputs
from afrl_jax.instructions.client import LocalModel
from afrl_jax.schema import DomainText, Judgment
from afrl_jax.settings import read_settings
from afrl_jax.stage_steps import stage_learning_rate, stage_objective, stage_step
from benchmarks import studies
from lm_jax import report_pictures, train_state
from lm_jax.parameters import Parameters, abstract
from lm_jax.report_pictures import Picture, Plot, Rows
from lm_jax.rows import Group
from lm_jax.run_folder import RunFolder
from lm_jax.run_log import RunLog
from lm_jax.train_loop import fit
from lm_jax.weights import read_weights

ORDERS = ("ordered", "shuffled", "last")
ANSWERS = ("answer first", "label only", "reason first")
COLUMNS = {"macro-F1": "macro_f1", "accuracy": "accuracy", **{b: f"rule_recall/{b}" for b in BUCKETS},
           "QWK": "quadratic_weighted_kappa", "pair accuracy": "pair_accuracy",
           "seconds for 100 pairs": "scoring_seconds"}  # fmt: skip
TIMED = 100


def start_config(seed: int, smoke: bool) -> dict[str, Any]:
    """S0 and a little of the natural mix, on the quickstart's model: what every arm of a seed starts from."""
    base = studies.base_config(smoke)
    size = {"split": "train", "documents_per_query": 4 if smoke else 8, "queries": 20 if smoke else 1500}
    data = {
        **base["data"],
        "dev": {**base["data"]["dev"], "rule_balance": 0.5},
        "single": {"format": "clips", "difficulty": 0.0, "rule_balance": 0.5, **size},
        "hard": {"format": "clips_contrasts", **size},
        "natural": {"format": "clips", **size},
    }
    text = {**base["text"], "steps": max(2, base["text"]["steps"] * 2 // 3)}
    sft = {**base["sft"], "steps": max(2, base["sft"]["steps"] // 17), "mixture": {"natural": 1.0}}
    kept = {key: base[key] for key in ("tokenizer", "vocabulary", "show_rules", "teacher", "student")}
    evaluation = {**base["evaluation"], "explained_pairs": 0}
    return {**kept, "s0": text, "sft": sft, "data": data, "seed": seed, "stages": ("s0", "sft"),
            "evaluation": evaluation, "title": "curriculum: start"}  # fmt: skip


def staged_config(seed: int, order: str, start: Path, smoke: bool) -> dict[str, Any]:
    """S1 to S4, from the exported start."""
    base, quick = start_config(seed, smoke), studies.base_config(smoke)
    sft, rl = quick["sft"], quick["rl"]
    part = {**sft, "steps": max(2, sft["steps"] // 5)}
    rollouts = {**rl["rollouts"], "pool": 2 if smoke else 4}
    stages = {
        "s1": {**part, "mixture": {"single": 0.8, base["s0"]["texts"]: 0.2}},
        "s2": {**part, "mixture": {"hard": 0.5, "natural": 0.5}},
        "s3": {**rl, "prompts_from": "natural", "rollouts": rollouts, "sft_weight": 0.0, "arm": "fixed"},
        "s4": {**rl, "prompts_from": "natural", "arm": "fixed", "sft_weight": 0.5},
    }
    source = str(start / "export")
    kept = {key: base[key] for key in ("show_rules", "student", "evaluation", "data", "seed")}
    return {**kept, **stages, "teacher": {"source": source}, "tokenizer": source, "stages": tuple(stages),
            "curriculum": order, "title": f"curriculum: {order}"}  # fmt: skip


def answer_config(seed: int, explained: bool, start: Path, smoke: bool) -> dict[str, Any]:
    """The supervised stages alone; without explanations the same pairs train the grade alone."""
    config = staged_config(seed, "ordered", start, smoke)
    stages = config["stages"][:2]
    if not explained:
        judged = ("single", "hard", "natural")
        data = {name: {**source, "explained": False} if name in judged else source for name, source in
                config["data"].items()}  # fmt: skip
        config = {**config, "data": data}
    return {**config, "stages": stages, "title": "answer order"}


def reason_text(format: AnswerFormat, judgment: Judgment) -> DomainText:
    """A judged pair with the reason first: the prompt is given, the explanation and then the grade are learned."""
    label = format.labels[judgment.grade]
    reason = render_explanation(judgment.explanation, label).removesuffix(f"\nVerdict: {label}")
    given = format.prefix_text(judgment.query) + format.document_text(judgment.document)
    return DomainText((given, f"{reason}{format.template.slot}{label}"))


def reason_groups(format: AnswerFormat, judgments: Sequence[Judgment], row_tokens: int) -> list[Group]:
    """Rows of `reason_text`; the grade weighs as much as its reason."""
    groups = batches.text_groups(format.tokenizer, [reason_text(format, j) for j in judgments], row_tokens)
    for group in groups:
        for branch in group.branches:
            if branch.targets[-1] == format.tokenizer.eos:  # before which stands the grade
                weight = branch.token_values["explanation_weight"]
                weight[-2] = weight[:-2].sum()
    return groups


def reason_first(config: Mapping[str, Any], workdir: Path) -> Predictions:
    """Train the same stages on reasons before grades; grade the test pairs by decoding."""
    settings = read_settings(config)
    inputs = open_inputs(settings, workdir / "tokenizer")
    run, log = RunFolder(workdir, {**config, "answer": "reason first"}), RunLog(workdir)
    format, shape = inputs.format, inputs.shapes["teacher"]
    held: Parameters | None = None
    for number, (name, stage) in enumerate(zip(settings.stage_names, settings.stages, strict=True)):
        if run.finished(name):
            held = run.arrays(name, abstract(shape, None))
            continue
        groups = []
        for source, share in stage.mixture.items():
            if texts := inputs.texts.get(source):
                made = batches.text_groups(format.tokenizer, texts, stage.row_tokens)
            else:
                made = reason_groups(format, inputs.judgments[source], stage.row_tokens)
            groups.append((made, share))
        rows = batches.sft_row_shape([g for some, _ in groups for g in some], stage.row_tokens, len(format.labels))
        dataset = batches.row_batches(
            groups,
            rows,
            rows=stage.rows,
            branches_together=stage.branches_together,
            seed=(settings.seed * 1000 + number) * 100,
        )
        objective, coefficients = stage_objective(stage)
        transformation, step = stage_step(stage, shape, objective, format.label_ids, settings)
        parameters = read_weights(settings.teacher.source)[1] if held is None else held
        state = fit(
            stage=name, state=train_state.create(parameters, transformation), step=step,
            batch_at=batches.in_order(dataset), coefficients=coefficients,
            learning_rate=stage_learning_rate(stage), steps=stage.steps,
            folder=run.checkpoints(name), log=log, save_every=stage.save_every, mesh=None,
        )  # fmt: skip
        held = state.parameters
        run.finish(name, {"steps": stage.steps}, held)
    log.close()
    return _decoded(LocalModel(shape, held, format.tokenizer, rows=16), format, settings, workdir)


def _decoded(model: LocalModel, format: AnswerFormat, settings: Any, workdir: Path) -> Predictions:
    """Greedy reasons; the label after the slot is the grade, and an answer without one counts as wrong."""
    judgments = sources.open_judgments(settings.data[settings.evaluation.test], format.instruction, settings.seed)
    file = workdir / "predicted.npy"
    if not file.exists():
        prompts = [format.prefix_text(j.query) + format.document_text(j.document) for j in judgments]
        tokens = settings.evaluation.max_new_tokens + 8
        answers = model.complete(prompts, max_tokens=tokens)
        said = [answer.text.rpartition(format.template.slot)[2] for answer in answers]
        np.save(file, [format.labels.index(label) if label in format.labels else -1 for label in said])
        began = time.monotonic()
        model.complete(prompts[:TIMED], max_tokens=tokens)
        (workdir / "scoring.json").write_text(json.dumps((time.monotonic() - began) * TIMED / len(prompts[:TIMED])))
    predicted, gold = np.load(file), np.array([judgment.grade for judgment in judgments])
    # An answer without a label is given the grade farthest from the gold one.
    count = len(format.labels)
    predicted = np.where(predicted < 0, np.where(gold < count / 2, count - 1, 0), predicted)
    return _predictions(judgments, np.eye(count)[predicted])


def _predictions(judgments: Sequence[Judgment], probabilities: np.ndarray) -> Predictions:
    return Predictions(
        query_index=query_numbers(judgments),
        grade=np.array([j.grade for j in judgments]),
        probabilities=probabilities,
        rule=np.array([j.rules[0] for j in judgments]),
    )


def _prefill_seconds(workdir: Path, config: Mapping[str, Any]) -> float:
    """Seconds to score so many test pairs by their first token, kept in the run's folder. What warms up are other
    pairs: of those that are timed neither tokens nor prefixes are kept from before."""
    from afrl_jax.scoring import RelevanceModel

    file = workdir / "scoring.json"
    if not file.exists():
        model = RelevanceModel.load(workdir / "export")
        source = config["data"][config["evaluation"].get("test", "dev")]
        judgments = sources.open_judgments(source, model.format.instruction, config["seed"])
        whole = [(judgment.query, judgment.document) for judgment in judgments]
        pairs = whole[:TIMED]
        model.label_logprobs(whole[TIMED : 6 * TIMED])
        began = time.monotonic()
        jax.block_until_ready(model.label_logprobs(pairs))
        file.write_text(json.dumps((time.monotonic() - began) * TIMED / len(pairs)))
    return json.loads(file.read_text())


def _figures(predictions: Predictions, frequency: Mapping[int, float], seconds: float) -> dict[str, float]:
    found = evaluate_predictions(predictions, rule_frequency=frequency, resamples=1)
    return {name: found[name].value for name in COLUMNS.values() if name in found} | {"scoring_seconds": seconds}


def _draw(rows: Rows) -> Picture:
    arms = report_pictures.distinct(rows, "arm")
    picture = report_pictures.blank(report_pictures.WIDTH, 0.5 * len(arms) + 1.2)
    panel = picture.subplots()
    for metric, color in report_pictures.colors_of(report_pictures.distinct(rows, "metric")).items():
        of_metric = [row for row in rows if row["metric"] == metric]
        places = [arms.index(row["arm"]) for row in of_metric]
        panel.plot([row["value"] for row in of_metric], places, "o", color=color, label=metric, alpha=0.7)
    panel.set_yticks(range(len(arms)), arms)
    panel.invert_yaxis()
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    report_pictures.shared_legend(picture)
    return picture


def main() -> None:
    """Run what is missing, then write the page."""
    parsed = studies.arguments(__doc__, "runs/curriculum")
    arms = studies.chosen({name: functools.partial(_arm, name) for name in ("start", *ORDERS, *ANSWERS)}, parsed.arms)
    frequency = natural_frequencies()
    found: dict[str, list[dict[str, float]]] = {}
    for name, arm in arms.items():
        found[name] = []
        for seed in range(parsed.seeds):
            predictions, seconds = arm(seed, parsed.workdir / name.replace(" ", "_") / f"seed{seed}", parsed.smoke)
            found[name].append(_figures(predictions, frequency, seconds))
    rows = [
        [name, *(studies.cell([s.get(key, np.nan) for s in seeds]) for key in COLUMNS.values())]
        for name, seeds in found.items()
    ]
    differences = [
        [f"{one} − {other}", *(studies.cell([a.get(key, np.nan) - b.get(key, np.nan) for a, b in
                                             zip(found[one], found[other], strict=True)], signed=True)
                               for key in COLUMNS.values())]
        for one, other in (("ordered", "shuffled"), ("ordered", "last"), ("answer first", "label only"),
                           ("answer first", "reason first"))
        if one in found and other in found
    ]  # fmt: skip
    parts = [
        "# Curriculum and order of the answer",
        f"{parsed.seeds} seeds, mean ± half of the 95% t interval over seeds; differences are paired by seed. "
        "An interval that holds 0 shows no difference.",
        "```\npython -m benchmarks.curriculum --workdir=runs/curriculum --output=docs/studies\n```",
        studies.markdown_table(["arm", *COLUMNS], rows),
        studies.markdown_table(["difference", *COLUMNS], differences),
    ]
    shown = [
        {"arm": name, "seed": seed, "metric": title, "value": of_seed[key]}
        for name, seeds in found.items()
        for seed, of_seed in enumerate(seeds)
        for title, key in COLUMNS.items()
        if key in of_seed and key != "scoring_seconds"
    ]
    caption = "A dot a seed. On held-out queries; recall by rules in the natural mix's head, torso and tail."
    plots = [Plot("curriculum", "All arms", caption, shown, _draw)]
    studies.write_page(parsed.output, "curriculum", parts, plots, found)
    print(json.dumps({name: studies.over_seeds([s["macro_f1"] for s in seeds])[0] for name, seeds in found.items()}))


def _arm(name: str, seed: int, workdir: Path, smoke: bool) -> tuple[Predictions, float]:
    start = (workdir.parents[1] / "start" / f"seed{seed}").resolve()
    studies.run(start_config(seed, smoke), start)
    if name == "start":
        return studies.predictions_of(start, "sft"), _prefill_seconds(start, start_config(seed, smoke))
    if name == "reason first":
        predictions = reason_first(answer_config(seed, True, start, smoke), workdir)
        return predictions, json.loads((workdir / "scoring.json").read_text())
    if name in ORDERS:
        config = staged_config(seed, name, start, smoke)
    else:
        config = answer_config(seed, name == "answer first", start, smoke)
    studies.run(config, workdir)
    return studies.predictions_of(workdir, "rl" if name in ORDERS else "sft"), _prefill_seconds(workdir, config)


if __name__ == "__main__":
    main()
