import hashlib
import json

import numpy as np
import pytest

from afrl_jax import relevance_file
from afrl_jax.answer_format import AnswerFormat
from afrl_jax.decision import Decision
from afrl_jax.schema import Instruction, Query, Scale


@pytest.fixture
def model(tiny_model):
    return tiny_model("qwen2")


@pytest.fixture
def description(model, pairs):
    described = relevance_file.describe(model, pairs, figures={"accuracy": 0.5}, weights_digest="f00", seed=7)
    return json.loads(json.dumps(described))


def written(folder, description):
    (folder / "relevance.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def test_what_is_described_is_read_again(tmp_path, description, model, pairs):
    read = relevance_file.read(written(tmp_path, description))
    assert read == description and read["seed"] == 7 and read["figures"] == {"accuracy": 0.5}
    instruction = relevance_file.instruction_of(read)
    assert instruction == model.format.instruction
    format = relevance_file.make_format(read, model.format.tokenizer, instruction)
    for ours, theirs in zip(model.format.encode_prompts(pairs), format.encode_prompts(pairs), strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    relevance_file.check_golden(read, model, tmp_path)


def test_a_file_from_before_decisions_is_read_with_its_threshold(tmp_path, description):
    del description["decision"]
    read = relevance_file.read(written(tmp_path, description | {"threshold": 0.37}))
    assert Decision.from_json(json.dumps(read["decision"])) == Decision(threshold=0.37)
    assert relevance_file.read(written(tmp_path, description | {"threshold": None}))["decision"]["threshold"] is None
    with pytest.raises(ValueError, match="decision is missing"):
        relevance_file.read(written(tmp_path, description))


def test_prompt_head_is_all_that_stands_before_the_query(description, model):
    query = Query("q", "chess for kids")
    assert description["prompt_head"] + query.text == model.format.prefix_text(query)


def test_a_folder_without_the_file_is_no_relevance_model(tmp_path):
    assert relevance_file.read(tmp_path) is None
    assert relevance_file.instruction_of(None) == relevance_file.DEFAULT_INSTRUCTION
    given = Instruction("Judge.", Scale(("no", "yes")))
    assert relevance_file.instruction_of(None, given) == given


def test_a_trained_model_takes_no_other_scale(description):
    with pytest.raises(ValueError, match=r"its own task and scale 1, 2, 3"):
        relevance_file.instruction_of(description, relevance_file.DEFAULT_INSTRUCTION)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d["template"].update(slot="\nLabel: "), "template_checksum is .* but the template gives"),
        (lambda d: d.update(format_version=99), "relevance.json: format_version is 99, this program reads 1"),
        (lambda d: d.pop("format_version"), "format_version is None"),
        (lambda d: [d.pop(key) for key in ("golden", "calibration")], "relevance.json: calibration, golden is missing"),
    ],
)
def test_a_spoilt_file_is_refused(tmp_path, description, spoil, message):
    spoil(description)
    with pytest.raises(ValueError, match=message):
        relevance_file.read(written(tmp_path, description))


def test_a_tokenizer_with_other_label_tokens_is_refused(description, tiny_tokenizer):
    description["label_token_ids"] = [label + 1 for label in description["label_token_ids"]]
    with pytest.raises(ValueError, match=r"the tokenizer gives label token ids \[.*\], relevance.json records \["):
        relevance_file.make_format(description, tiny_tokenizer, relevance_file.instruction_of(description))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["calibration"].update(temperature=2.0),
        lambda d: d["instruction"].update(task="Grade how badly the clip answers the query."),
        lambda d: d.update(max_document_tokens=10),
        lambda d: d.update(show_rules=False),
        lambda d: d["golden"][2]["probabilities"].reverse(),
    ],
    ids=["calibration", "instruction", "truncation", "rules", "golden"],
)
def test_golden_pairs_tell_another_model(tmp_path, description, model, spoil):
    spoil(description)
    format = relevance_file.make_format(description, model.format.tokenizer, relevance_file.instruction_of(description))
    changed = type(model)(
        model.config,
        model.parameters,
        format,
        calibration=type(model.calibration)(**description["calibration"]),
        decision=model.decision,
    )
    with pytest.raises(relevance_file.GoldenMismatch, match=r"golden pair \d \(query '.*'\) scores off by"):
        relevance_file.check_golden(description, changed, tmp_path)


def test_other_weights_than_those_of_the_digest_are_refused(tmp_path, description):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    described = description | {"weights_digest": hashlib.sha256(b"weights").hexdigest()}
    relevance_file.check_weights(described, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights, a little changed")
    with pytest.raises(relevance_file.GoldenMismatch, match="weights_digest is "):
        relevance_file.check_weights(described, tmp_path)


def test_golden_pairs_allow_bfloat16_its_rounding(tmp_path, description, tiny_model):
    relevance_file.check_golden(description, tiny_model("qwen2", dtype="bfloat16"), tmp_path)


def test_no_golden_pairs_no_check(tmp_path, description, model):
    relevance_file.check_golden(description | {"golden": []}, model, tmp_path)


def test_default_labels_are_single_tokens(tiny_tokenizer):
    assert len(AnswerFormat(tiny_tokenizer, relevance_file.DEFAULT_INSTRUCTION).label_ids) == 4
