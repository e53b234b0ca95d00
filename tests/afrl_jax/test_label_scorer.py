"""Label log-probs do not depend on what is computed with what: company, order, buckets, padding, kept prefixes."""

import dataclasses

import jax
import numpy as np
import pytest

from afrl_jax import label_step
from afrl_jax.label_scorer import LabelScorer, padded
from afrl_jax.schema import Document, Query
from lm_jax.decoder import Decoder

# float32 sums in another order; 1e-6 observed
TOLERANCE = 1e-5


@pytest.fixture
def prompts(tiny_format, pairs):
    """Candidates of several queries, of lengths from a few to many tokens, those of a query apart from each other."""
    random = np.random.default_rng(0)
    words = "chess openings kids robots sourdough home clip query".split()
    queries = [Query(f"q{i}", " ".join(random.choice(words, i + 1))) for i in range(4)]
    made = [(query, Document("", " ".join(random.choice(words, random.integers(1, 14))))) for query in queries * 9]
    return tiny_format.encode_prompts(pairs + made)


@pytest.fixture
def make(tiny_model, tiny_format):
    """A function: options -> a new scorer of the tiny model."""
    model = tiny_model("qwen3")

    def scorer(**options):
        fixed = {"head": tiny_format.head_tokens}
        return LabelScorer(model.parameters, model.config, tiny_format.label_ids, **fixed | options)

    return scorer


def one_row_each(scorer, prompts, label_ids):
    """The definition: a whole prompt in a row of its own, the head read in full, float64 at the end."""
    lengths = np.array([len(prompt.tokens) for prompt in prompts])
    tokens_BT = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt.tokens)] = prompt.tokens
    positions_BT = np.broadcast_to(np.arange(lengths.max()), tokens_BT.shape)
    decoder = Decoder(scorer.config, scorer.parameters)
    hidden_BTD = decoder(tokens_BT, positions_BT, (positions_BT < lengths[:, None]).astype(np.int32))
    last_BD = np.asarray(hidden_BTD, np.float64)[np.arange(len(prompts)), lengths - 1]
    logits_BC = last_BD @ np.asarray(decoder.output_embedding, np.float64)[list(label_ids)].T
    return logits_BC - np.log(np.exp(logits_BC).sum(1, keepdims=True))


