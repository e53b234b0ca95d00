"""The Monday page: what it says, and what is escaped."""

import csv
import html
import json

import numpy as np
import pytest

from core_jax.gate import ALL_SEVEN_IMPROVE, METRICS, Measurements, decide
from core_jax.gate_report import metric_rows, write_gate_report
from core_jax.search.trial import MEANINGS, compare


def measured(shift):
    rng = np.random.default_rng(0)
    values = {name: 1 + rng.random(200) for name in METRICS}
    values["log_ratio"] = values["log_ratio"] + shift
    return Measurements([str(i) for i in range(200)], [f"q{i % 100}" for i in range(200)], values)


def test_the_page_tells_the_decision_the_reasons_and_the_way_back(tmp_path):
    verdict = decide(measured(0.0), measured(-0.3), resamples=100)
    other = decide(measured(0), measured(0), ALL_SEVEN_IMPROVE)
    now, then = ({name: np.full(3, value) for name in MEANINGS} for value in (0.25, 0.5))
    effect = compare(now, then, ["a", "b", "c"], resamples=20)
    write_gate_report(
        tmp_path, verdict, title="Week 3: kept", back="python -m core_jax.registry --registry=R rollback --why=...",
        facts={"candidate": "abc<"}, effect=effect, other_gates={"all_seven": other},
        examples=[{"query": "<script>x</script>", "candidate": "y"}], weeks=[{"week": 1, "decision": "promoted"}],
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert ">block<" in page and "harm is not excluded" in page and html.escape(verdict.reasons[0]) in page
    assert "<script>" not in page and "abc&lt;" in page and "--registry=R rollback" in page
    assert page.count("<b>fails</b>") == 2 and page.count(">passes<") == 6  # no harm to the log ratio, and superiority
    assert "+0.250" in page and all(name in page for name in MEANINGS)
    assert json.loads((tmp_path / "figures.json").read_text()) == verdict.figures()
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["metric"] for row in csv.DictReader(file)] == [row["metric"] for row in metric_rows(verdict)]


@pytest.mark.parametrize(
    ("shift", "said"), [(1.0, (">promote<", "Every criterion holds")), (0.0, (">hold<", "Nothing is wrong"))]
)
def test_a_promotion_and_a_candidate_on_hold_say_so(tmp_path, shift, said):
    verdict = decide(measured(0), measured(shift), resamples=50)
    write_gate_report(tmp_path, verdict, title="t", back="b", facts={})
    page = (tmp_path / "report.html").read_text()
    assert all(words in page for words in said)
