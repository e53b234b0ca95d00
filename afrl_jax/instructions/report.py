"""The page of an instruction evolution: scores by round, length, acceptance, the rules each round fixed, every edit."""

from __future__ import annotations

import difflib
import functools
import html
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator, PercentFormatter

from afrl_jax.evaluation import Predictions, evaluate_predictions
from afrl_jax.instructions.edits import words
from afrl_jax.instructions.evolution import NEW, REPLAY, Proposal, Round
from afrl_jax.instructions.recheck import rule_name
from afrl_jax.schema import Instruction
from lm_jax import report_page, report_pictures
from lm_jax.bootstrap import Figure
from lm_jax.report_pictures import Picture, Plot, Rows
from lm_jax.run_folder import write_atomically

SHOWN = ("accuracy", "macro_f1", "quadratic_weighted_kappa", "pair_accuracy", "rule_recall/tail", "rule_recall/torso",
         "rule_recall/head")  # fmt: skip


def write_report(
    folder: Path,
    arms: Mapping[str, Sequence[Round]],
    tested: Mapping[str, Predictions],
    *,
    title: str,
    facts: Mapping[str, str],
    fixed: Rows = (),
    grades: Sequence[str] = (),
    rule_frequency: Mapping[int, float] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, float]:
    """Write report.html, metrics.json and the plots with their CSV files; returns the contents of metrics.json.

    Args:
        arms: rounds by arm, the main one first; round 0 is the base instruction, the same for all.
        tested: predictions on test pairs by the name of an instruction, "<arm> round <n>" or a reference such as
            "full rulebook"; empty without test pairs. Intervals are over queries.
        fixed: what each new rule decides on dev_new, and how often wrongly before and after (`run.fixed_rows`).
        grades: labels of the scale where test pairs have no rules, so that recall is told by grade.

    metrics.json is flat: "<arm>/<round>/<dev_new|dev_replay|words|accepted|proposed>", "<name>/<metric>" with "/low"
    and "/high" for what was tested.
    """
    options = {"rule_frequency": rule_frequency, "seed": seed, "resamples": resamples}
    figures = {name: evaluate_predictions(predictions, **options) for name, predictions in tested.items()}
    metrics = _arm_metrics(arms) | {
        f"{name}/{metric}" + ("" if field == "value" else f"/{field}"): number
        for name, of_name in figures.items()
        for metric, figure in of_name.items()
        for field, number in figure._asdict().items()
    }
    plots = [plot for plot in _plots(arms, figures, fixed, grades) if plot.rows]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for plot in plots:
        plot.save(folder)
    sections = [report_page.section(p.title, p.caption, report_page.picture(p.name, p.title)) for p in plots]
    if figures:
        rows = [
            [report_page.named(metric), *(_cell(of_name.get(metric)) for of_name in figures.values())]
            for metric in SHOWN
            if any(metric in of_name for of_name in figures.values())
        ]
        caption = "Pairs that no round ever saw, with 95% bootstrap intervals over queries."
        sections.append(report_page.section("Test", caption, report_page.table(["", *figures], rows)))
    main = next(iter(arms.values()))
    for number, (before, after) in enumerate(itertools.pairwise(main), start=1):
        sections.append(_round_section(number, before, after))
    write_atomically(folder / "report.html", report_page.page(title, facts, sections))
    return metrics


def _arm_metrics(arms: Mapping[str, Sequence[Round]]) -> dict[str, float]:
    return {
        f"{arm}/{number}/{name}": float(value)
        for arm, rounds in arms.items()
        for number, done in enumerate(rounds)
        for name, value in (
            (NEW, done.new),
            (REPLAY, done.replay),
            ("words", words(done.instruction)),
            ("accepted", len(done.accepted)),
            ("proposed", len(done.proposals)),
            ("worst_replay_fall", max((p.verdict.worst[1] for p in done.accepted if p.verdict.worst), default=0.0)),
        )
    }


