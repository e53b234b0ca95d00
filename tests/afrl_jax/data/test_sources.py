import dataclasses

import pytest

from afrl_jax.data import clips
from afrl_jax.data.readers import write_judgments
from afrl_jax.data.sources import open_judgments, open_texts

SOURCE = {"format": "clips", "split": "train", "queries": 60, "documents_per_query": 3}
INSTRUCTION = clips.instruction()


def test_a_source_names_its_generator_and_arguments():
    assert open_judgments(SOURCE, INSTRUCTION, 5) == list(clips.judgments(5, "train", 60, 3))
    texts = {"format": "clips_text", "split": "train", "texts": 4}
    assert open_texts(texts, 5) == list(clips.domain_texts(5, "train", 4))
    with pytest.raises(ValueError, match="clips_text"):
        open_texts(SOURCE, 5)


def test_a_rule_that_the_instruction_does_not_have_is_refused(tmp_path):
    judged = [dataclasses.replace(judgment, explanation=None) for judgment in clips.judgments(5, "train", 2, 2)]
    judged[1] = dataclasses.replace(judged[1], rules=(99,))
    write_judgments(tmp_path / "own", judged, INSTRUCTION.scale)
    with pytest.raises(ValueError, match=r"query_id '.*', doc_id '.*': rules: 99 is none of the instruction's, 1, 2"):
        open_judgments({"path": str(tmp_path / "own")}, INSTRUCTION, 0)


def test_parts_of_a_source_are_disjoint_by_query_and_together_whole():
    parts = [open_judgments(SOURCE | {"keep": keep}, INSTRUCTION, 0) for keep in ((0.0, 0.7), (0.7, 1.0))]
    queries = [{judgment.query.query_id for judgment in part} for part in parts]
    assert not queries[0] & queries[1] and len(queries[0] | queries[1]) == 60
    assert 0.5 < len(queries[0]) / 60 < 0.9
    assert len(parts[0]) + len(parts[1]) == 180


def test_grades_alone_keep_everything_but_the_explanation():
    explained = open_judgments(SOURCE, INSTRUCTION, 0)
    graded = open_judgments(SOURCE | {"explained": False}, INSTRUCTION, 0)
    assert graded == [dataclasses.replace(judgment, explanation=None) for judgment in explained]
    assert graded[0].rules == explained[0].rules
