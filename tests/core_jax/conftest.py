"""A tiny relevance model of the world of clips, exported once a session, as the deployed model that rewards."""

import jax
import pytest

from afrl_jax.answer_format import AnswerFormat, plain_texts
from afrl_jax.calibration import Calibration
from afrl_jax.data import clips
from afrl_jax.decision import MOST_PROBABLE
from afrl_jax.export import export_model
from core_jax.rewrite_format import RewriteFormat
from core_jax.sessions import simulate
from lm_jax.config import DecoderConfig
from lm_jax.parameters import initialize
from lm_jax.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def clips_tokenizer():
    texts = [text for judgment in clips.judgments(0, "train", 20, 4) for text in plain_texts(
        judgment, clips.instruction(), show_rules=False)]  # fmt: skip
    format = RewriteFormat(train_tokenizer(texts, 400))
    texts += [
        text
        for each in simulate(0, "train", 0, 60)
        for text in format.plain_texts(each.session.context, each.next_query)
    ]
    return train_tokenizer(texts, 512)


def draw(shape: DecoderConfig, seed: int):
    drawn = initialize(shape, seed)
    keys = jax.random.split(jax.random.key(seed + 1), len(drawn))
    return {
        name: value if "norm" in name else value + 0.2 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, drawn.items(), strict=True)
    }


@pytest.fixture(scope="session")
def random_model():
    """A function (shape, seed) -> parameters large enough that every token moves what comes out."""
    return draw


@pytest.fixture(scope="session")
def tiny_shape(clips_tokenizer):
    return DecoderConfig("qwen3", 512, 32, 2, 2, 1, 16, 64, qk_norm=True)


@pytest.fixture(scope="session")
def relevance_folder(tmp_path_factory, clips_tokenizer, tiny_shape):
    folder = tmp_path_factory.mktemp("relevance") / "export"
    format = AnswerFormat(clips_tokenizer, clips.instruction(), max_document_tokens=64, show_rules=False)
    golden = [(judgment.query, judgment.document) for judgment in clips.judgments(0, "dev", 2, 2)]
    export_model(
        folder, draw(tiny_shape, 3), tiny_shape, format, calibration=Calibration.identity(4), decision=MOST_PROBABLE,
        golden=golden, figures={}, config={}, title="tiny",
    )  # fmt: skip
    return folder
