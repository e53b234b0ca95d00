"""The page a relevance lead reads on Monday: this week's candidate, what was decided and why, and how to go back."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure as Picture

from core_jax.gate import METRICS, Decision, Verdict
from core_jax.search.trial import MEANINGS, Compared
from lm_jax import report_page, report_pictures
from lm_jax.report_pictures import Plot, Rows

PASSED, BLOCKED = "#009E73", "#D55E00"
MEANING = {
    Decision.BLOCK: "The incumbent stays: harm is not excluded.",
    Decision.HOLD: "The incumbent stays: the candidate is harmless and not shown to be better. Nothing is wrong.",
    Decision.PROMOTE: "Every criterion holds.",
}


def write_gate_report(
    folder: Path,
    verdict: Verdict,
    *,
    title: str,
    back: str,
    facts: Mapping[str, str],
    effect: Mapping[str, Compared] | None = None,
    other_gates: Mapping[str, Verdict] | None = None,
    examples: Sequence[Mapping[str, str]] = (),
    weeks: Rows = (),
) -> None:
    """Write report.html, its picture and the CSV behind it, and figures.json into `folder`, made if absent.

    Args:
        title: of the page; it should say the week and the decision.
        back: the command that returns to the version before.
        facts: head the page: versions, sessions, who decided.
        effect: what the candidate would have done to search, against searching as now.
        other_gates: what other gates would have said.
        examples: rows of the same columns, such as query, watched, incumbent, candidate.
        weeks: rows of the same columns, one a week so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot = Plot(
        "metrics",
        "Candidate minus incumbent",
        "Dot and one-sided bounds of each metric; the white part is where they have to lie.",
        metric_rows(verdict),
        draw_metrics,
    )
    plot.save(folder)
    sections = [_decision(verdict, back), _metrics(verdict)]
    sections.append(report_page.section(plot.title, plot.caption, report_page.picture(plot.name, plot.title)))
    if effect:
        sections.append(_effect(effect))
    if other_gates:
        rows = [
            [html.escape(name), each.decision, html.escape("; ".join(each.reasons))]
            for name, each in other_gates.items()
        ]
        caption = "Beside the one that decided, on the same sessions."
        sections.append(report_page.section("Other gates", caption, report_page.table(["gate", "says", "why"], rows)))
    for name, caption, rows in (
        ("Rewrites", "Of the same contexts, drawn evenly from the sessions looked at.", examples),
        ("Weeks so far", "The newest last.", weeks),
    ):
        if rows:
            cells = [[html.escape(str(cell)) for cell in row.values()] for row in rows]
            sections.append(report_page.section(name, caption, report_page.table(rows[0], cells)))
    (folder / "report.html").write_text(report_page.page(title, facts, sections), encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(verdict.figures(), indent=2) + "\n", encoding="utf-8")


def metric_rows(verdict: Verdict) -> Rows:
    """One row a criterion: difference, bounds, margins."""
    return [
        {"metric": finding.name, **finding.difference._asdict()}
        | {"above": finding.above, "below": finding.below, "passed": finding.passed}
        for finding in verdict.findings
    ]


def draw_metrics(rows: Rows) -> Picture:
    """A line a metric, each in its own unit, what may not be in grey."""
    picture = report_pictures.blank(report_pictures.WIDTH, 0.62 * len(rows) + 0.5)
    panels = picture.subplots(len(rows), 1, squeeze=False)[:, 0]
    for panel, row in zip(panels, rows, strict=True):
        color = PASSED if row["passed"] else BLOCKED
        known = [row[end] for end in ("low", "value", "high", "above", "below")]
        reach = 1.25 * max((abs(end) for end in known if abs(end) < float("inf")), default=0.0) or 1.0
        panel.set_xlim(-reach, reach)
        for start, end in ((-reach, row["above"]), (row["below"], reach)):
            if start < end and abs(start) <= reach and abs(end) <= reach:
                panel.axvspan(start, end, color="#dddddd", linewidth=0)
        panel.axvline(0, color="#888888", linewidth=0.8)
        panel.hlines(0, row["low"], row["high"], color=color, linewidth=2)
        panel.plot([row["value"]], [0], "o", color=color, markersize=6)
        panel.set_yticks([0], [row["metric"]])
        panel.set_ylim(-1, 1)
        panel.grid(False)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelsize=8)
    return picture


def _decision(verdict: Verdict, back: str) -> str:
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons)
    why = f"<p>{MEANING[verdict.decision]}</p>" + (f"<ul>{reasons}</ul>" if reasons else "")
    caption = f"On {verdict.contexts:,} contexts of {verdict.queries:,} queries that neither was trained on."
    go_back = (
        f"<p>To go back to the version before:</p><pre>{html.escape(back)}</pre>"
        "<p>Rewrites in the store belong to the version that wrote them: until that version's are written again, "
        "searches go without.</p>"
    )
    return report_page.section(verdict.decision, caption, why + go_back)


def _metrics(verdict: Verdict) -> str:
    rows = []
    for finding in verdict.findings:
        low, high = finding.difference[1:]
        bounds = [f"above {finding.above:+.3g}"] if finding.above > -float("inf") else []
        bounds += [f"up to {finding.below:+.3g}"] if finding.below < float("inf") else []
        rows.append(
            [
                report_page.named(finding.name, METRICS[finding.metric]),
                f"{finding.incumbent:.3f}",
                f"{finding.candidate:.3f}",
                f"{finding.difference.value:+.3f}<small>{low:+.3f} to {high:+.3f}</small>",
                " and ".join(bounds),
                "passes" if finding.passed else "<b>fails</b>",
            ]
        )
    head = ["", "incumbent", "candidate", "difference", "must lie", ""]
    caption = (
        "Bounds are one-sided, by a bootstrap over queries. One outside its margins blocks; what a promotion asks for "
        "besides only keeps the candidate on hold. What is told since the first version is compared with that one "
        "instead of the incumbent, and what comes back towards it passes."
    )
    return report_page.section("Seven metrics", caption, report_page.table(head, rows))


def _effect(effect: Mapping[str, Compared]) -> str:
    rows = [
        [
            report_page.named(name, MEANINGS[name]),
            f"{each.a.value:.3f}<small>{each.a.low:.3f} to {each.a.high:.3f}</small>",
            f"{each.b.value:.3f}<small>{each.b.low:.3f} to {each.b.high:.3f}</small>",
            f"{each.difference.value:+.3f}<small>{each.difference.low:+.3f} to {each.difference.high:+.3f}</small>",
            f"{each.worst:+.3f}",
        ]
        for name, each in effect.items()
    ]
    caption = (
        "The same searches, with 95% intervals over queries, and the worst single search. A clip that the searcher has "
        "just watched counts nowhere."
    )
    head = ["", "as now", "with the candidate", "difference", "worst"]
    return report_page.section("What it would have done to search", caption, report_page.table(head, rows))
