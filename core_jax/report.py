"""The report of a rewriter's run: report.html, metrics.json, and each plot as PNG with the CSV it was drawn from."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture
from matplotlib.ticker import PercentFormatter

from core_jax.evaluation import MEANINGS, RATES, Evaluated
from lm_jax import report_page, report_pictures
from lm_jax.bootstrap import Figure
from lm_jax.report_pictures import Plot, Rows

# What a phase cost, as far as a reader wants to know it.
COSTS = {
    "contexts": "contexts",
    "sampled": "rewrites drawn",
    "relevance_pairs": "query-document pairs the reward asked for",
    "pairs": "preference pairs kept",
    "share_in_gradient": "of the rewrites drawn, so many in the gradient pass (at most (2k + query_pairs)/N)",
    "syncs": "times the sampler took over the policy",
    "staleness/most_steps": "steps that the policy is ahead of the one sampled from, at most",
    "margin": "mean difference of value in a pair",
    "distinct": "different rewrites of a context, as a share",
    "reward/share_clipped": "rewrites at the clip of the ratio",
    "seconds/sampling": "s sampling",
    "seconds/scoring": "s scoring",
    "seconds/training": "s training",
}
REWARD = ("improvement_rate", "improves_if_said", "log_gain", "s_pos", "s_neg", "s_rand", "s_off")
TRUTH = ("judge", "judge_gain", "ndcg", "ndcg_gain")
DEGENERACY = ("identity", "copies_title", "distinct", "truncated", "length", "entropy")
EXAMPLES = 12


def write_report(
    folder: Path,
    evaluated: Mapping[str, Evaluated],
    phases: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    records: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, float]:
    """Write the report into `folder` (made if absent) and return the contents of metrics.json.

    `evaluated` are the rewriters in the order they came to be, `phases` what each phase left as facts. metrics.json is
    flat: "<rewriter>/<figure>" with "/low" and "/high", and "cost/<phase>/<fact>".
    """
    figures = {name: each.figures(seed=seed, resamples=resamples) for name, each in evaluated.items()}
    metrics = {
        f"{name}/{figure}" + ("" if field == "value" else f"/{field}"): number
        for name, of_name in figures.items()
        for figure, value in of_name.items()
        for field, number in value._asdict().items()
    }
    metrics |= {f"cost/{name}/{fact}": value for name, of_phase in phases.items() for fact, value in of_phase.items()}
    plots = [plot for plot in _plots(figures, records) if plot.rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for plot in plots:
        plot.save(folder)
    sections = _sections(figures, phases, plots, evaluated)
    (folder / "report.html").write_text(report_page.page(title, facts, sections), encoding="utf-8")
    return metrics


def figure_rows(figures: Mapping[str, Mapping[str, Figure]], names: Sequence[str]) -> Rows:
    """One row a rewriter and figure."""
    return [
        {"rewriter": rewriter, "figure": name, **of_rewriter[name]._asdict()}
        for name in names
        for rewriter, of_rewriter in figures.items()
        if name in of_rewriter
    ]


def draw_figures(rows: Rows) -> Picture:
    """A panel a figure: a dot for each rewriter in order, with its interval."""
    names, rewriters = (report_pictures.distinct(rows, column) for column in ("figure", "rewriter"))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    picture = report_pictures.blank(report_pictures.WIDTH, 2.6 * lines + 0.3)
    panels = list(picture.subplots(lines, columns, squeeze=False).flat)
    color = report_pictures.COLORS[0]
    for panel, name in zip(panels, names, strict=False):
        points = [row for row in rows if row["figure"] == name]
        places = [rewriters.index(row["rewriter"]) for row in points]
        panel.plot(places, [row["value"] for row in points], "o-", color=color)
        panel.vlines(places, [row["low"] for row in points], [row["high"] for row in points], color=color, alpha=0.5)
        panel.set(title=name.replace("_", " "))
        panel.set_xticks(range(len(rewriters)), rewriters, rotation=30, ha="right", fontsize=8)
        if name in RATES:
            panel.set_ylim(-0.02, 1.02)
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for unused in panels[len(names) :]:
        unused.remove()
    return picture


def _plots(figures: Mapping[str, Mapping[str, Figure]], records: Sequence[Mapping[str, Any]]) -> Iterable[Plot]:
    def series(name: str, title: str, caption: str, unit: str, wanted) -> Plot:
        rows = report_pictures.series_rows(records, wanted)
        return Plot(name, title, caption, rows, functools.partial(report_pictures.draw_series, unit=unit))

    def dots(name: str, title: str, caption: str, wanted: Sequence[str]) -> Plot:
        return Plot(name, title, caption, figure_rows(figures, wanted), draw_figures)

    yield dots("reward", "Reward", "On held-out sessions, with 95% intervals over queries.", REWARD)
    truth = "What was said, and what search shows of it, against what was meant; no part of any reward."
    yield dots("judge", "Independent judge", truth, TRUTH)
    yield dots("degeneracy", "Does it degenerate?", "A rewriter that pleases the reward alone shows here.", DEGENERACY)
    yield series(
        "loss", "Loss", "Nats a pair or a token, weighted; a panel a stage.", "loss", lambda name: name == "loss"
    )
    sides = ("rewards/chosen", "rewards/rejected", "delta")
    yield series(
        "preferences", "Implicit rewards", "β (log π − log π_ref) of chosen and rejected rewrites.", "nats",
        lambda name: name in sides,
    )  # fmt: skip
    yield series(
        "accuracy", "Pairs in the right order", "Share of pairs whose chosen rewrite gained more.", "share",
        lambda name: name == "rewards/accuracies",
    )  # fmt: skip


def _sections(
    figures: Mapping[str, Mapping[str, Figure]],
    phases: Mapping[str, Mapping[str, float]],
    plots: Sequence[Plot],
    evaluated: Mapping[str, Evaluated],
) -> Iterable[str]:
    named = [name for name in MEANINGS if any(name in of_rewriter for of_rewriter in figures.values())]
    rows = [
        [report_page.named(name.replace("_", " "), MEANINGS[name])]
        + [_cell(of_rewriter.get(name)) for of_rewriter in figures.values()]
        for name in named
    ]
    yield report_page.section("Figures", "With 95% intervals over queries.", report_page.table(["", *figures], rows))
    for plot in plots:
        yield report_page.section(plot.title, plot.caption, report_page.picture(plot.name, plot.title))
    if phases:
        rows = [
            [report_page.named(name, meaning)]
            + [f"{facts[name]:,.4g}" if name in facts else "–" for facts in phases.values()]
            for name, meaning in COSTS.items()
        ]
        caption = "Sampling and scoring happen once a phase; training then takes many steps."
        yield report_page.section("Phases", caption, report_page.table(["", *phases], rows))
    *_, (name, last) = evaluated.items()
    places = range(0, len(last.queries), max(1, len(last.queries) // EXAMPLES))
    rows = [[html.escape(last.queries[place]), html.escape(last.rewrites[place])] for place in places][:EXAMPLES]
    yield report_page.section(
        "Examples", f"Queries as typed and the rewrites of {name}.", report_page.table(["query", "rewrite"], rows)
    )


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    return f"{figure.value:.3f}<small>{figure.low:.3f} to {figure.high:.3f}</small>"
