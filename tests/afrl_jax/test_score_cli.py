import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

from afrl_jax import score
from afrl_jax.calibration import Calibration
from afrl_jax.command_line import KERNELS
from afrl_jax.data.readers import read_pairs
from afrl_jax.decision import MOST_PROBABLE
from kernels import implementation
from sharding import distributed

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
ROWS = [
    {"query_id": 7, "query": "chess for kids", "doc_id": "d1", "title": "Chess openings", "text": "For children"},
    {"query": "robots", "document": "Sourdough at home", "note": ["ñ", 1.5, None]},
    {"query": "robots", "context": "chess", "document": {"title": "robots", "text": "at home", "minutes": 24}},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder, model, rows, *options):
    """The rows out of rows in."""
    source = rows if isinstance(rows, pathlib.Path) else write(folder / "pairs.jsonl", rows)
    score.main([f"--model={model}", f"--input={source}", f"--output={folder / 'scores.jsonl'}", *options])
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def refused(capsys, folder, model, rows, *options):
    """The message of a run that is refused, which leaves no output."""
    with pytest.raises(SystemExit) as stopped:
        run(folder, model, rows, *options)
    assert stopped.value.code == 2 and not (folder / "scores.jsonl").exists()
    return capsys.readouterr().err


def test_rows_keep_their_order_and_fields_and_get_calibrated_scores(export, tmp_path):
    folder, model = export
    out = run(tmp_path, folder, ROWS)
    assert [list(row) for row in out] == [
        ["query_id", "doc_id", "grade", "expected_grade", "probabilities", "calibrated_probabilities"],
        ["note", "grade", "expected_grade", "probabilities", "calibrated_probabilities"],
        ["grade", "expected_grade", "probabilities", "calibrated_probabilities"],
    ]
    assert out[0]["query_id"] == 7 and out[0]["doc_id"] == "d1" and out[1]["note"] == ["ñ", 1.5, None]
    asked = [
        ("chess for kids", {"title": "Chess openings", "text": "For children"}),
        ("robots", "Sourdough at home"),
    ]
    expected = model.predict_proba(asked)
    np.testing.assert_allclose([row["calibrated_probabilities"] for row in out[:2]], expected, atol=1e-5)
    for row in out:
        probabilities = row["calibrated_probabilities"]
        assert row["expected_grade"] == pytest.approx(np.dot(probabilities, [1, 2, 3]))  # labels are 1, 2, 3
        at_least = np.cumsum(probabilities[::-1])[::-1]
        assert row["grade"] == str(max(c for c in (1, 2, 3) if c == 1 or at_least[c - 1] >= 0.4))


def test_prompt_ids_scored_again_by_transformers_give_the_same_numbers(export, tmp_path):
    folder, model = export
    out = run(tmp_path, folder, ROWS, "--include_prompt_ids")
    causal = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row in out:
        with torch.no_grad():
            logits = causal(torch.tensor([row["prompt_ids"]])).logits[0, -1, row["label_token_ids"]]
        np.testing.assert_allclose(logits.softmax(-1).numpy(), row["probabilities"], atol=1e-5)
        calibrated = (logits.double().log_softmax(-1) / 0.8 + torch.tensor([0.3, 0, -0.2])).softmax(-1)
        np.testing.assert_allclose(calibrated.numpy(), row["calibrated_probabilities"], atol=1e-5)
        assert [tokenizer.decode([token]).strip() for token in row["label_token_ids"]] == ["1", "2", "3"]
    text = tokenizer.decode(out[2]["prompt_ids"])
    assert text.endswith("\nQuery: robots\nContext: chess\nDocument: robots\nat home\nminutes: 24\nGrade: ")
    assert text.startswith("Grade how well the clip answers the query.\n1 bad, 2 fair, 3 good\n4. another episode")


def test_any_causal_model_is_asked_zero_shot(causal, tmp_path):
    out = run(tmp_path, causal, ROWS, "--include_prompt_ids")
    model = transformers.AutoModelForCausalLM.from_pretrained(causal, dtype=torch.float32)
    for row in out:
        assert len(row["probabilities"]) == 4 and row["grade"] == "0123"[int(np.argmax(row["probabilities"]))]
        with torch.no_grad():
            logits = model(torch.tensor([row["prompt_ids"]])).logits[0, -1, row["label_token_ids"]]
        np.testing.assert_allclose(logits.softmax(-1).numpy(), row["probabilities"], atol=1e-5)
        np.testing.assert_allclose(row["calibrated_probabilities"], row["probabilities"], atol=1e-7)