def test_it_is_what_one_prompt_alone_gives(make, prompts, tiny_format):
    scorer = make()
    assert len(tiny_format.head_tokens) > 10  # or nothing would be shared by all
    expected = one_row_each(scorer, prompts, tiny_format.label_ids)
    assert np.ptp(expected, axis=0).max() > 0.1
    np.testing.assert_allclose(scorer.label_logprobs(prompts), expected, atol=TOLERANCE, rtol=0)
    order = np.random.default_rng(1).permutation(len(prompts))
    shuffled = scorer.label_logprobs([prompts[i] for i in order])
    np.testing.assert_allclose(shuffled, expected[order], atol=TOLERANCE, rtol=0)
    for index in (2, 17):
        np.testing.assert_allclose(scorer.label_logprobs([prompts[index]])[0], expected[index], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("options", [{"batch_tokens": 128}, {"cache_bytes": 0}, {"head": None}], ids=str)
def test_budgets_change_no_score(make, prompts, options):
    scorer = make(**options)
    assert scorer.kept.capacity == options.get("cache_bytes", 2**28)
    found = scorer.label_logprobs(prompts)
    np.testing.assert_allclose(found, make().label_logprobs(prompts), atol=TOLERANCE, rtol=0)
    assert scorer.kept.bytes <= scorer.kept.capacity


def test_prefixes_are_computed_once_and_kept(make, prompts, tiny_format):
    scorer = make()
    scorer.label_logprobs(prompts)
    computed, queries = scorer.counts.computed, {prompt.prefix.tobytes(): prompt.prefix for prompt in prompts}
    head = len(tiny_format.head_tokens)
    documents = sum(len(prompt.document) for prompt in prompts)
    rest = sum(len(prefix) - head for prefix in queries.values())
    assert computed == head + rest + documents and len(scorer.kept) == len(queries)
    assert scorer.counts.tokens == sum(len(prompt.tokens) for prompt in prompts)
    scorer.label_logprobs(prompts)
    assert scorer.counts.computed == computed + documents


def test_the_least_recently_used_prefix_makes_room(make, prompts):
    scorer = make()
    size = scorer._bytes(padded(max(len(prompt.prefix) for prompt in prompts)))
    scorer = make(cache_bytes=3 * size)
    expected = make().label_logprobs(prompts)
    for start in range(0, len(prompts), 14):
        found = scorer.label_logprobs(prompts[start : start + 14])
        np.testing.assert_allclose(found, expected[start : start + 14], atol=TOLERANCE, rtol=0)
        assert scorer.kept.bytes <= 3 * size
    assert scorer.kept.evictions > 0


def test_a_kept_prefix_serves_its_own_salt_alone(make, prompts):
    scorer = make()
    ours = prompts[:2]  # of one query
    first = scorer.label_logprobs(ours, salts=[b"a", b"b"])
    assert len(scorer.kept) == 2 and (scorer.kept.hits, scorer.kept.misses) == (0, 2)
    np.testing.assert_allclose(scorer.label_logprobs(ours, salts=[b"a", b"a"]), first, atol=TOLERANCE, rtol=0)
    assert (scorer.kept.hits, scorer.kept.misses) == (1, 2)
    scorer.label_logprobs(ours, salts=[b"c", b"c"])
    assert (scorer.kept.hits, scorer.kept.misses) == (1, 3)


def test_what_prefill_gives_is_the_grade_and_the_whole_prompt(make, prompts, tiny_format):
    scorer = make()
    some = prompts[:4]
    logprobs, wholes = scorer.prefill(some)
    np.testing.assert_allclose(logprobs, scorer.label_logprobs(some), atol=TOLERANCE, rtol=0)
    assert [whole.length for whole in wholes] == [len(prompt.tokens) for prompt in some]
    assert len({whole.size for whole in wholes}) == 1
    longest = max(range(4), key=lambda i: wholes[i].length)
    _, cache = Decoder(scorer.config, scorer.parameters).prefill(
        some[longest].tokens[None], np.array([wholes[longest].length]), 1, 1
    )
    block, length = wholes[longest].block, wholes[longest].length
    np.testing.assert_allclose(block.keys[:, :length], cache.prompt_keys[:, 0], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(block.values[:, :length], cache.prompt_values[:, 0], atol=1e-5, rtol=1e-4)


def test_nothing_is_compiled_after_warming_up(make, prompts, tiny_format):
    scorer = make(batch_tokens=64)
    # As `read_weights` places them, which jit tells from arrays that are placed nowhere.
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    scorer.parameters, scorer._labels = jax.device_put((scorer.parameters, scorer._labels), place)
    prompts = [prompt for prompt in prompts if len(prompt.document) <= 32]
    longest = max(len(prompt.document) for prompt in prompts)
    query = max(len(prompt.prefix) for prompt in prompts) - len(tiny_format.head_tokens)
    scorer.warm_up(document_tokens=longest, query_tokens=query)
    sizes = {whole.size for whole in scorer.warm_up_prefill(document_tokens=longest, query_tokens=query)}
    before, computed = scorer.compilations, scorer.counts.computed
    steps = (label_step.score_suffixes, label_step.prefill_suffixes)
    compiled = [step._cache_size() for step in steps]
    assert computed == len(tiny_format.head_tokens)
    random = np.random.default_rng(3)
    for count in (1, 3, 8, len(prompts)):
        scorer.label_logprobs([prompts[i] for i in random.permutation(len(prompts))[:count]])
    for prompt in prompts[::9]:
        assert {whole.size for whole in scorer.prefill([prompt])[1]} <= sizes
    assert scorer.compilations == before
    assert [step._cache_size() for step in steps] == compiled


def test_the_document_is_read_in_its_bucket_to_the_last_token(make, prompts, tiny_format):
    """One token more or less, over an edge between buckets, never meets padding or a neighbour."""
    scorer, base = make(), prompts[0]
    longer = [dataclasses.replace(base, document=np.resize(base.document, length)) for length in (31, 32, 33)]
    expected = one_row_each(scorer, longer, tiny_format.label_ids)
    np.testing.assert_allclose(scorer.label_logprobs(longer), expected, atol=TOLERANCE, rtol=0)
