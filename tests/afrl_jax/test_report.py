import csv
import json

import matplotlib.image
import numpy as np
import pytest

from afrl_jax import calibration, report_plots
from afrl_jax.decision import Decision
from afrl_jax.evaluation import Predictions, evaluate_predictions, paired_bootstrap
from afrl_jax.report import write_report
from afrl_jax.schema import Instruction, Rule, Scale

LABELS = ("bad", "fair", "good")
INSTRUCTION = Instruction("judge", Scale(LABELS), (Rule(1, "names <it>", (2,)), Rule(4, "another episode", (0,))))
FREQUENCY = {1: 0.9, 4: 0.004, 9: 0.03}


def made_up(seed, sharpness=1.0, rows=120):
    judged, rng = np.random.default_rng(0), np.random.default_rng(seed)
    grade, rule, query_index = (judged.integers(0, high, rows) for high in (3, 2, 12))
    logits = rng.normal(0, 1, (rows, 3)) + sharpness * np.eye(3)[grade]
    served, own = (calibration.Calibration(temperature, (0, 0, 0)).apply(logits) for temperature in (1, 0.7))
    return Predictions(query_index, grade, served, Decision(0.5), own, np.array([1, 4])[rule])


def training_log():
    return [{"stage": "sft", "step": step, "loss": 2 / step, "grad_norm": 1.0} for step in range(1, 41)] + [
        {
            "stage": "rl",
            "step": step,
            "loss": None if step == 3 else 0.1,
            "sft/label": 0.3,
            "reward": 0.5 + step / 100,
            "rewards/label/mean": 0.6,
            "entropy": 0.4,
            "first_token/entropy": 0.7,
            "frac_reward_zero_std": 0.2,
            f"dead_groups/{(1, 4, 9)[step % 3]}": step / 10,
        }
        for step in range(1, 7)
    ]


def rows_of(folder, name):
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "report"
    models = {"sft": made_up(1), "rl": made_up(2, 2.0), "student": made_up(3, 1.5)}
    metrics = write_report(
        folder,
        models,
        INSTRUCTION,
        title="Clips <quick>",
        records=training_log(),
        rule_frequency=FREQUENCY,
        facts={"command": "python -m afrl_jax.main"},
        resamples=50,
    )
    return folder, models, metrics


def test_every_plot_is_a_picture_with_its_rows(full):
    folder, _, _ = full
    plots = {path.stem for path in folder.glob("*.png")}
    assert plots == {path.stem for path in folder.glob("*.csv")} == {
        *("loss", "rewards", "entropy", "dead_groups"),
        *("confusion", "reliability", "rule_recall", "teacher_student"),
    }  # fmt: skip
    for name in plots:
        picture = matplotlib.image.imread(folder / f"{name}.png")
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01


def test_series_hold_the_logged_values(full):
    folder, _, _ = full
    loss = {(row["stage"], int(row["step"]), row["series"]): float(row["value"]) for row in rows_of(folder, "loss")}
    wanted = {("sft", step, "loss"): 2 / step for step in range(1, 41)}
    wanted |= {("rl", step, "loss"): 0.1 for step in (1, 2, 4, 5, 6)}  # not finite at step 3
    wanted |= {("rl", step, "sft/label"): 0.3 for step in range(1, 7)}
    assert loss == wanted
    assert {row["series"] for row in rows_of(folder, "rewards")} == {"reward", "rewards/label/mean"}
    assert {row["series"] for row in rows_of(folder, "entropy")} == {"entropy", "first_token/entropy"}
    dead = [(int(row["step"]), int(row["rule"]), float(row["dead_share"])) for row in rows_of(folder, "dead_groups")]
    assert dead == [(step, (1, 4, 9)[step % 3], step / 10) for step in range(1, 7)]


