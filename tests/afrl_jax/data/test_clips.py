import collections
import itertools
import re
import types

import numpy as np
import pytest

from afrl_jax.answer_format import parse_answer
from afrl_jax.data import clips, clips_contrasts
from afrl_jax.data.clips_catalogue import CATEGORY_OF_TOPIC
from afrl_jax.data.clips_queries import (
    MAXIMUM_WORDS,
    SPLITS,
    TYPOS,
    combination_held_out,
    phrases,
    split_of_intent,
    values,
)
from afrl_jax.data.clips_reading import read_document, read_query
from afrl_jax.data.clips_rules import ATTRIBUTES, RULES, Constraint

PAIRS = 8000


@pytest.fixture(scope="module")
def natural():
    return list(clips.judgments(0, "train", PAIRS // 4, 4))


@pytest.fixture(scope="module")
def unseen():
    return list(clips.judgments(0, "test", PAIRS // 8, 4))


def shares(items) -> dict:
    counts = collections.Counter(items)
    return {item: count / counts.total() for item, count in counts.items()}


def test_the_texts_alone_decide_every_pair(natural, unseen):
    for judgment in itertools.chain(natural, unseen):
        decision = clips.judge(read_query(judgment.query.text), read_document(judgment.document))
        assert (decision.grade, decision.rule) == (judgment.grade, judgment.explanation.rule), judgment
        assert decision.agreeing == judgment.rules
        assert (decision.facts, decision.verdicts) == (judgment.explanation.facts, judgment.explanation.verdicts)


def test_no_phrase_means_two_things():
    meanings = collections.defaultdict(set)
    for name in ATTRIBUTES:
        for value in values(name):
            for _, words in phrases(Constraint(name, value)):
                meanings[words].add((name, value))
    assert [words for words, constraints in meanings.items() if len(constraints) > 1] == []
    every_word = {word for words in meanings for word in words.split()}
    assert len(set(TYPOS.values())) == len(TYPOS)
    assert not every_word & set(TYPOS.values())
    assert every_word >= set(TYPOS)


def test_titles_say_nothing_that_the_fields_do_not(natural):
    for judgment in natural:
        fields = judgment.document.fields
        for kind in values("kind"):
            assert kind not in judgment.document.title.split() or fields["kind"] == kind
        for topic in values("topic"):
            assert topic not in judgment.document.title.split() or fields["topic"].startswith(topic)


def test_same_arguments_give_the_same_judgments_and_any_group_can_be_made_alone():
    run = list(clips.judgments(7, "dev", 6, 3, rule_balance=0.5))
    assert run == list(clips.judgments(7, "dev", 6, 3, rule_balance=0.5))
    assert clips.query_group(7, "dev", 4, 3, rule_balance=0.5) == run[12:15]
    assert clips.query_group(7, "dev", 4, 5, rule_balance=0.5)[:3] == run[12:15]
    assert run != list(clips.judgments(8, "dev", 6, 3, rule_balance=0.5))
    assert len({judgment.document.doc_id for judgment in run}) == len(run)
    assert [judgment.query.query_id for judgment in run] == [f"dev-7-{index}" for index in range(6) for _ in range(3)]


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="split is 'valid'; it is one of train, dev, test"):
        clips.query_group(0, "valid", 0, 1)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]; got 1.0 and 2"):
        clips.query_group(0, "dev", 0, 1, rule_balance=2)


def test_splits_share_no_intent_and_no_query_text():
    intents, texts = {}, {}
    for split in SPLITS:
        cases = [clips.query_case(seed, split, index, 0) for seed in (0, 1) for index in range(600)]
        assert all(split_of_intent(intent) == split for intent, _, _ in cases)
        intents[split] = {frozenset(intent.constraints) for intent, _, _ in cases}
        texts[split] = {text for _, text, _ in cases}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not intents[one] & intents[other]
        assert not texts[one] & texts[other]


def test_held_out_combinations_never_occur_in_training_and_do_in_dev_and_test():
    for rule_balance in (0.0, 1.0):
        training = clips.judgments(3, "train", 800, 4, rule_balance=rule_balance)
        assert not any(clips.is_held_out(judgment) for judgment in training)
        contrasts = clips_contrasts.judgments(3, "train", 400, 4, rule_balance=rule_balance)
        assert not any(clips.is_held_out(judgment) for judgment in contrasts)
        for split in ("dev", "test"):
            unseen = clips.judgments(3, split, 400, 4, rule_balance=rule_balance)
            assert 0.01 < np.mean([clips.is_held_out(judgment) for judgment in unseen]) < 0.15


def test_rule_frequencies_are_zipf_like(natural):
    share = shares(judgment.explanation.rule for judgment in natural)
    assert set(share) == {rule.number for rule in RULES}
    ordered = sorted(share.values(), reverse=True)
    assert 0.15 <= ordered[0] <= 0.25
    assert sum(value < 0.01 for value in ordered) >= 8
    assert sum(ordered[:3]) > 0.35  # a few rules decide much,
    # and log share falls about linearly with log rank (slope -1 is Zipf's law).
    slope = np.polyfit(np.log(np.arange(1, 31)), np.log(ordered[:30]), 1)[0]
    assert -1.5 < slope < -0.7


def test_every_grade_is_frequent(natural, unseen):
    for judged in (natural, unseen):
        share = shares(judgment.grade for judgment in judged)
        assert set(share) == {0, 1, 2, 3} and min(share.values()) >= 0.12


def test_rule_balance_evens_out_the_rules(natural):
    natural_share = shares(judgment.explanation.rule for judgment in natural)
    even = shares(judgment.explanation.rule for judgment in clips.judgments(0, "train", 1500, 4, rule_balance=1.0))
    assert set(even) == set(natural_share)
    assert min(even.values()) > 0.01 and max(even.values()) < 0.06
    tail = sorted(natural_share, key=natural_share.get)[:10]
    assert sum(even[rule] for rule in tail) > 3 * sum(natural_share[rule] for rule in tail)


def test_difficulty_zero_is_plain():
    plain = [clips.query_case(0, "train", index, 2, difficulty=0.0) for index in range(300)]
    assert max(len(intent.constraints) for intent, _, _ in plain) == 3  # a series, its season, its episode
    assert not any(word in TYPOS.values() for _, text, _ in plain for word in text.split())
    natural = [clips.query_case(0, "train", index, 2) for index in range(300)]
    sizes = [sum(len(intent.constraints) for intent, _, _ in cases) for cases in (plain, natural)]
    assert sizes[1] > 1.3 * sizes[0]


def test_explanations_agree_with_grade_and_rulebook(natural):
    rules = {rule.number: rule for rule in clips.instruction().rules}
    for judgment in natural:
        explanation = judgment.explanation
        assert judgment.rules[0] == explanation.rule
        assert all(rules[number].grades == (judgment.grade,) for number in judgment.rules)
        assert 1 <= len(explanation.need) <= 4
        assert all(1 <= len(phrase.split()) <= 3 for phrase in (*explanation.need, *explanation.facts))
        for need, fact, verdict in zip(explanation.need, explanation.facts, explanation.verdicts, strict=True):
            assert (fact == "not stated") == (verdict == "unknown")
            if need.startswith("language "):
                stated = judgment.document.fields.get("language", "not stated")
                assert fact == stated
                assert (verdict == "met") == (need == f"language {stated}")
        if judgment.grade == 3:
            assert set(explanation.verdicts) == {"met"}


def test_texts_are_compact_and_the_vocabulary_is_closed(natural):
    vocabulary = set()
    for judgment in natural:
        query, document, explanation = judgment.query.text, judgment.document, judgment.explanation
        card = " ".join((document.title, *(f"{name} {value}" for name, value in document.fields.items())))
        assert len(query.split()) <= MAXIMUM_WORDS
        assert len(card.split()) <= 45
        vocabulary.update(re.findall(r"\w+", " ".join((query, card, *explanation.need, *explanation.facts))))
    assert 400 < len(vocabulary) < 900
    for text in clips.domain_texts(0, "train", 300):
        vocabulary.update(re.findall(r"\w+", text.text))
    assert len(vocabulary) < 900


def test_instruction_is_short():
    instruction = clips.instruction()
    assert len(instruction.task.split()) <= 20
    assert instruction.scale.labels == ("0", "1", "2", "3")


def test_domain_texts_are_small_prompts_that_the_judge_would_grade_so():
    drawn = list(clips.domain_texts(0, "train", 400))
    assert drawn == list(clips.domain_texts(0, "train", 400)) and drawn[:50] == list(clips.domain_texts(0, "train", 50))
    assert drawn != list(clips.domain_texts(1, "train", 400))
    verdicts, unasked, graded, explained = collections.Counter(), collections.Counter(), 0, 0
    for text in drawn:
        assert text.asides
        shown = "".join((*text.pieces[:-1:2], text.pieces[-1]))
        query, card, grade, reason = re.fullmatch(
            r"Query: (.*)\nDocument: ((?:.*\n)*?)Grade: (\d)(\nMatch: (?:.*\n)*.*)?", shown
        ).groups()
        fields = re.findall(r"^([a-z]+): (.*)$", card, re.MULTILINE)
        asides = [aside.strip() for aside in text.pieces[1:-1:2]]
        assert len(asides) == len(fields)
        assert all(
            given.endswith(f"{name}: {value}") for given, (name, value) in zip(text.pieces[::2], fields, strict=False)
        )
        unasked[asides.count("free")] += 1
        verdicts.update(asides)
        if reason:
            parsed = parse_answer(f"{grade}{reason}", "0123")
            assert parsed.verdict == parsed.label
            assert set(asides) - {"free"} <= set(parsed.explanation.verdicts)  # what is not stated has no field
            explained += 1
        if (topic := re.fullmatch(r"topic (\w+)", query)) and topic[1] in CATEGORY_OF_TOPIC:  # not misspelled
            meets = f"topic: {topic[1]}," in card
            assert asides[0] == ("met" if meets else "violated")
            if not meets:
                same = CATEGORY_OF_TOPIC[topic[1]] == dict(fields)["topic"].split(", ")[1]
                assert grade == ("1" if same else "0")
                graded += 1
    assert graded > 3 and set(unasked) == {0, 1, 2}
    assert verdicts["met"] > 250 and verdicts["violated"] > 250 and 90 < explained < 150


def test_domain_texts_of_training_tell_nothing_of_what_is_held_out():
    explained = 0
    for text in clips.domain_texts(0, "train", 2000):
        answer = parse_answer(text.pieces[-1], clips.instruction().scale.labels)
        if answer:
            need = answer.explanation.need
            explained += 1
            assert split_of_intent(types.SimpleNamespace(key="|".join(sorted(need)))) == "train"
            entities = [words.removeprefix("topic ").removeprefix("series ") for words in need]
            assert not any(combination_held_out(entity, answer.explanation.rule) for entity in entities)
    assert explained > 400


def test_no_domain_text_asks_for_an_episode_of_nothing():
    for text in clips.domain_texts(0, "train", 3000):
        answer = parse_answer(text.pieces[-1], clips.instruction().scale.labels)
        heads = {need.split(" ")[0] for need in answer.explanation.need} if answer else set()
        assert not {"season", "episode"} & heads or "series" in heads


def test_domain_texts_ask_for_no_more_than_their_size():
    for text in clips.domain_texts(0, "dev", 100, size=1):
        assert text.pieces[-1].count(";") == 0
    assert max(text.pieces[-1].count(";") for text in clips.domain_texts(0, "dev", 200)) == 3
    with pytest.raises(ValueError, match="size"):
        list(clips.domain_texts(0, "dev", 1, size=0))


def test_evidence_is_the_verdict_of_the_constraint_that_asks_for_the_field(natural):
    seen = collections.Counter()
    for judgment in natural[:2000]:
        assert list(judgment.evidence) == list(judgment.document.fields)
        for need, verdict in zip(judgment.explanation.need, judgment.explanation.verdicts, strict=True):
            attribute, _, value = need.partition(" ")
            if attribute in ("language", "level", "kind"):
                assert (verdict == "unknown") == (attribute not in judgment.evidence)
                assert judgment.evidence.get(attribute, verdict) in (verdict, "violated")
        seen.update(judgment.evidence.values())
    assert seen["met"] > 1000 and seen["violated"] > 1000 and seen[None] > 1000


def test_catalogue_grows_without_changing_its_beginning():
    assert clips.catalogue(3, 40)[:10] == clips.catalogue(3, 10)
    assert clips.catalogue(3, 10) != clips.catalogue(4, 10)


def test_an_easy_world_goes_on_without_the_rules_it_cannot_show():
    judged = list(clips.judgments(0, "train", 100, 4, difficulty=0.0, rule_balance=1.0))
    assert len(judged) == 400
    assert {rule.number for rule in clips.RULES} > {judgment.rules[0] for judgment in judged}