def round_rows(arms: Mapping[str, Sequence[Round]]) -> Rows:
    """One row an arm and round: scores, words, edits proposed and accepted."""
    return [
        {"arm": arm, "round": number, NEW: done.new, REPLAY: done.replay, "words": words(done.instruction)}
        | {"proposed": len(done.proposals), "accepted": len(done.accepted)}
        for arm, rounds in arms.items()
        for number, done in enumerate(rounds)
    ]


def rule_rows(figures: Mapping[str, Mapping[str, Figure]], arm: str) -> Rows:
    """One row a tested round of the arm and rule: recall."""
    return [
        {"round": int(name.rpartition(" ")[2]), "rule": int(metric.rpartition("/")[2]), "recall": figure.value}
        for name, of_name in figures.items()
        if name.startswith(f"{arm} round ")
        for metric, figure in of_name.items()
        if metric.startswith("rule_recall/") and metric.rpartition("/")[2].isdigit()
    ]


def _plots(
    arms: Mapping[str, Sequence[Round]],
    figures: Mapping[str, Mapping[str, Figure]],
    fixed: Rows,
    grades: Sequence[str],
) -> Iterator[Plot]:
    colors = report_pictures.colors_of(list(arms))
    yield Plot(
        "rounds",
        "By round",
        "Macro-F1 on dev_new (solid) and on the frozen dev_replay (dashed), words of the rules, edits that stand.",
        round_rows(arms),
        functools.partial(_draw_rounds, colors=colors),
    )
    yield Plot(
        "new_rules",
        "What each new rule fixed",
        "Pairs of dev_new that a rule decides, and how many of them were graded wrongly before its round and after it.",
        fixed,
        _draw_new_rules,
    )
    what = "grade" if grades else "rule"
    yield Plot(
        "rules",
        f"Which {what} each round fixed",
        f"Recall on test pairs by {'their grade' if grades else 'the rule that decides them'}; a column a round.",
        rule_rows(figures, next(iter(arms))),
        functools.partial(_draw_rules, grades=grades),
    )


def _draw_rounds(rows: Rows, colors: Mapping[str, str]) -> Picture:
    picture = report_pictures.blank(report_pictures.WIDTH, 3.4)
    scores, length, stand = picture.subplots(1, 3)
    for arm, color in colors.items():
        of_arm = [row for row in rows if row["arm"] == arm]
        rounds = [row["round"] for row in of_arm]
        scores.plot(rounds, [row[NEW] for row in of_arm], "o-", color=color, markersize=4, label=arm)
        scores.plot(rounds, [row[REPLAY] for row in of_arm], "o--", color=color, markersize=3, alpha=0.6)
        length.plot(rounds, [row["words"] for row in of_arm], "o-", color=color, markersize=4)
        tried = [row for row in of_arm if row["proposed"]]
        shares = [row["accepted"] / row["proposed"] for row in tried]
        stand.plot([row["round"] for row in tried], shares, "o-", color=color, markersize=4)
    scores.set(title="macro-F1", xlabel="round")
    length.set(title="words of the rules", xlabel="round")
    stand.set(title="edits that stand", xlabel="round", ylim=(-0.02, 1.02))
    stand.yaxis.set_major_formatter(PercentFormatter(1))
    for panel in (scores, length, stand):
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    report_pictures.shared_legend(picture)
    return picture


