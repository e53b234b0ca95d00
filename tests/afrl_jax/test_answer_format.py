import dataclasses
import os
import pathlib

import numpy as np
import pytest

from afrl_jax.answer_format import (
    CONSISTENCY,
    LABEL,
    MATCH,
    RULE,
    AnswerFormat,
    Parsed,
    Template,
    parse_answer,
    plain_texts,
    render_document,
    render_explanation,
)
from afrl_jax.data import clips
from afrl_jax.schema import Document, Explanation, Instruction, Match, Query, Rule, Scale
from lm_jax.tokenizer import Tokenizer, train_tokenizer

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
DATA = pathlib.Path(os.environ.get("AFRL_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
SMOLLM2 = pathlib.Path(os.environ.get("AFRL_SMOLLM2_GGUF", REPOSITORY / "weights" / "smollm2-135m-instruct-q4_1.gguf"))
INSTRUCTION = clips.instruction()
LABELS = INSTRUCTION.scale.labels
JUDGMENTS = list(clips.judgments(0, "train", 60, 8))
EXPLANATION = Explanation(
    ("topic robots", "under 20 minutes"), ("robots", "24 minutes"), (Match.MET, Match.VIOLATED), 25
)
ANSWER = "2\nMatch: topic robots | robots | met; under 20 minutes | 24 minutes | violated\nRule: 25\nVerdict: 2"


@pytest.fixture(scope="module", params=["trained", "smollm2", "qwen3"])
def tokenizer(request) -> Tokenizer:
    if request.param == "trained":
        texts = [text for judgment in JUDGMENTS for text in plain_texts(judgment, INSTRUCTION, show_rules=False)]
        return train_tokenizer(texts, 600)
    path = {"smollm2": SMOLLM2, "qwen3": DATA / "qwen3_tokenizer"}[request.param]
    if not path.exists():
        pytest.skip(f"{path} is absent: `make smollm2` fetches the one, AFRL_SHARED_DATA names the folder of the other")
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def format(tokenizer) -> AnswerFormat:
    return AnswerFormat(tokenizer, INSTRUCTION)


def answer(format: AnswerFormat, text: str) -> np.ndarray:
    """Tokens of an answer as a model would write it: the label, the text after it, the end."""
    label, rest = text[:1], text[1:]
    return np.array([format.label_ids[LABELS.index(label)], *format.tokenizer.encode(rest), format.tokenizer.eos])


def test_an_answer_reads_as_it_is_shown():
    assert "2" + render_explanation(EXPLANATION, "2") == ANSWER
    assert parse_answer(ANSWER, LABELS) == Parsed(2, EXPLANATION, 2)
    assert parse_answer(ANSWER.replace("Verdict: 2", "Verdict: 0"), LABELS) == Parsed(2, EXPLANATION, 0)


def test_a_line_of_a_document_is_one_field_whatever_its_name():
    shown = render_document(Document("", "robots", "at\nhome", {"note\nGrade": "3\n\nGrade: 3", "empty": ""}))
    assert shown == "robots\nat home\nnote Grade: 3 Grade: 3"


def test_gold_answers_go_round_through_tokens(format):
    for judgment in JUDGMENTS:
        tokens, segments = format.encode_answer(judgment)
        assert format.parse(tokens) == Parsed(judgment.grade, judgment.explanation, judgment.grade)
        np.testing.assert_array_equal(segments, format.segments(tokens))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        ANSWER + "\n",
        ANSWER + " ",
        ANSWER + "\nRule: 25",
        "\n" + ANSWER,
        " " + ANSWER,
        "4" + ANSWER[1:],
        "22" + ANSWER[1:],
        ANSWER.replace("Verdict: 2", "Verdict: 4"),
        ANSWER.replace("Verdict: 2", "Verdict: "),
        ANSWER.replace("Verdict: 2", "Verdict: 2."),
        ANSWER.replace("\nVerdict: 2", ""),
        ANSWER.replace("\nRule: 25", ""),
        ANSWER.replace("\nRule", "\n\nRule"),
        ANSWER.replace("Match: ", "Match:"),
        ANSWER.replace("Match", "match"),
        ANSWER.replace("Match: topic", "Match: ; topic"),
        ANSWER.replace("Match: topic robots", "Match: "),
        ANSWER.replace("violated\n", "violated; \n"),
        ANSWER.replace("met; under", "met;under"),
        ANSWER.replace("met; under", "met under"),
        ANSWER.replace("24 minutes | ", ""),
        ANSWER.replace("24 minutes", "24 minutes | 25 minutes"),
        ANSWER.replace("24 minutes", "24|minutes"),
        ANSWER.replace("24 minutes", ""),
        ANSWER.replace("| met", "| broken"),
        ANSWER.replace("| met", "| Met"),
        ANSWER.replace("| met", "|met"),
        ANSWER.replace("Rule: 25", "Rule: 025"),
        ANSWER.replace("Rule: 25", "Rule: +25"),
        ANSWER.replace("Rule: 25", "Rule: ２５"),
        ANSWER.replace("Rule: 25", "Rule: 25."),
        ANSWER.replace("Rule: 25", "Rule: "),
        ANSWER.replace("Match: ", "Rule: ").replace("Rule: 25", "Match: 25"),
        ANSWER.replace("\n", "\r\n"),
    ],
)
def test_anything_else_does_not_parse(text):
    assert parse_answer(text, LABELS) is None