def test_a_zero_shot_scale_without_numbers_counts_places(causal, tmp_path):
    options = ["--labels=x = no,y=maybe,z", "--task=Is it about chess?", "--include_prompt_ids"]
    out = run(tmp_path, causal, ROWS[:1], *options)
    assert out[0]["grade"] in {"x", "y", "z"}
    assert out[0]["expected_grade"] == pytest.approx(np.dot(out[0]["probabilities"], [0, 1, 2]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(causal)
    assert tokenizer.decode(out[0]["prompt_ids"]).startswith("Is it about chess?\nx no, y maybe, z\nQuery: ")


def test_chunks_are_invisible_and_the_output_appears_whole(export, tmp_path, monkeypatch):
    folder, _ = export
    rows = [{"i": i, "query": "robots " * (i % 3 + 1), "title": "chess " * (i % 5 + 1)} for i in range(11)]
    whole = run(tmp_path, folder, rows)
    (tmp_path / "scores.jsonl").unlink()
    monkeypatch.setattr(score, "CHUNK", 4)
    chunked = run(tmp_path, folder, rows)
    assert [row["i"] for row in chunked] == list(range(11))
    for name in ("probabilities", "expected_grade"):
        np.testing.assert_allclose([r[name] for r in chunked], [r[name] for r in whole], atol=1e-5)


KILLED = """if True:
    import os, sys
    from afrl_jax import score
    score.CHUNK, left, fsync = 4, int(sys.argv[1]), os.fsync

    def dying(file):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        fsync(file)

    os.fsync = dying
    score.main(sys.argv[2:])
"""


def test_killed_it_goes_on_without_a_lost_or_repeated_row(export, tmp_path, monkeypatch, capsys):
    """Each chunk is three fsyncs: the first death is inside the first chunk, the second inside the third."""
    folder, _ = export
    rows = [{"i": i, "query": "robots " * (i % 3 + 1), "title": "chess " * (i % 5 + 1)} for i in range(18)]
    rows[1], rows[9] = {"i": 1, "query": "robots"}, {"i": 9, "query": "", "title": "chess"}
    source, output = write(tmp_path / "pairs.jsonl", rows), tmp_path / "killed.jsonl"
    arguments = [f"--model={folder}", f"--input={source}", f"--output={output}", "--explain=0.25"]
    for deaths, chunks in ((1, None), (8, 2)):
        done = subprocess.run([sys.executable, "-c", KILLED, str(deaths), *arguments], cwd=REPOSITORY, check=False)
        assert done.returncode == -9 and not output.exists()
        progress = output.with_name("killed.jsonl.progress")
        assert (json.loads(progress.read_text())["chunks"] if progress.exists() else None) == chunks
    with pytest.raises(SystemExit):
        score.main([*arguments, "--include_prompt_ids"])
    assert "include_prompt_ids was False, is True" in capsys.readouterr().err
    monkeypatch.setattr(score, "CHUNK", 5)  # a chunk may be another after a restart
    score.main(arguments)
    whole = run(tmp_path, folder, source, "--explain=0.25")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["i"] for row in found] == [row["i"] for row in whole] == [i for i in range(18) if i not in (1, 9)]
    assert [row["i"] for row in found if "explanation" in row] == [3, 7, 11, 15]
    for row, same in zip(found, whole, strict=True):
        np.testing.assert_allclose(row.pop("probabilities"), same.pop("probabilities"), atol=1e-5)
        assert row["grade"] == same["grade"] and row.get("explanation") == same.get("explanation")
        assert row.get("explanation", row["grade"]).startswith(row["grade"])
    bad = [json.loads(line) for line in (tmp_path / "killed.jsonl.bad.jsonl").read_text().splitlines()]
    assert [row["values"]["i"] for row in bad] == [1, 9]
    assert "pairs.jsonl:2: document: " in bad[0]["reason"] and "pairs.jsonl:10: query: " in bad[1]["reason"]
    assert len(list(tmp_path.glob("killed*"))) == 3


@pytest.mark.parametrize("parts", [1, 3])
def test_each_process_scores_its_own_rows(export, tmp_path, monkeypatch, parts):
    """Of three processes, one after the other here; and their Parquet, one part behind the other, is the whole."""
    folder, _ = export
    rows = [{"i": i, "query": "robots", "title": "chess " * (i % 5 + 1)} for i in range(10)] + [{"query": 3}]
    source = write(tmp_path / "pairs.jsonl", rows)
    monkeypatch.setattr(jax, "process_count", lambda: parts)
    waits = []
    monkeypatch.setattr(distributed, "barrier", waits.append)
    found = []
    for part in range(parts):
        monkeypatch.setattr(jax, "process_index", lambda part=part: part)
        score.main([f"--model={folder}", f"--input={source}", f"--output={tmp_path / 'scores.parquet'}"])
        name = "scores.parquet" if parts == 1 else f"scores.{part}-of-3.parquet"
        found.append(pyarrow.parquet.read_table(tmp_path / name).to_pylist())
    assert [len(part) for part in found] == ([10] if parts == 1 else [3, 4, 3])
    assert [row["i"] for part in found for row in part] == list(range(10))
    assert np.sum([row["probabilities"] for part in found for row in part]) == pytest.approx(10)
    assert len(list(tmp_path.glob("*.bad.jsonl"))) == 1
    assert waits == ["scored", "finished"] * parts  # none ends before the others, whom it would take with it


def test_parquet_comes_in_as_well(export, tmp_path):
    table = pyarrow.Table.from_pylist([{"query": row["query"], "title": "chess"} for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    assert len(run(tmp_path, export[0], tmp_path / "pairs.parquet")) == 3


def test_a_file_without_a_pair_is_refused_before_the_model_is_read(tmp_path, capsys):
    rows = [{"query": "", "title": "x"}, {"query": "robots"}, {"query": 4, "title": "x"}]
    told = refused(capsys, tmp_path, tmp_path / "no such model", rows)
    for line, field in ((1, "query"), (2, "document"), (3, "query")):
        assert f"pairs.jsonl:{line}: {field}: " in told
    assert "no such model" not in told
    (tmp_path / "pairs.jsonl").write_text('{"query"\n')
    assert "pairs.jsonl:1: not valid JSON" in refused(capsys, tmp_path, "none", tmp_path / "pairs.jsonl")
    (tmp_path / "pairs.jsonl").write_text("")
    assert "holds no row" in refused(capsys, tmp_path, "none", tmp_path / "pairs.jsonl")


def test_fields_that_the_output_would_overwrite_are_named(export, tmp_path, capsys):
    rows = [ROWS[0], ROWS[1] | {"grade": 3, "probabilities": []}]
    told = refused(capsys, tmp_path, export[0], rows)
    assert "pairs.jsonl: the output writes grade, probabilities itself" in told
    carried = [ROWS[0] | {"prompt_ids": "mine"}]
    assert "prompt_ids" in refused(capsys, tmp_path, export[0], carried, "--include_prompt_ids")
    assert run(tmp_path, export[0], carried)[0]["prompt_ids"] == "mine"


def test_wrong_arguments_are_told_in_one_message(export, causal, tmp_path, capsys):
    assert "neither a model folder nor a .gguf file" in refused(capsys, tmp_path, tmp_path / "absent", ROWS)
    assert "its own task and scale 1, 2, 3" in refused(capsys, tmp_path, export[0], ROWS, "--labels=1,2")
    assert "must be one token" in refused(capsys, tmp_path, causal, ROWS, "--labels=irrelevant,relevant")
    assert "at least two different labels" in refused(capsys, tmp_path, causal, ROWS, "--labels=1,1")
    assert "empty label" in refused(capsys, tmp_path, causal, ROWS, "--labels=1,,2")
    source = write(tmp_path / "pairs.jsonl", ROWS)
    for output in (source, tmp_path):
        with pytest.raises(SystemExit):
            score.main([f"--model={causal}", f"--input={source}", f"--output={output}"])
        assert "is a folder or the input itself" in capsys.readouterr().err
    assert len(source.read_text().splitlines()) == 3
    assert "--explain: a share" in refused(capsys, tmp_path, causal, ROWS, "--explain=2")
    assert "unknown axis 'nonsense'" in refused(capsys, tmp_path, causal, ROWS, "--mesh=nonsense")
    assert "does not cover 1 devices" in refused(capsys, tmp_path, causal, ROWS, "--mesh=fsdp=2")


def test_calibration_of_one_label_moves_the_grade(tmp_path, tiny_model):
    model = tiny_model("llama", calibration=Calibration(1.0, (0.0, 50.0, 0.0)), decision=MOST_PROBABLE)
    numbered = list(enumerate(read_pairs(write(tmp_path / "pairs.jsonl", ROWS))))
    rows, bad = score.score_chunk(model, numbered, False, 0.0, 8, 64)
    assert bad == []
    assert [row["grade"] for row in rows] == ["2"] * 3
    assert [row["expected_grade"] for row in rows] == pytest.approx([2.0] * 3)


def test_a_row_that_the_model_finds_no_number_for_is_a_bad_row(tmp_path, tiny_model, monkeypatch):
    model = tiny_model("llama")
    found = model.label_logprobs

    def spoilt(pairs):
        logprobs = found(pairs)
        logprobs[1] = np.nan
        return logprobs

    monkeypatch.setattr(model, "label_logprobs", spoilt)
    numbered = list(enumerate(read_pairs(write(tmp_path / "pairs.jsonl", ROWS)), start=40))
    answers = ["1\nMatch: ", "1\nMatch: \nRule: 7\nVerdict: 1"]
    monkeypatch.setattr(model, "answers", lambda pairs, **_: answers[: len(pairs)])
    rows, (bad,) = score.score_chunk(model, numbered, True, 1.0, 8, 64)
    assert [row["explanation_truncated"] for row in rows] == [True, False]
    assert [row.get("query_id") for row in rows] == [7, None] and rows[1]["prompt_ids"]
    assert bad["reason"].startswith("row 42: ") and "not numbers" in bad["reason"]
    again = list(read_pairs(write(tmp_path / "bad.jsonl", [bad["values"]])))
    assert again == [numbered[1][1]]  # the same pair
    assert score.score_chunk(model, [numbered[0]] * 2, False, 0.0, 8, 64)[0][0]["grade"] in model.format.labels


def test_a_pair_with_too_long_a_query_is_a_bad_row_and_costs_the_others_nothing(tmp_path, tiny_model):
    model = tiny_model("llama")
    long = {"query": "chess " * 100, "title": "Chess"}
    numbered = list(enumerate(read_pairs(write(tmp_path / "pairs.jsonl", [ROWS[0], long])), start=40))
    rows, (bad,) = score.score_chunk(model, numbered, False, 0.0, 8, 64)
    assert rows == score.score_chunk(model, numbered[:1], False, 0.0, 8, 64)[0] != []
    assert re.fullmatch(r"row 42: its query and context have \d{3} tokens; --max_query_tokens is 64", bad["reason"])
    assert score.score_chunk(model, numbered[1:], False, 0.0, 8, 64) == ([], [bad])


def test_an_explanation_that_was_cut_off_says_so(export, tmp_path):
    folder, model = export
    asked = [(pair.query, pair.document) for pair in read_pairs(write(tmp_path / "pairs.jsonl", ROWS[:2]))]
    for tokens in (3, 8):
        rows = run(tmp_path, folder, ROWS[:2], "--explain=1", f"--explanation_tokens={tokens}")
        assert [row["explanation"] for row in rows] == model.answers(asked, max_new_tokens=tokens)
        assert [row["explanation_truncated"] for row in rows] == [True, True]


def test_a_finished_command_scores_nothing_again(export, tmp_path, monkeypatch):
    first = run(tmp_path, export[0], ROWS)
    monkeypatch.setattr(score, "score_chunk", None)
    assert run(tmp_path, export[0], tmp_path / "pairs.jsonl") == first


def test_kernels_run_as_asked(export, tmp_path, capsys):
    assert set(KERNELS) == {"auto", *implementation.NAMES}
    run(tmp_path, export[0], ROWS, "--kernels=xla")
    assert "label_head: xla, as asked for" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["score", "evaluate"])
def test_help_teaches_by_example_without_loading_jax(program):
    code = f"""if True:
        import sys
        from afrl_jax.{program} import main
        try:
            main(["--help"])
        finally:
            assert "jax" not in sys.modules
    """
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert f"python -m afrl_jax.{program} --model=runs/quickstart/export" in shown.stdout
    assert "Qwen/Qwen3-0.6B" in shown.stdout
