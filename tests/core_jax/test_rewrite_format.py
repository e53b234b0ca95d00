import numpy as np
import pytest

from afrl_jax.schema import Document
from core_jax.rewrite_format import RewriteFormat, Template
from core_jax.schema import Context
from lm_jax.tokenizer import Tokenizer

WATCHED = Document("d", "cycling  interview", "a text", {"language": "german", "level": ""})


@pytest.fixture(scope="module")
def format(clips_tokenizer):
    return RewriteFormat(clips_tokenizer, max_watched_tokens=1000)


def test_the_prompt_of_the_docstring(format):
    watched, bare = format.encode_prompts([Context("with\n chapters", WATCHED), Context("with chapters")])
    task = "Rewrite the search so that it says all that is wanted."
    tail = "\nQuery: with chapters\nRewrite:"
    shown = "\nWatched: cycling interview\na text\nlanguage: german"
    assert format.tokenizer.decode(watched) == task + shown + tail
    assert format.tokenizer.decode(bare) == task + tail
    assert watched.dtype == np.int32


def test_truncation_shortens_the_watched_document_alone(clips_tokenizer):
    format = RewriteFormat(clips_tokenizer, max_watched_tokens=3)
    context = Context("with chapters and subtitles", WATCHED)
    text = format.tokenizer.decode(format.encode_prompts([context])[0])
    head, rest = (part for part in format.texts(context))
    assert text.endswith(rest) and text.startswith(format.template.task)
    kept = text.removesuffix(rest)
    assert head.startswith(kept) and len(clips_tokenizer.encode(kept)) == len(clips_tokenizer.encode(
        format.template.task)) + 3  # fmt: skip


def test_a_rewrite_is_read_as_it_was_written(format):
    tokens = format.encode_rewrite("cycling  videos in german")
    assert tokens[-1] == format.tokenizer.eos
    read = format.read(tokens)
    assert (read.text, read.truncated, read.length) == ("cycling videos in german", False, len(tokens) - 1)
    assert format.length("cycling videos in german") == read.length
    cut = format.read(tokens[:-1])
    assert cut.truncated and cut.text == read.text and cut.length == read.length and not cut.usable
    empty = format.read(tokens[-1:])
    assert (empty.text, empty.length, empty.truncated, empty.usable) == ("", 0, False, False)
    padded = format.read(np.array([tokens[0], format.tokenizer.pad, *tokens[1:]]))
    assert padded.truncated and not padded.usable and format.tokenizer.pad != format.tokenizer.eos


def test_the_template_has_a_checksum():
    assert Template().checksum == Template().checksum != Template(slot="\nBetter:").checksum


def test_a_tokenizer_without_end_of_text_is_refused(clips_tokenizer):
    endless = Tokenizer(clips_tokenizer._tokenizer, {})
    with pytest.raises(ValueError, match="no end-of-text token"):
        RewriteFormat(endless)