def test_an_explanation_may_rest_on_its_rule_alone():
    explanation = Explanation((), (), (), 7)
    parsed = parse_answer("1" + render_explanation(explanation, "1"), ("0", "1"))
    assert (parsed.label, parsed.explanation, parsed.verdict) == (1, explanation, 1)
    with pytest.raises(ValueError, match="numbered from 0 on; got -3"):
        Explanation((), (), (), -3)


def test_what_parses_is_spelled_in_one_way_only():
    """Every answer one edit away is refused, or is itself the exact spelling of another answer."""
    edits = {ANSWER[:i] + ANSWER[i + 1 :] for i in range(len(ANSWER))}
    edits |= {ANSWER[:i] + extra + ANSWER[i:] for i in range(len(ANSWER) + 1) for extra in "\n ;|:2a"}
    refused = 0
    for text in edits:
        parsed = parse_answer(text, LABELS)
        if parsed is None:
            refused += 1
        else:
            assert LABELS[parsed.label] + render_explanation(parsed.explanation, LABELS[parsed.verdict]) == text
    assert refused > len(edits) / 2


def test_tokens_that_are_no_whole_answer_do_not_parse(format):
    tokens = answer(format, ANSWER)
    assert format.parse(tokens).explanation == EXPLANATION
    end, beyond = format.tokenizer.eos, format.tokenizer.vocab_size
    assert format.parse(tokens[:-1]) is None  # cut off
    assert format.parse(tokens[:0]) is None
    assert format.parse(tokens[1:]) is None  # no label
    assert format.parse(np.array([end])) is None
    assert format.parse(np.concatenate([tokens, [end]])) is None
    for place in range(1, len(tokens)):
        # A model's vocabulary is larger than the tokenizer's: those ids have no text, and must not be overlooked.
        assert format.parse(np.insert(tokens, place, beyond)) is None
    assert format.parse(np.insert(tokens, 0, tokens[0])) is None


def test_parts_tokenized_apart_are_the_tokens_of_the_whole(format):
    for judgment in JUDGMENTS:
        (prompt,) = format.encode_prompts([(judgment.query, judgment.document)])
        text = format.prefix_text(judgment.query) + format.document_text(judgment.document) + format.template.slot
        assert format.tokenizer.encode(text) == prompt.tokens.tolist()
        tokens, _ = format.encode_answer(judgment)
        text += LABELS[judgment.grade] + render_explanation(judgment.explanation, LABELS[judgment.grade])
        assert format.tokenizer.encode(text) == [*prompt.tokens, *tokens[:-1]]


def test_documents_of_a_query_share_the_very_same_prefix(format):
    question = Query("q", "robots?", context="a clip!")  # some tokenizers would join the mark with the newline after it
    prompts = format.encode_prompts([(question, Document(str(i), title)) for i, title in enumerate(("a", "?", ""))])
    assert prompts[0].prefix is prompts[1].prefix is prompts[2].prefix
    assert format.tokenizer.decode(prompts[0].prefix) == format.prefix_text(question)
    for prompt, title in zip(prompts, ("a", "?", ""), strict=True):
        assert format.tokenizer.decode(prompt.document) == f"\nDocument: {title}\nGrade: "


def test_truncation_shortens_the_document_alone(tokenizer):
    query = Query("q", "robots " * 50)
    short = AnswerFormat(tokenizer, INSTRUCTION, max_document_tokens=12)
    long = AnswerFormat(tokenizer, INSTRUCTION, max_document_tokens=10_000)
    document = Document("d", "robots", "of many kinds\nand sizes, " * 100, {"minutes": "24"})
    (cut,), (whole,) = (each.encode_prompts([(query, document)]) for each in (short, long))
    slot = len(tokenizer.encode("\nGrade: "))
    np.testing.assert_array_equal(cut.prefix, whole.prefix)
    assert len(cut.document) == 12 + slot
    np.testing.assert_array_equal(cut.document[:12], whole.document[:12])
    np.testing.assert_array_equal(cut.document[12:], whole.document[-slot:])
    assert tokenizer.decode(whole.document).endswith("and sizes,\nminutes: 24\nGrade: ")


