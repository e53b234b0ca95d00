"""The table of tokens allows exactly what the parser reads, and explanations never leave it."""

import numpy as np
import pytest

from afrl_jax.answer_format import VERDICT_LINE, parse_answer, plain_texts, render_explanation
from afrl_jax.answer_grammar import RULE_DIGITS, START, automaton, explanation_table, token_table
from afrl_jax.data import clips
from afrl_jax.schema import Explanation, Match
from lm_jax.tokenizer import train_tokenizer

GOOD = Explanation(("topic chess", "over 10 minutes"), ("chess, games", "16 minutes"), (Match.MET, Match.UNKNOWN), 25)
PIECES = ("\n", " ", "|", ";", " | ", "; ", "\nMatch: ", "\nRule: ", "0", "7", "12", "met", "violated", "a b")


@pytest.fixture(scope="module")
def judged():
    return list(clips.judgments(3, "train", 40, 4))


def reads(text: str) -> bool:
    """Whether the automaton comes through a text."""
    states, state = automaton(), START
    for character in text:
        state = states[state].get(character, states[state].get("", -1))
        if state < 0:
            return False
    return state == len(states) - 1


def test_it_reads_what_the_parser_reads_and_no_more():
    """Texts made of the format's pieces at random, and gold ones with one piece put in or taken out."""
    random, gold = np.random.default_rng(0), render_explanation(GOOD, "")
    texts = [gold]
    for _ in range(4000):
        place, size, piece = random.integers(len(gold)), random.integers(4), random.choice(["", *PIECES])
        texts.append(gold[:place] + piece + gold[place + size :])
    texts += ["\nMatch: " + "".join(random.choice(PIECES, 5)) + "\nRule: 7" + VERDICT_LINE for _ in range(4000)]
    texts += [f"\nMatch: {''.join(random.choice(PIECES, 7))}\nRule: 7{VERDICT_LINE}" for _ in range(4000)]
    read = 0
    for text in texts:
        before, verdict, _ = text.partition(VERDICT_LINE)
        parsed = parse_answer(f"2{before}{verdict} 2", ("1", "2")) if verdict else None
        # A phrase that begins with a blank can be parsed and is never written.
        tidy = parsed and not any(phrase[0] == " " for phrase in (*parsed.explanation.need, *parsed.explanation.facts))
        short = parsed and len(str(parsed.explanation.rule)) <= RULE_DIGITS
        assert reads(before + verdict) == bool(tidy and short), repr(text)
        read += bool(tidy and short)
    assert 200 < read < len(texts) / 2


def test_every_token_of_a_gold_answer_may_come(judged):
    texts = [text for judgment in judged for text in plain_texts(judgment, clips.instruction(), show_rules=False)]
    tokenizer = train_tokenizer(texts, 700)
    table = np.asarray(explanation_table(tokenizer, 720))
    assert table.shape == (len(automaton()), 720) and (table[:, tokenizer.vocab_size :] == -1).all()
    assert (table[:, [tokenizer.eos, tokenizer.pad]] == -1).all()
    assert (table >= 0).any(axis=1).all()  # something may follow everywhere
    explained = [judgment for judgment in judged if judgment.explanation]
    assert len(explained) > 50
    for judgment in explained:
        state = START
        for token in tokenizer.encode(render_explanation(judgment.explanation, "2")):
            state = table[state, token]
            assert state >= 0
        assert state == len(table) - 1


def test_a_token_leads_where_its_characters_lead_one_by_one():
    states, texts = automaton(), ["\nMatch", ": ", "a", " | b", " |", "", "met", "met; x | ", "\nRule: 12", "é;"]
    table = token_table(states, texts)
    for start in range(len(states)):
        for token, text in enumerate(texts):
            state = start if text else -1
            for character in text:
                state = states[state].get(character, states[state].get("", -1)) if state >= 0 else -1
            assert table[start, token] == state


@pytest.mark.parametrize("family", ["qwen3", "llama_untied"])
def test_models_that_never_saw_the_format_keep_it(tiny_model, pairs, family):
    """Weights at random: an answer is a beginning of one that can be parsed, and is parsed where it is complete."""
    model = tiny_model(family)
    answers = model.answers(pairs, max_new_tokens=64)
    assert len(answers) == len(pairs)
    for answer in answers:
        label, text = answer[0], answer[1:]
        assert label in model.format.labels
        if VERDICT_LINE in text:
            assert parse_answer(answer, model.format.labels).verdict == model.format.labels.index(label)
        else:
            states, state = automaton(), START
            for character in text:
                state = states[state].get(character, states[state].get("", -1))
                assert state >= 0, answer
