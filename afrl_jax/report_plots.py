"""The pictures that speak of relevance models; what any report draws is in `lm_jax.report_pictures`.

A `*_rows` function turns a run log or predictions into rows (empty: nothing to show), a `draw_*` function turns rows
into a matplotlib Figure.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import PercentFormatter

from afrl_jax import calibration
from afrl_jax.evaluation import Figure, Predictions, frequency_bucket
from lm_jax.report_pictures import WIDTH, Rows, blank, distinct, shared_legend, smoothed

# Colors that no model has: what is not a model must not look like one.
BUCKET_COLORS = {"head": "#BDBAD8", "torso": "#7E78B8", "tail": "#3F1F7D"}
BUCKET_MEANING = {"head": "head: at least 5%", "torso": "torso: 1% to 5%", "tail": "tail: below 1%"}
CALIBRATION_COLORS = {"before": "#A0A0A0", "after": "#3F1F7D"}


def dead_group_rows(records: Sequence[Mapping[str, Any]], rule_frequency: Mapping[int, float]) -> Rows:
    """One row a stage, step and rule: the share of the rule's groups of which no rollout had the right grade."""
    prefix = "dead_groups/"
    return [
        {
            "stage": record["stage"],
            "step": record["step"],
            "rule": (rule := int(name.removeprefix(prefix))),
            "frequency": rule_frequency.get(rule, 0.0),
            "dead_share": value,
        }
        for record in records
        for name, value in record.items()
        if name.startswith(prefix) and value is not None
    ]


def draw_dead_groups(rows: Rows) -> Picture:
    """Left: each rule's mean share, the most frequent rule first. Then a panel a stage: the buckets over its steps."""
    picture, stages = blank(WIDTH, 3.8), distinct(rows, "stage")
    by_rule, *panels = picture.subplots(1, 1 + len(stages), sharey=True)
    rules = distinct(sorted(rows, key=lambda row: -row["frequency"]), "rule")
    for bucket, color in BUCKET_COLORS.items():
        members = [row for row in rows if frequency_bucket(row["frequency"]) == bucket]
        if members:
            of_rule = _means(members, "rule", "dead_share")
            by_rule.bar([rules.index(rule) for rule in of_rule], of_rule.values(), color=color)
        for panel, stage in zip(panels, stages, strict=True):
            of_step = _means([row for row in members if row["stage"] == stage], "step", "dead_share")
            if of_step:
                smoothed(panel, list(of_step), list(of_step.values()), BUCKET_MEANING[bucket], color)
    by_rule.set(title="Mean over training", xlabel="rule number, most frequent first", ylabel="groups, none right")
    by_rule.set_xticks(range(len(rules)), rules, fontsize=8)
    by_rule.grid(axis="x", visible=False)
    for panel, stage in zip(panels, stages, strict=True):
        panel.set(title=stage, xlabel="step", ylim=(0, 1.02))
    by_rule.yaxis.set_major_formatter(PercentFormatter(1))
    shared_legend(picture)
    return picture


def confusion_rows(predictions: Mapping[str, Predictions], labels: Sequence[str]) -> Rows:
    """One row a model and cell: gold and predicted label, pairs."""
    return [
        {"model": model, "gold": labels[gold], "predicted": labels[predicted], "pairs": int(pairs)}
        for model, judged in predictions.items()
        for (gold, predicted), pairs in np.ndenumerate(judged.confusion)
    ]


def draw_confusion(rows: Rows) -> Picture:
    """A panel a model; colour and percentage are shares of the gold grade's pairs."""
    models, labels = distinct(rows, "model"), distinct(rows, "gold")
    side = max(2.4, 0.6 * len(labels))
    picture = blank((side + 0.9) * len(models), side + 0.9)
    for panel, model in zip(picture.subplots(1, len(models), squeeze=False).flat, models, strict=True):
        counts = np.array([row["pairs"] for row in rows if row["model"] == model]).reshape(len(labels), -1)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (gold, predicted), pairs in np.ndenumerate(counts):
            color = "white" if share[gold, predicted] > 0.55 else "#222222"
            text = f"{share[gold, predicted]:.0%}\n{pairs:,}"
            panel.text(predicted, gold, text, ha="center", va="center", fontsize=9, color=color)
        panel.set(title=model, xlabel="predicted grade", ylabel="gold grade")
        panel.set_xticks(range(len(labels)), labels)
        panel.set_yticks(range(len(labels)), labels)
        panel.grid(False)
        panel.spines[:].set_visible(False)
    return picture


def reliability_rows(predictions: Mapping[str, Predictions]) -> Rows:
    """One row a model, calibration state and non-empty bin: pairs, mean confidence, share right."""
    return [
        {"model": model, "calibration": state, "pairs": int(pairs), "confidence": confidence, "accuracy": accuracy}
        for model, judged in predictions.items()
        for state, probabilities in (("before", judged.uncalibrated), ("after", judged.probabilities))
        if probabilities is not None
        for pairs, confidence, accuracy in zip(*calibration.reliability(probabilities, judged.grade), strict=True)
        if pairs
    ]