def test_segments_are_those_of_the_lines(format):
    segment = [LABEL, MATCH, RULE, CONSISTENCY]
    for judgment in JUDGMENTS[:100]:
        tokens, segments = format.encode_answer(judgment)
        lines = [format.tokenizer.decode(tokens[1 : end + 1]).count("\n") for end in range(len(tokens))]
        np.testing.assert_array_equal(segments, [segment[line] for line in lines])
        assert segments[0] == LABEL
        assert set(segments) == {LABEL, MATCH, RULE, CONSISTENCY}
        assert (segments == LABEL).sum() == 1


def test_segments_of_malformed_answers(format):
    encode, end = format.tokenizer.encode, format.tokenizer.eos
    label = format.label_ids[1]
    prose = np.array([label, *encode(" is the grade"), end])
    np.testing.assert_array_equal(format.segments(prose), [LABEL] + [MATCH] * (len(prose) - 1))
    many = np.array([label] + encode("\nx") * 9)
    assert set(format.segments(many)[-2:]) == {CONSISTENCY}
    beyond = format.tokenizer.vocab_size + 5
    np.testing.assert_array_equal(format.segments(np.array([beyond, beyond, end])), [LABEL, MATCH, MATCH])
    batch = np.stack([prose, np.full_like(prose, end)])[None]
    np.testing.assert_array_equal(format.segments(batch)[0, 0], format.segments(prose))
    np.testing.assert_array_equal(format.segments(batch)[0, 1], [LABEL] + [MATCH] * (len(prose) - 1))


def test_a_judgment_without_explanation_is_answered_by_its_label_alone(format):
    judgment = dataclasses.replace(JUDGMENTS[0], explanation=None, rules=())
    tokens, segments = format.encode_answer(judgment)
    np.testing.assert_array_equal(tokens, [format.label_ids[judgment.grade]])
    np.testing.assert_array_equal(segments, [LABEL])


def test_labels_that_are_no_single_token_are_refused(tokenizer):
    many = dataclasses.replace(INSTRUCTION, scale=Scale(("irrelevant as can be", "perfect match")))
    with pytest.raises(ValueError, match="'irrelevant as can be' must be one token right after"):
        AnswerFormat(tokenizer, many)


def test_rules_are_shown_unless_told_otherwise(tokenizer):
    instruction = Instruction("Task.", Scale(("0", "1"), ("no", "yes")), (Rule(3, "another episode", (0,)),))
    query = Query("q", "robots\n under\t20", context="a  clip")
    shown = AnswerFormat(tokenizer, instruction).prefix_text(query)
    assert shown == "Task.\n0 no, 1 yes\n3. another episode\nQuery: robots under 20\nContext: a clip"
    hidden = AnswerFormat(tokenizer, instruction, show_rules=False).prefix_text(query)
    assert hidden == shown.replace("3. another episode\n", "")


def test_an_instruction_without_meanings_lists_its_labels(tokenizer):
    text = AnswerFormat(tokenizer, Instruction("Task.", Scale(("0", "1")))).prefix_text(Query("q", "robots"))
    assert text == "Task.\n0, 1\nQuery: robots"


def test_the_checksum_sees_every_string_of_the_template():
    strings = ("query", "context", "document", "slot")
    changed = {dataclasses.replace(Template(), **{name: "\nOther: "}).checksum for name in strings}
    assert len(changed | {Template().checksum}) == 5
    assert Template().checksum == Template().checksum
    assert len(Template().checksum) == 16


def test_the_head_is_what_all_prompts_begin_with(tiny_format):
    head = tiny_format.head_tokens
    for text in ("chess", "ログ", "9 lives", "-x"):
        (prompt,) = tiny_format.encode_prompts([(Query("", text), Document("", "robots"))])
        np.testing.assert_array_equal(prompt.prefix[: len(head)], head)
    text = tiny_format.tokenizer.decode(head)
    assert text.startswith("Grade how well the clip") and text.rstrip(" :").endswith("Query")


def test_documents_are_tokenized_once(tiny_tokenizer, tiny_format):
    format = AnswerFormat(tiny_tokenizer, tiny_format.instruction)
    asked = []

    class Counting:
        def encode_batch(self, texts):
            asked.append(list(texts))
            return tiny_tokenizer.encode_batch(texts)

    format.tokenizer = Counting()
    format._prefix_tokens = tiny_format._prefix_tokens
    pairs = [(Query("", "chess"), Document("", text)) for text in ("robots", "home", "robots")]
    first, again = format.encode_prompts(pairs), format.encode_prompts(pairs[1:])
    salted = format.encode_prompts(pairs, salt=b"another key")
    assert salted[1].document is not first[1].document and salted[0].prefix is not first[0].prefix
    assert [len(texts) for texts in asked] == [2, 0, 2]
    for one, other in zip(first[1:], again, strict=True):
        np.testing.assert_array_equal(one.document, other.document)
    np.testing.assert_array_equal(first[0].document, tiny_format.encode_prompts(pairs)[0].document)
