"""The report of a run: report.html, metrics.json, and each plot as PNG with the CSV it was drawn from."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from afrl_jax import report_plots
from afrl_jax.evaluation import (
    Difference,
    Figure,
    Predictions,
    evaluate_predictions,
    frequency_bucket,
    paired_bootstrap,
    rule_frequencies,
)
from afrl_jax.schema import Instruction
from lm_jax import report_pictures
from lm_jax.report_page import named, page, picture, section, table
from lm_jax.report_pictures import Plot

STUDENT = "student"
RETAINED = ("accuracy", "macro_f1", "quadratic_weighted_kappa", "ndcg_exp@10", "ndcg_lin@10", "pair_accuracy")
RETAINED_RULES = ("rule_recall/head", "rule_recall/torso", "rule_recall/tail")

# What a metric is, for a reader who meets it here first; the arrow says which way is better.
MEANINGS = {
    "accuracy": "↑ share of pairs given their gold grade",
    "macro_f1": "↑ F1 averaged over the grades",
    "quadratic_weighted_kappa": "↑ agreement beyond chance, far misses weigh more",
    "ndcg_exp@10": "↑ ranking, gain 2^grade − 1",
    "ndcg_lin@10": "↑ ranking, gain = grade",
    "pair_accuracy": "↑ share of document pairs of a query in the right order",
    "ece": "↓ expected calibration error, 15 bins",
    "ece_before_calibration": "↓ the same before calibration",
    "brier": "↓ squared error of the distribution, 0 to 2",
    "brier_before_calibration": "↓ the same before calibration",
    "signed_grade_error": "0 is best; expected grade − gold, in grades",
    "label_entropy": "nats; falls when labels collapse",
    "pass@8": "↑ a right label among 8 sampled answers, 1 − (1 − p(gold))⁸",
    "rule_recall/head": "↑ pairs decided by rules of at least 5%",
    "rule_recall/torso": "↑ by rules of 1% to 5%",
    "rule_recall/tail": "↑ by rules below 1%",
    "explanation/format": "↑ explanations that parse",
    "explanation/consistency": "↑ that repeat the grade and name a rule which allows it",
    "explanation/rule_accuracy": "↑ that name a gold rule",
}


def write_report(
    folder: Path,
    predictions: Mapping[str, Predictions],
    instruction: Instruction,
    *,
    title: str,
    records: Sequence[Mapping[str, Any]] = (),
    rule_frequency: Mapping[int, float] | None = None,
    facts: Mapping[str, str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, float]:
    """Write the report into `folder` (made if absent) and return the contents of metrics.json.

    `predictions` are the models on the same pairs in the order they came to be, such as "sft", "rl", "student": each is
    compared with the one before it, which is also the student's teacher. `records` are the run's log, as
    `run_log.read_log` gives them. `rule_frequency` are the shares of the training pairs (default: of the judged pairs).
    `facts` head the page: command, data, hardware, time. What a run did not have - a stage, rules, a student - is left
    out.

    metrics.json is flat: "<model>/<metric>" with "/low" and "/high", "<model>-<model before>/<metric>" with "/p" too.
    """
    judged = next((model.rule for model in predictions.values() if model.rule is not None), None)
    frequency = {} if judged is None else rule_frequencies(judged)
    if rule_frequency is not None:
        frequency = dict.fromkeys(frequency, 0.0) | dict(rule_frequency)
    options = {"rule_frequency": frequency, "seed": seed, "resamples": resamples}
    figures = {name: evaluate_predictions(model, **options) for name, model in predictions.items()}
    differences = {
        f"{after}-{before}": paired_bootstrap(predictions[before], predictions[after], **options)
        for before, after in itertools.pairwise(predictions)
    }
    metrics = _flat(figures | differences)
    plots = [plot for plot in _plots(predictions, figures, instruction, records, frequency) if plot.rows]

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for plot in plots:
        plot.save(folder)
    rules = {rule.number: rule.text for rule in instruction.rules}
    page = _page(title, facts or {}, figures, differences, plots, rules, frequency)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return metrics


def _flat(groups: Mapping[str, Mapping[str, Figure | Difference]]) -> dict[str, float]:
    return {
        f"{group}/{metric}" + ("" if field == "value" else f"/{field}"): number
        for group, figures in groups.items()
        for metric, figure in figures.items()
        for field, number in figure._asdict().items()
    }


def _plots(
    predictions: Mapping[str, Predictions],
    figures: Mapping[str, Mapping[str, Figure]],
    instruction: Instruction,
    records: Sequence[Mapping[str, Any]],
    frequency: Mapping[int, float],
) -> Iterable[Plot]:
    def series(name: str, title: str, caption: str, unit: str, wanted) -> Plot:
        rows = report_pictures.series_rows(records, wanted)
        return Plot(name, title, caption, rows, functools.partial(report_pictures.draw_series, unit=unit))

    colors = report_pictures.colors_of(list(predictions))
    trained = {name: of_model for name, of_model in figures.items() if name != STUDENT}
    teacher_and_student = dict(list(figures.items())[-2:]) if list(figures)[1:][-1:] == [STUDENT] else {}
    rules = {rule.number: rule.text for rule in instruction.rules}
    yield series(
        "loss",
        "Loss",
        "Nats a token; the policy loss of RL has no unit. Each stage has its own objective: compare within a panel.",
        "loss",
        {"loss", "sft/label", "sft/explanation"}.__contains__,
    )
    yield series(
        "rewards",
        "Rewards by segment",
        "Mean over the step's rollouts, after the format gate.",
        "mean reward",
        lambda name: name == "reward" or name.startswith("rewards/"),
    )
    yield series(
        "entropy",
        "Entropy of the policy",
        "Of all answer tokens, and of the label token alone (in RL of the rollouts, elsewhere of the judged pairs): "
        "where the second reaches 0, sampling explores no label.",
        "entropy, nats",
        {"entropy", "first_token/entropy"}.__contains__,
    )
    yield Plot(
        "dead_groups",
        "Groups without a right grade, by rule frequency",
        "Where no rollout of a prompt has the right grade, its rewards say nothing of it.",
        report_plots.dead_group_rows(records, frequency),
        report_plots.draw_dead_groups,
    )
    yield Plot(
        "confusion",
        "Confusion matrix",
        "Percentages and colour are shares of a gold grade's pairs.",
        report_plots.confusion_rows(predictions, instruction.scale.labels),
        report_plots.draw_confusion,
    )
    yield Plot(
        "reliability",
        "Reliability",
        "Above the diagonal the model is too modest, below it too sure. The area of a dot is its share of the pairs.",
        report_plots.reliability_rows(predictions),
        report_plots.draw_reliability,
    )
    yield Plot(
        "rule_recall",
        "Recall by rule: " + ", ".join(trained),
        "Rules from the most to the least frequent.",
        report_plots.rule_recall_rows(trained, rules, frequency),
        functools.partial(report_plots.draw_rule_recall, colors=colors),
    )
    yield Plot(
        "teacher_student",
        "Teacher and student",
        "What the small model keeps of the large one.",
        report_plots.comparison_rows(teacher_and_student, (*RETAINED, *RETAINED_RULES)),
        functools.partial(report_plots.draw_comparison, colors=colors),
    )


def _page(
    title: str,
    facts: Mapping[str, str],
    figures: Mapping[str, Mapping[str, Figure]],
    differences: Mapping[str, Mapping[str, Difference]],
    plots: Sequence[Plot],
    rules: Mapping[int, str],
    frequency: Mapping[int, float],
) -> str:
    models, pairs = figures.values(), differences.values()
    by_rule = {f"rule_recall/{rule}": rule for rule in sorted(frequency, key=lambda rule: -frequency[rule])}
    measured = list(dict.fromkeys(metric for model in models for metric in model))
    sections = []
    if figures:
        rows = [
            [named(metric, MEANINGS.get(metric, "")), *(_cell(model.get(metric)) for model in models)]
            for metric in measured
            if metric not in by_rule
        ]
        sections.append(section("Figures", "With 95% bootstrap intervals over queries.", table(["", *figures], rows)))
    if differences:
        rows = [
            [named(metric), *(_cell(pair.get(metric)) for pair in pairs)]
            for metric in measured
            if metric not in by_rule
        ]
        caption = "Paired by query. Bold where the 95% interval leaves out 0."
        sections.append(section("Differences", caption, table(["", *differences], rows)))
    for plot in plots:
        sections.append(section(plot.title, plot.caption, picture(plot.name, plot.title)))
    if any(metric in by_rule for metric in measured):
        rows = [
            [named(f"rule {rule}", rules.get(rule, ""))]
            + [named(f"{frequency[rule]:.1%}", frequency_bucket(frequency[rule]))]
            + [_cell(model.get(metric)) for model in models]
            for metric, rule in by_rule.items()
            if metric in measured
        ]
        caption = "Share of each rule's pairs that got their gold grade."
        sections.append(section("Rules", caption, table(["", "frequency", *figures], rows)))
    return page(title, facts, sections)


def _cell(figure: Figure | Difference | None) -> str:
    if figure is None:
        return "–"
    if isinstance(figure, Difference):
        tag = "b" if figure.low > 0 or figure.high < 0 else "span"
        interval = f"{figure.low:+.3f} to {figure.high:+.3f}, p {figure.p:.3f}"
        return f"<{tag}>{figure.value:+.3f}</{tag}><small>{interval}</small>"
    return f"{figure.value:.3f}<small>{figure.low:.3f} to {figure.high:.3f}</small>"
