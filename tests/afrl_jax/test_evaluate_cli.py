import json

import numpy as np
import pytest

from afrl_jax import evaluate
from afrl_jax.data.grade_mapping import GradeMapping
from afrl_jax.schema import Scale

WORDS = "chess openings kids robots sourdough home clip query".split()


def write_folder(folder, judgments, queries=6, prefix="q", table="documents"):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(prefix))
    rows = {
        "queries": [{"query_id": f"{prefix}{i}", "text": f"{WORDS[i]} {prefix}"} for i in range(queries)],
        table: [{"doc_id": f"d{i}", "title": " ".join(random.choice(WORDS, 4))} for i in range(5)],
        "judgments": judgments,
    }
    for name, table_rows in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table_rows))
    return folder


def judged(grades=(1, 2, 3), queries=6, prefix="q"):
    return [
        {"query_id": f"{prefix}{q}", "doc_id": f"d{d}", "grade": grades[(q * 2 + d) % len(grades)]}
        for q in range(queries)
        for d in range(5)
    ]


def run(model, judgments, *options):
    evaluate.main([f"--model={model}", f"--judgments={judgments}", "--resamples=50", *options])


def refused(capsys, model, judgments, *options):
    with pytest.raises(SystemExit) as stopped:
        run(model, judgments, *options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def figures_of(text):
    """metric -> value from the printed table."""
    lines = [line.split() for line in text.splitlines() if " to " in line and "pairs," not in line]
    return {line[0]: float(line[1]) for line in lines}


def test_figures_are_those_of_the_models_own_calibrated_grades(export, tmp_path, capsys):
    folder, model = export
    data = write_folder(tmp_path / "test", judged())
    run(folder, data, f"--output={tmp_path / 'out'}")
    printed = capsys.readouterr().out
    documents = [json.loads(line)["title"] for line in (data / "documents.jsonl").read_text().splitlines()]
    rows = judged()
    pairs = [(f"{WORDS[int(row['query_id'][1:])]} q", documents[int(row["doc_id"][1:])]) for row in rows]
    probabilities = model.predict_proba(pairs)
    at_least = probabilities[:, ::-1].cumsum(1)[:, ::-1]
    decided = np.array([max([c for c in (1, 2) if row[c] >= 0.4], default=0) for row in at_least])
    gold = np.array([row["grade"] - 1 for row in rows])
    brier = np.square(probabilities - np.eye(3)[gold]).sum(1).mean()
    found = figures_of(printed)
    assert found["accuracy"] == pytest.approx(np.mean(decided == gold), abs=6e-4)
    assert found["brier"] == pytest.approx(brier, abs=6e-4)
    assert "30 pairs, 6 queries" in printed and "the model's own" in printed
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["model/accuracy"] == pytest.approx(np.mean(decided == gold))
    assert metrics["model/accuracy/low"] <= metrics["model/accuracy"] <= metrics["model/accuracy/high"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "quadratic_weighted_kappa" in page and (tmp_path / "out" / "confusion.csv").exists()


def test_without_output_nothing_is_written(export, tmp_path, capsys):
    data = write_folder(tmp_path / "test", judged())
    run(export[0], data)
    assert figures_of(capsys.readouterr().out)["accuracy"] >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


def test_calibration_is_fitted_again_on_other_queries(export, tmp_path, capsys):
    folder, model = export
    data = write_folder(tmp_path / "test", judged(grades=(3,)))
    other = write_folder(tmp_path / "dev", judged(grades=(3,), prefix="other"), prefix="other")
    run(folder, data)
    own = figures_of(capsys.readouterr().out)
    run(folder, data, f"--calibration={other}")
    fitted = figures_of(capsys.readouterr().out)
    assert fitted["accuracy"] > 0.5 > own["accuracy"] and fitted["brier"] < own["brier"]
    assert fitted["brier_before_calibration"] == own["brier_before_calibration"]
    told = refused(capsys, folder, data, f"--calibration={data}")
    assert "6 of its queries are also in --judgments" in told


def test_raw_grades_are_mapped_as_declared(export, tmp_path, capsys):
    folder, _ = export
    plain = write_folder(tmp_path / "plain", judged())
    run(folder, plain)
    expected = figures_of(capsys.readouterr().out)
    spelled = [row | {"grade": {1: -2, 2: "fair", 3: 9}[row["grade"]]} for row in judged()]
    run(folder, write_folder(tmp_path / "spelled", spelled, table="docs"), "--documents=docs", "--grades=-2/0,fair,9")
    assert figures_of(capsys.readouterr().out) == expected
    means = [row | {"grade": row["grade"] + (0.4 if row["grade"] < 3 else -0.4)} for row in judged()]
    run(folder, write_folder(tmp_path / "means", means), "--thresholds=1.5,2.5")
    assert figures_of(capsys.readouterr().out) == expected


def test_any_causal_model_is_judged_zero_shot(causal, tmp_path, capsys):
    run(causal, write_folder(tmp_path / "test", judged(grades=(0, 1, 2, 3))))
    printed = capsys.readouterr().out
    assert "none" in printed
    found = figures_of(printed)
    assert found["brier"] == found["brier_before_calibration"] and found["accuracy"] <= 1
    run(causal, write_folder(tmp_path / "five", judged(grades=(1, 2))), "--labels=1=bad,2=good", "--task=Judge.")
    assert figures_of(capsys.readouterr().out)["pair_accuracy"] <= 1


def test_explanations_are_checked_where_the_data_have_some(export, tmp_path, capsys):
    explanation = {"need": ["kids"], "facts": ["children"], "verdicts": ["met"], "rule": 7}
    rows = [row | {"explanation": explanation, "rules": [7]} for row in judged(grades=(3,))]
    data = write_folder(tmp_path / "test", rows)
    run(export[0], data, "--explained_pairs=3", "--max_new_tokens=8")
    found = figures_of(capsys.readouterr().out)
    assert found["explanation/format"] == 0.0  # an untrained model's answer does not parse
    assert "rule_recall/7" in found
    run(export[0], data, "--explained_pairs=0")
    assert "explanation/format" not in figures_of(capsys.readouterr().out)


def test_bad_data_is_named_before_the_weights_are_read(export, tmp_path, capsys):
    folder, _ = export
    rows = judged()
    rows[3]["grade"], rows[5]["doc_id"] = 9, "nowhere"
    data = write_folder(tmp_path / "test", rows)
    told = refused(capsys, folder, data)
    assert "judgments.jsonl:4: grade: 9 is not on the scale; allowed: 1, 2, 3" in told
    assert "judgments.jsonl:6: doc_id: " in told
    assert "no such folder" in refused(capsys, folder, tmp_path / "absent")
    good = write_folder(tmp_path / "good", judged())
    assert "neither a model folder" in refused(capsys, tmp_path / "no model", good)
    assert "--resamples: must be a whole number of at least 1" in refused(capsys, folder, good, "--resamples=0")
    assert "at least 0, got 'x'" in refused(capsys, folder, good, "--explained_pairs=x")
    assert "--thresholds: must be numbers" in refused(capsys, folder, good, "--thresholds=a,b")
    assert "its own task and scale" in refused(capsys, folder, good, "--labels=1,2,3")


def test_one_pair_is_enough(export, tmp_path, capsys):
    run(export[0], write_folder(tmp_path / "test", judged()[:1]))
    assert figures_of(capsys.readouterr().out)["accuracy"] in (0.0, 1.0)


def test_grade_options_spell_the_arguments_of_a_grade_mapping():
    options = evaluate.grade_options("-2/0, 1,2", None)
    mapping = GradeMapping(Scale(("a", "b", "c")), **options)
    assert [mapping.index(raw) for raw in (-2, "0", 1.0, 2)] == [0, 0, 1, 2]
    assert evaluate.grade_options(None, "1.5,2.5") == {"thresholds": [1.5, 2.5]}
