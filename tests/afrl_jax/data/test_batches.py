import collections
import dataclasses
import itertools

import numpy as np
import pytest

from afrl_jax.answer_format import AnswerFormat, plain_texts
from afrl_jax.data import clips
from afrl_jax.data.batches import (
    SFT_VALUES,
    balanced_weights,
    from_step,
    judgment_groups,
    row_batches,
    sft_row_shape,
    text_groups,
)
from afrl_jax.schema import DomainText
from lm_jax.rows import RowShape
from lm_jax.tokenizer import train_tokenizer

INSTRUCTION = clips.instruction()
JUDGMENTS = list(clips.judgments(0, "train", 12, 6))
TEXTS = [DomainText((f"text number {number} is", " about robots and chess" * (1 + number % 4))) for number in range(10)]


@pytest.fixture(scope="module")
def format() -> AnswerFormat:
    texts = [text for judgment in JUDGMENTS for text in plain_texts(judgment, INSTRUCTION, show_rules=False)]
    return AnswerFormat(train_tokenizer(texts + [text.text for text in TEXTS], 500), INSTRUCTION, show_rules=False)


def epoch(dataset, rows: int, batches: int) -> list[dict[str, np.ndarray]]:
    """The rows of the first `batches` batches, without the padding rows' axis."""
    return [{name: x[i] for name, x in dataset[step].items()} for step in range(batches) for i in range(rows)]