def _draw_new_rules(rows: Rows) -> Picture:
    picture = report_pictures.blank(report_pictures.WIDTH, 0.3 * len(rows) + 1.2)
    panel = picture.subplots()
    colors = report_pictures.colors_of(["pairs", "wrong before", "wrong after"])
    places = range(len(rows))
    for column, height in (("pairs", 0.8), ("wrong before", 0.5), ("wrong after", 0.25)):
        panel.barh(places, [row[column] for row in rows], height, color=colors[column], label=column)
    panel.set_yticks(places, [f"{row['round']}: {row['rule'][:60]}" for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.set(xlabel="pairs", ylabel="round: rule")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    report_pictures.shared_legend(picture)
    return picture


def _draw_rules(rows: Rows, grades: Sequence[str]) -> Picture:
    rounds, rules = sorted({row["round"] for row in rows}), sorted({row["rule"] for row in rows})
    picture = report_pictures.blank(0.9 * len(rounds) + 2.5, 0.24 * len(rules) + 1)
    panel = picture.subplots()
    recall = {(row["rule"], row["round"]): row["recall"] for row in rows}
    table = [[recall.get((rule, number), float("nan")) for number in rounds] for rule in rules]
    shown = panel.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(rounds)), rounds)
    panel.set_yticks(range(len(rules)), [grades[rule] for rule in rules] if grades else rules, fontsize=8)
    panel.set(xlabel="round", ylabel="grade" if grades else "rule")
    panel.grid(False)
    picture.colorbar(shown, ax=panel, format=PercentFormatter(1), label="recall")
    return picture


def _round_section(number: int, before: Round, after: Round) -> str:
    head = ["edit", "for", "dev_new", "replay: worst fall", "verdict"]
    proposals = sorted(after.proposals, key=lambda proposal: not proposal.verdict.accepted)
    rows = [_proposal_cells(proposal, after) for proposal in proposals]
    body = _difference(before.instruction, after.instruction) + report_page.table(head, rows)
    facts = ", ".join(f"{name} {value}" for name, value in after.synthesized.items())
    caption = f"dev_new {before.new:.3f} to {after.new:.3f}, dev_replay {before.replay:.3f} to {after.replay:.3f}."
    caption += f" {len(after.accepted)} of {len(after.proposals)} edits stand."
    caption += (f" Ended: {after.stopped}." if after.stopped else "") + (f" Synthesized: {facts}." if facts else "")
    return report_page.section(f"Round {number}", caption, body)


def _proposal_cells(proposal: Proposal, done: Round) -> list[str]:
    edit, verdict = proposal.edit, proposal.verdict
    labels = done.instruction.scale.labels
    said = f"{edit.condition}: {labels[edit.grade]}" if edit.kind == "add" else edit.condition
    place = f"before “{edit.target}”" if edit.kind == "add" and edit.target else edit.target
    cluster = done.clusters[proposal.cluster] if 0 <= proposal.cluster < len(done.clusters) else None
    about = f"{cluster.cause}: {len(cluster.members)} pairs" if cluster else ""
    change, worst = verdict.difference, verdict.worst
    return [
        report_page.named(f"{edit.kind} {said}", f"{place} {edit.other}".strip()),
        html.escape(about),
        f"{change.value:+.3f}<small>p {change.p:.3f}</small>" if change else "–",
        f"{worst[1]:+.3f}<small>{rule_name(worst[0])}</small>" if worst else "–",
        "<b>stands</b>" if verdict.accepted else html.escape(verdict.reason),
    ]


def _difference(before: Instruction, after: Instruction) -> str:
    """The rules before and after as a diff: added green with +, removed red with -, the rest folded to what is near."""
    one, two = ([rule.text for rule in instruction.rules] for instruction in (before, after))
    lines = []
    for line in list(difflib.unified_diff(one, two, lineterm="", n=1))[2:]:
        color = {"+": "#1a7f37", "-": "#cf222e"}.get(line[0], "inherit")
        text = "⋯" if line.startswith("@@") else line
        lines.append(f'<span style="color:{color}">{html.escape(text)}</span>')
    return f"<pre>{chr(10).join(lines)}</pre>" if lines else "<p>The rules stay as they are.</p>"


def _cell(figure: Figure | None) -> str:
    return "–" if figure is None else f"{figure.value:.3f}<small>{figure.low:.3f} to {figure.high:.3f}</small>"