def test_stages_whose_steps_have_the_same_numbers_stay_apart():
    records = [
        {"stage": stage, "step": step, "dead_groups/4": share + step / 10}
        for stage, share in (("rl", 0.5), ("rl_natural", 0.1))
        for step in range(3)
    ]
    rows = report_plots.dead_group_rows(records, FREQUENCY)
    assert [(row["stage"], row["step"], row["dead_share"]) for row in rows] == [
        (record["stage"], record["step"], record["dead_groups/4"]) for record in records
    ]
    by_rule, *panels = report_plots.draw_dead_groups(rows).axes
    assert [panel.get_title("left") or panel.get_title() for panel in panels] == ["rl", "rl_natural"]
    for panel, shares in zip(panels, ([0.5, 0.6, 0.7], [0.1, 0.2, 0.3]), strict=True):
        np.testing.assert_allclose(panel.lines[0].get_ydata(), shares)
    assert by_rule.patches[0].get_height() == pytest.approx(0.4)


def test_tables_of_predictions_hold_their_counts(full):
    folder, models, _ = full
    for name, model in models.items():
        cells = {
            (row["gold"], row["predicted"]): int(row["pairs"])
            for row in rows_of(folder, "confusion")
            if row["model"] == name
        }
        for gold, predicted in np.ndindex(3, 3):
            count = np.sum((model.grade == gold) & (model.predicted == predicted))
            assert cells[LABELS[gold], LABELS[predicted]] == count
        bins = [row for row in rows_of(folder, "reliability") if row["model"] == name]
        for state, probabilities in (("before", model.uncalibrated), ("after", model.probabilities)):
            of_state = [row for row in bins if row["calibration"] == state]
            assert sum(int(row["pairs"]) for row in of_state) == 120
            right = sum(int(row["pairs"]) * float(row["accuracy"]) for row in of_state)
            assert right == pytest.approx(np.sum(probabilities.argmax(-1) == model.grade))


def test_rules_and_student_are_compared(full):
    folder, models, _ = full
    recall = {(int(row["rule"]), row["model"]): float(row["recall"]) for row in rows_of(folder, "rule_recall")}
    wanted = {
        (rule, name): np.mean((model.predicted == model.grade)[model.rule == rule])
        for rule in (1, 4)
        for name, model in models.items()
        if name != "student"
    }
    assert recall == pytest.approx(wanted)
    accuracy = [row for row in rows_of(folder, "teacher_student") if row["metric"] == "accuracy"]
    assert [row["model"] for row in accuracy] == ["rl", "student"]
    right = [np.mean(models[name].predicted == models[name].grade) for name in ("rl", "student")]
    assert [float(row["value"]) for row in accuracy] == pytest.approx(right)
    assert [float(row["retention"]) for row in accuracy] == pytest.approx([1, right[1] / right[0]])


def test_metrics_and_page_hold_the_figures(full):
    folder, models, metrics = full
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    page = (folder / "report.html").read_text(encoding="utf-8")
    for name, model in models.items():
        for metric, figure in evaluate_predictions(model, rule_frequency=FREQUENCY, resamples=50).items():
            flat = tuple(metrics[f"{name}/{metric}{end}"] for end in ("", "/low", "/high"))
            assert flat == figure
            assert f"{figure.value:.3f}<small>{figure.low:.3f} to {figure.high:.3f}</small>" in page
    gain = paired_bootstrap(models["sft"], models["rl"], resamples=50)["pair_accuracy"]
    assert (metrics["rl-sft/pair_accuracy"], metrics["rl-sft/pair_accuracy/p"]) == (gain.value, gain.p)
    assert f"{gain.value:+.3f}" in page
    assert "Clips &lt;quick&gt;" in page and "names &lt;it&gt;" in page and "python -m afrl_jax.main" in page
    assert all(f'src="{path.name}"' in page for path in folder.glob("*.png"))
    assert "http" not in page  # self-contained


def test_missing_parts_leave_their_plots_out(tmp_path):
    model = made_up(1)
    bare = Predictions(model.query_index, model.grade, model.probabilities)
    metrics = write_report(tmp_path, {"zero_shot": bare}, INSTRUCTION, title="One", resamples=10)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"confusion", "reliability"}
    assert all(name.startswith("zero_shot/") for name in metrics)
    assert "Differences" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    write_report(tmp_path / "log only", {}, INSTRUCTION, title="Log", records=training_log()[:9])
    assert {path.stem for path in (tmp_path / "log only").glob("*.png")} == {"loss"}