def answers_in(row: dict[str, np.ndarray]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(all tokens a label slot's answer can see, its targets) of each branch of a row."""
    found = []
    for group, branch in sorted({(g, b) for g, b in zip(row["groups"], row["branches"], strict=True) if g and b}):
        mine = (row["groups"] == group) & ((row["branches"] == 0) | (row["branches"] == branch))
        at = np.flatnonzero((row["groups"] == group) & (row["branches"] == branch))
        targets = row["target"][(row["segment"] >= 0) & np.isin(row["at"], at)]
        np.testing.assert_array_equal(row["positions"][mine], np.arange(mine.sum()))
        found.append((tuple(row["tokens"][mine].tolist()), tuple(targets.tolist())))
    return found


def test_an_epoch_holds_every_judgment_once_and_loses_no_token(format):
    groups = judgment_groups(format, JUDGMENTS)
    assert len(groups) == len({judgment.query.text for judgment in JUDGMENTS})
    shape = sft_row_shape(groups, 256, 4)
    dataset = row_batches([(groups, 1.0)], shape, rows=1, branches_together=3, seed=5)
    expected = collections.Counter()
    for judgment in JUDGMENTS:
        (prompt,) = format.encode_prompts([(judgment.query, judgment.document)])
        answer, _ = format.encode_answer(judgment)
        targets = [*answer.tolist(), *format.encode_evidence(judgment, prompt.document)[1].tolist()]
        expected[tuple(prompt.tokens.tolist() + answer[:-1].tolist()), tuple(targets)] += 1
    for start in (0, 1):
        found, step, rows = collections.Counter(), 0, 0
        while sum(found.values()) < (start + 1) * len(JUDGMENTS):
            found.update(answers_in({name: x[0] for name, x in dataset[step].items()}))
            step, rows = step + 1, rows + 1
        assert found == collections.Counter({key: (start + 1) * count for key, count in expected.items()})
    first = [dataset[i]["tokens"].tobytes() for i in range(rows // 2)]
    second = [dataset[i]["tokens"].tobytes() for i in range(rows // 2, rows)]
    assert sorted(first) == sorted(second)
    assert first != second  # another order in every epoch


def test_at_and_label_at_point_to_what_predicts_the_answer(format):
    judgments = JUDGMENTS[:6]
    groups = judgment_groups(format, judgments, weights=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    dataset = row_batches([(groups, 1.0)], sft_row_shape(groups, 512, 4), rows=1, branches_together=2, seed=0)
    seen = []
    for step in itertools.takewhile(lambda _: len(seen) < 6, itertools.count()):
        row = {name: x[0] for name, x in dataset[step].items()}
        for slot in np.flatnonzero(row["label_unit"]):
            place, weight = row["label_at"][slot], row["label_unit"][slot]
            judgment = judgments[int(weight) - 1]
            target = np.flatnonzero((row["at"] == place) & (row["segment"] == 0))
            assert len(target) == 1
            assert row["target"][target[0]] == format.label_ids[judgment.grade]
            assert row["label_weight"][target[0]] == weight
            np.testing.assert_array_equal(row["label_gold"][slot], np.eye(4)[judgment.grade])
            here = (row["groups"] == row["groups"][place]) & (row["branches"] == row["branches"][place])
            (prompt,) = format.encode_prompts([(judgment.query, judgment.document)])
            np.testing.assert_array_equal(row["tokens"][here][: len(prompt.document)], prompt.document)
            mine = np.isin(row["at"], np.flatnonzero(here)) & (row["segment"] > 0)
            np.testing.assert_array_equal(row["explanation_weight"][mine], weight)
            np.testing.assert_array_equal(row["label_weight"][mine], 0.0)
            seen.append(weight)
        padding = row["segment"] < 0
        assert not row["label_weight"][padding].any() and not row["explanation_weight"][padding].any()
    assert sorted(seen) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_judgment_without_explanation_trains_its_label_alone(format):
    bare = [dataclasses.replace(judgment, explanation=None, rules=(), evidence={}) for judgment in JUDGMENTS]
    groups = judgment_groups(format, bare)
    shape = sft_row_shape(groups, 256, 4)
    assert shape.targets < 64
    batch = row_batches([(groups, 1.0)], shape, rows=4, branches_together=8, seed=0)[0]
    trained = batch["segment"] >= 0
    assert set(batch["target"][trained]) <= set(format.label_ids)
    assert not batch["explanation_weight"].any()
    assert (batch["label_unit"] > 0).sum() == trained.sum()


def test_any_step_is_the_same_however_it_is_reached(format):
    sources = [(judgment_groups(format, JUDGMENTS), 0.75), (text_groups(format.tokenizer, TEXTS, 256), 0.25)]
    shape = sft_row_shape([group for groups, _ in sources for group in groups], 256, 4)

    def dataset(seed=1):
        return row_batches(sources, shape, rows=3, branches_together=2, seed=seed)

    straight = list(itertools.islice(from_step(dataset(), 0), 12))
    resumed = list(itertools.islice(from_step(dataset(), 7), 5))
    for number, batch in enumerate(straight):
        for name, x in dataset()[number].items():
            np.testing.assert_array_equal(batch[name], x)
            if number >= 7:
                np.testing.assert_array_equal(resumed[number - 7][name], x)
    assert not np.array_equal(dataset(2)[0]["tokens"], straight[0]["tokens"])


@pytest.mark.parametrize("rows", [2, 4])
def test_the_pieces_of_two_processes_are_the_batch(format, rows):
    groups = judgment_groups(format, JUDGMENTS)
    shape = sft_row_shape(groups, 256, 4)
    make = lambda share: row_batches([(groups, 1.0)], shape, rows=rows, branches_together=2, seed=0, share=share)
    for step, batch in enumerate(itertools.islice(from_step(make((0, 1)), 5), 3), start=5):
        pieces = [next(iter(from_step(make((index, 2)), step))) for index in range(2)]
        assert all(len(piece["tokens"]) == rows // 2 for piece in pieces)
        for name, x in batch.items():
            np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), x)
    with pytest.raises(ValueError, match=f"{rows} rows a batch cannot be dealt to 3 processes evenly"):
        make((0, 3))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_mixture_takes_rows_by_share(format, share):
    sources = [(judgment_groups(format, JUDGMENTS), 1 - share), (text_groups(format.tokenizer, TEXTS, 256), share)]
    shape = sft_row_shape([group for groups, _ in sources for group in groups], 256, 4)
    rows = epoch(row_batches(sources, shape, rows=8, branches_together=2, seed=0), 8, 10)
    assert np.mean([not row["label_unit"].any() for row in rows]) == pytest.approx(share, abs=0.02)


def test_learned_pieces_are_predicted_and_long_texts_go_on_in_another_row(format):
    texts = [DomainText(("robots", " and chess", "; chess", " and robots")), DomainText(("", "chess and robots " * 30))]
    pieces = [[format.tokenizer.encode(piece) for piece in text.pieces] for text in texts]
    encoded = [[*itertools.chain(*some), format.tokenizer.eos] for some in pieces]
    groups = text_groups(format.tokenizer, texts, 20)
    branches = [branch for group in groups for branch in group.branches]
    assert all(len(branch.inputs) == len(branch.targets) <= 20 for branch in branches)
    assert [token for branch in branches for token in branch.targets.tolist()] == encoded[0][1:] + encoded[1][1:]
    assert [token for branch in branches[1:] for token in branch.inputs.tolist()] == encoded[1][:-1]
    weight = branches[0].token_values["explanation_weight"]
    given, learned, given_again, learned_again = map(len, pieces[0])
    expected = [0] * (given - 1) + [1] * learned + [0] * given_again + [1] * (learned_again + 1)
    assert weight.tolist() == expected
    assert all(branch.token_values["explanation_weight"].all() for branch in branches[1:])
    shape = sft_row_shape(groups, 20, 4)
    assert shape.targets == 20
    batch = row_batches([(groups, 1.0)], shape, rows=len(groups), branches_together=1, seed=0)[0]
    assert batch["explanation_weight"].sum() == sum(expected) + len(encoded[1]) - 1
    assert not batch["label_unit"].any()


def test_asides_are_predicted_where_they_stand_and_never_read(format):
    encode = format.tokenizer.encode
    text = DomainText(("robots", " chess", " and chess", " robots", " met", " robots"), asides=True)
    (group,) = text_groups(format.tokenizer, [text], 20)
    (branch,) = group.branches
    first, second, third = (encode(text.pieces[i]) for i in (0, 2, 4))
    answer = encode(" robots")
    assert branch.inputs.tolist() == [*first, *second, *third, *answer]
    ends = [len(first) - 1, len(first) + len(second) - 1]
    last = len(branch.inputs) - len(answer) - 1
    assert branch.places.tolist() == [*range(last, len(branch.inputs)), *ends]
    assert branch.targets.tolist() == [*answer, format.tokenizer.eos, encode(" chess")[0], encode(" robots")[0]]
    # the answer's first token is the grade; what follows it, the end of text too, is the reason
    assert branch.token_values["explanation_weight"].tolist() == [1.0] + [0.25] * len(answer) + [1.0, 1.0]


def test_a_pair_asks_the_end_of_each_field_for_its_verdict(format):
    judgment = JUDGMENTS[0]
    (group,) = judgment_groups(format, [judgment])
    (branch,) = group.branches
    answer, segments = format.encode_answer(judgment)
    places, words = branch.places[len(answer) :], branch.targets[len(answer) :]
    texts = [format.tokenizer.decode(branch.inputs[: place + 1]) for place in places]
    fields = judgment.document.fields
    assert [text.split("\n")[-1] for text in texts] == [f"{name}: {value}" for name, value in fields.items()]
    said = [" free" if found is None else f" {found}" for found in judgment.evidence.values()]
    assert words.tolist() == [format.tokenizer.encode(word)[0] for word in said]
    np.testing.assert_array_equal(branch.targets[: len(answer)], answer)
    document = len(branch.inputs) - len(answer) + 1
    np.testing.assert_array_equal(branch.places[: len(answer)], np.arange(document - 1, len(branch.inputs)))
    assert branch.token_values["label_weight"].sum() == 1 and branch.token_values["label_weight"][0] == 1
    short = AnswerFormat(format.tokenizer, format.instruction, max_document_tokens=places[2] + 3, show_rules=False)
    (group,) = judgment_groups(short, [judgment])  # the third field is whole, the fourth is cut
    assert group.branches[0].places[len(answer) :].tolist() == places[:3].tolist()


@pytest.mark.parametrize("row_tokens", [256, 400])
def test_rows_have_room_for_all_that_their_tokens_may_train(format, row_tokens):
    """No row is closed early for want of targets or label slots: packing is the same with room to spare."""
    groups = judgment_groups(format, JUDGMENTS)
    shape = sft_row_shape(groups, row_tokens, 4)
    roomy = RowShape(row_tokens, row_tokens, row_tokens, SFT_VALUES, shape.label_values)
    for seed in range(3):
        tight, wide = (
            row_batches([(groups, 1.0)], each, rows=4, branches_together=4, seed=seed)[0] for each in (shape, roomy)
        )
        np.testing.assert_array_equal(tight["tokens"], wide["tokens"])


def test_a_text_or_pair_longer_than_a_row_is_named(format):
    groups = judgment_groups(format, JUDGMENTS)
    with pytest.raises(ValueError, match=r"group \d+ needs a row of \d+ tokens, \d+ targets and 1 label slots"):
        row_batches([(groups, 1.0)], sft_row_shape(groups, 16, 4), rows=1, branches_together=1, seed=0)


def test_balance_weighs_grades_by_their_frequency():
    judgments = [
        dataclasses.replace(JUDGMENTS[0], grade=grade, weight=weight)
        for grade, weight in [(0, 1.0)] * 8 + [(1, 1.0)] * 2 + [(3, 0.5)] * 2
    ]
    np.testing.assert_allclose(balanced_weights(judgments, 4, 0.0), np.array([1.0] * 10 + [0.5] * 2) * 12 / 11)
    even = balanced_weights(judgments, 4, 1.0)
    assert even.mean() == pytest.approx(1.0)
    assert even[:8].sum() == pytest.approx(even[8:10].sum())
    assert even[10:].sum() == pytest.approx(even[8:10].sum() / 2)
    root = balanced_weights(judgments, 4, 0.5)
    assert root[8] / root[0] == pytest.approx(2.0)