def draw_reliability(rows: Rows) -> Picture:
    """A panel a model: accuracy against confidence, the area of a dot being its share of the pairs."""
    models = distinct(rows, "model")
    picture = blank(3.2 * len(models) + 0.4, 4.1)
    for panel, model in zip(picture.subplots(1, len(models), squeeze=False).flat, models, strict=True):
        panel.plot([0, 1], [0, 1], ":", color="#222222", linewidth=1, label="perfect calibration")
        for state, color in CALIBRATION_COLORS.items():
            points = [row for row in rows if row["model"] == model and row["calibration"] == state]
            pairs = np.array([row["pairs"] for row in points])
            confidence, accuracy = ([row[name] for row in points] for name in ("confidence", "accuracy"))
            panel.plot(confidence, accuracy, color=color, linewidth=1.5, label=f"{state} calibration")
            panel.scatter(confidence, accuracy, 12 + 400 * pairs / max(pairs.sum(), 1), color=color, alpha=0.5)
        panel.set(title=model, xlabel="confidence in the top grade", xlim=(0, 1.05), ylim=(0, 1.05))
        panel.set(ylabel="share right", aspect="equal")
    shared_legend(picture)
    return picture


def rule_recall_rows(
    figures: Mapping[str, Mapping[str, Figure]], rules: Mapping[int, str], rule_frequency: Mapping[int, float]
) -> Rows:
    """One row a rule and model, most frequent rule first: recall with its interval."""
    return [
        {"rule": rule, "text": rules.get(rule, ""), "frequency": frequency, "model": model}
        | {"recall": figure.value, "low": figure.low, "high": figure.high}
        for rule, frequency in sorted(rule_frequency.items(), key=lambda item: -item[1])
        for model, of_model in figures.items()
        if (figure := of_model.get(f"rule_recall/{rule}"))
    ]


def draw_rule_recall(rows: Rows, colors: Mapping[str, str]) -> Picture:
    """A line a rule, a dot a model in its color."""
    rules = distinct(rows, "rule")
    first = {rule: next(row for row in rows if row["rule"] == rule) for rule in rules}
    names = [f"{_shortened(first[rule]['text'])}  {rule} · {first[rule]['frequency']:.1%}" for rule in rules]
    picture = blank(WIDTH, 0.3 * len(rules) + 1.2)
    panel = picture.subplots()
    _dots(panel, rows, rules, "rule", "recall", colors)
    panel.set_yticks(range(len(rules)), names, fontsize=9)
    buckets = [frequency_bucket(first[rule]["frequency"]) for rule in rules]
    for place in (place for place in range(1, len(rules)) if buckets[place] != buckets[place - 1]):
        panel.axhline(place - 0.5, color="#888888", linewidth=0.8)
    for bucket in dict.fromkeys(buckets):
        panel.text(
            1.03, buckets.index(bucket), bucket, va="center", color="#555555", transform=panel.get_yaxis_transform()
        )
    panel.set(xlabel="share of the rule's pairs that got their gold grade, with 95% interval", xlim=(-0.02, 1.02))
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    shared_legend(picture)
    return picture


def comparison_rows(figures: Mapping[str, Mapping[str, Figure]], metrics: Collection[str]) -> Rows:
    """One row a metric and model, for metrics that all models have: the figure and its share of the first model's."""
    first = next(iter(figures.values()), {})
    return [
        {"metric": metric, "model": model, **of_model[metric]._asdict()}
        | {"retention": of_model[metric].value / first[metric].value if first[metric].value else None}
        for metric in metrics
        if all(metric in of_model for of_model in figures.values())
        for model, of_model in figures.items()
    ]


def draw_comparison(rows: Rows, colors: Mapping[str, str]) -> Picture:
    """A line a metric, a dot a model in its color, the last model's retention at the right."""
    metrics = distinct(rows, "metric")
    picture = blank(WIDTH, 0.42 * len(metrics) + 1.2)
    panel = picture.subplots()
    _dots(panel, rows, metrics, "metric", "value", colors)
    panel.set_yticks(range(len(metrics)), metrics)
    for place, metric in enumerate(metrics):
        retention = [row["retention"] for row in rows if row["metric"] == metric][-1]
        text = "" if retention is None else f"{retention:.0%}"
        panel.text(1.03, place, text, va="center", color="#222222", transform=panel.get_yaxis_transform())
    panel.text(1.03, -0.75, "retained", va="bottom", color="#555555", transform=panel.get_yaxis_transform())
    least = min(0.0, *(row["low"] for row in rows))
    panel.set(xlabel="figure, with 95% interval over queries", xlim=(least - 0.02, 1.02))
    shared_legend(picture)
    return picture


def _dots(panel: Axes, rows: Rows, lines: Sequence, line: str, value: str, colors: Mapping[str, str]) -> None:
    """Horizontal dots with intervals, models side by side on each line, the first line on top."""
    models = distinct(rows, "model")
    for place, model in enumerate(models):
        points = [row for row in rows if row["model"] == model]
        offset = 0.22 * (place - (len(models) - 1) / 2)
        heights = [lines.index(row[line]) + offset for row in points]
        low, high = ([row[end] for row in points] for end in ("low", "high"))
        panel.hlines(heights, low, high, color=colors[model], alpha=0.45)
        panel.plot([row[value] for row in points], heights, "o", color=colors[model], markersize=5, label=model)
    panel.set_ylim(len(lines) - 0.5, -0.5)
    panel.grid(axis="y", visible=False)


def _means(rows: Rows, by: str, column: str) -> dict[Any, float]:
    values = collections.defaultdict(list)
    for row in rows:
        values[row[by]].append(row[column])
    return {key: float(np.mean(of_key)) for key, of_key in values.items()}


def _shortened(text: str, length: int = 56) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
