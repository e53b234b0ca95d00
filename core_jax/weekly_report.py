"""The page about all weeks: every gate as a detector, and what was in production."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator

from core_jax.detector import Detector, Outcome, Rate, detector
from core_jax.gate import GATES, Decision
from core_jax.incidents import INCIDENTS
from lm_jax import report_page, report_pictures
from lm_jax.report_pictures import Plot, Rows

Week = Mapping[str, Any]  # what core_jax.weekly leaves of one


def detectors(weeks: Sequence[Week]) -> dict[str, Detector]:
    """Each gate's decisions about the same candidates. Which of them came to be, the gate that decided has shaped."""
    return {
        name: detector([Outcome(week["week"], week["incident"], week["decisions"][name]) for week in weeks])
        for name in GATES
    }


def week_rows(weeks: Sequence[Week]) -> Rows:
    """One row a week, for tables and CSV."""
    return [
        {
            "week": week["week"],
            "incident": week["incident"] or "–",
            "decision": week["decisions"]["gate"] + (", rolled back" if week.get("rolled_back") else ""),
            "log_ratio": f"{week['figures']['log_ratio/difference']:+.3f}",
            "judge": f"{week['judge']['candidate'] - week['judge']['incumbent']:+.3f}",
            "search nDCG@10": "–" if week["search"] is None else f"{week['search']:+.3f}",
            "improves on the query": f"{week['improvement_rate']:.1%}",
            "why not": "; ".join(reason.partition(":")[0] for reason in week["reasons"]) or "–",
        }
        for week in weeks
    ]


def write(folder: Path, weeks: Sequence[Week]) -> dict[str, float]:
    """Write report.html, its picture with the CSV behind it, and metrics.json; returns the latter's contents."""
    folder.mkdir(parents=True, exist_ok=True)
    found = detectors(weeks)
    metrics = _flat(found)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    rows = [
        {"week": week["week"], "incident": week["incident"], "who": who, "judge": week["judge"][who]}
        | {"decision": week["decisions"]["gate"], "rolled_back": week.get("rolled_back", False)}
        for week in weeks
        for who in ("incumbent", "candidate")
    ]
    caption = "F1 of what a rewrite says against what the searcher meant, which no gate may see."
    plot = Plot("judge", "The independent judge", caption, rows, draw_judge)
    plot.save(folder)
    gates = []
    for name, each in found.items():
        rates = (each.false_blocks, each.promoted, each.detected, each.let_through)
        gates.append([html.escape(name), *map(_rate, rates), _delays(each)])
    by_incident = [
        [report_page.named(incident, INCIDENTS[incident].meaning)]
        + [_rate(each.detected_by_incident[incident]) for each in found.values()]
        for incident in found["gate"].detected_by_incident
    ]
    sections = [
        report_page.section(
            "Gates as detectors",
            "Shares of weeks with 95% Wilson intervals; what is neither blocked nor promoted was on hold. Delay: weeks "
            "that went by before an incident was blocked.",
            report_page.table(
                ["", "clean, blocked", "clean, promoted", "incidents, blocked", "incidents, promoted", "delays"], gates
            ),
        ),
        report_page.section(plot.title, plot.caption, report_page.picture(plot.name, plot.title)),
    ]
    if by_incident:
        table = report_page.table(["", *found], by_incident)
        sections.append(report_page.section("By incident", "Share of its weeks that were blocked.", table))
    cells = [
        [
            f'<a href="{week["week"]}/report.html">{row["week"]}</a>',
            *(html.escape(str(v)) for v in list(row.values())[1:]),
        ]
        for week, row in zip(weeks, week_rows(weeks), strict=True)
    ]
    caption = "Differences are candidate minus incumbent."
    sections.append(report_page.section("Weeks", caption, report_page.table(week_rows(weeks)[0], cells)))
    said = [week["decisions"]["gate"] for week in weeks]
    facts = {"weeks": str(len(weeks))} | {decision: str(said.count(decision)) for decision in Decision}
    page = report_page.page("Weekly redeploys", facts, sections)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return metrics


def draw_judge(rows: Rows) -> Picture:
    """Incumbent and candidate over the weeks, a mark for each decision; incidents named."""
    picture = report_pictures.blank(report_pictures.WIDTH, 3.6)
    panel = picture.subplots()
    incumbent, candidate = ([row for row in rows if row["who"] == who] for who in ("incumbent", "candidate"))
    promoted = [row["decision"] == Decision.PROMOTE and not row["rolled_back"] for row in candidate]
    after = [(new if of else old)["judge"] for old, new, of in zip(incumbent, candidate, promoted, strict=True)]
    weeks = [row["week"] for row in incumbent]
    panel.step(weeks, after, where="mid", color=report_pictures.COLORS[0], label="in production after the week")
    for decision, marker, color, label in (
        (Decision.PROMOTE, "o", report_pictures.COLORS[2], "candidate, promoted"),
        (Decision.HOLD, "s", report_pictures.COLORS[3], "candidate, on hold"),
        (Decision.BLOCK, "x", report_pictures.COLORS[1], "candidate, blocked"),
    ):
        points = [row for row in candidate if row["decision"] == decision]
        panel.plot([p["week"] for p in points], [p["judge"] for p in points], marker, color=color, label=label)
    for row in candidate:
        if row["incident"]:
            panel.annotate(
                row["incident"].replace("_", " "), (row["week"], row["judge"]), fontsize=8, rotation=30,
                textcoords="offset points", xytext=(4, 6),
            )  # fmt: skip
    panel.margins(x=0.1)  # room for the names
    panel.set(xlabel="week", ylabel="judge's F1", ylim=(0, 1))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    report_pictures.shared_legend(picture)
    return picture


def _flat(found: Mapping[str, Detector]) -> dict[str, float]:
    """Numbers by name; what nothing defines is left out."""
    metrics: dict[str, float] = {}
    for name, each in found.items():
        rates = {"false_block_rate": each.false_blocks, "promotion_rate": each.promoted}
        rates |= {"detection_rate": each.detected, "let_through_rate": each.let_through}
        rates |= {f"detection_rate/{incident}": of for incident, of in each.detected_by_incident.items()}
        for figure, of in rates.items():
            if of.trials:
                metrics |= {
                    f"{name}/{figure}": of.value,
                    f"{name}/{figure}/low": of.low,
                    f"{name}/{figure}/high": of.high,
                }
        delays = [delay for of in each.delays.values() for delay in of]
        metrics[f"{name}/never_detected"] = sum(delay is None for delay in delays)
        known = [delay for delay in delays if delay is not None]
        if known:
            metrics[f"{name}/mean_delay_weeks"] = math.fsum(known) / len(known)
    return metrics


def _rate(of: Rate) -> str:
    if not of.trials:
        return "–"
    return f"{of.value:.0%} of {of.trials}<small>{of.low:.0%} to {of.high:.0%}</small>"


def _delays(each: Detector) -> str:
    delays = [delay for of in each.delays.values() for delay in of]
    return html.escape(", ".join("never" if delay is None else str(delay) for delay in delays)) or "–"
