import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from core_jax.rewrite_format import RewriteFormat
from core_jax.rewriter import TOP, GoldenMismatch, Rewriter
from core_jax.schema import Context
from core_jax.sessions import simulate
from lm_jax.decoder import Decoder

ANSWER = 7


@pytest.fixture(scope="module")
def contexts():
    return [each.session.context for each in simulate(0, "dev", 0, 21)]


@pytest.fixture(scope="module")
def rewriter(clips_tokenizer, tiny_shape, random_model):
    format = RewriteFormat(clips_tokenizer, max_watched_tokens=24)
    return Rewriter(tiny_shape, random_model(tiny_shape, 5), format, max_new_tokens=ANSWER, rows=8)


@pytest.fixture(scope="module")
def folder(rewriter, contexts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewriter") / "export"
    rewriter.export(folder, contexts[:3], relevance_version="f00")
    return folder


def test_transformers_rewrites_the_same(folder, rewriter, contexts):
    """The exported folder in a program this project did not write, one context at a time, greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = rewriter.rewrite_tokens(contexts)
    for context, ours in zip(contexts[:6], found, strict=False):
        prompt = torch.tensor(rewriter.format.encode_prompts([context])[0][None].astype(np.int64))
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=ANSWER)
        assert made[0, prompt.shape[1] :].tolist() == ours.tolist()
    assert len({tuple(tokens) for tokens in found}) > 3  # the contexts matter


def test_a_long_query_changes_neither_the_room_nor_the_rewrites_of_others(rewriter, contexts, monkeypatch):
    alone, rooms = rewriter.rewrite_tokens(contexts), []
    sampler = Rewriter._sampler
    monkeypatch.setattr(Rewriter, "_sampler", lambda self, longest: rooms.append(longest) or sampler(self, longest))
    found = rewriter.rewrite_tokens([Context("chess " * 150), *contexts])
    assert [tokens.tolist() for tokens in found[1:]] == [tokens.tolist() for tokens in alone]
    assert len(rooms) == 3 and rooms[0] <= rooms[1] < 100 < rooms[2]
    rewriter_figures = rewriter.measure([Context("chess " * 150), *contexts], found)
    np.testing.assert_allclose(rewriter_figures.surprisal[1:], rewriter.measure(contexts, alone).surprisal, rtol=1e-5)


def test_the_folder_samples_as_training_assumes(folder):
    """By default transformers decodes greedily and, where it samples, keeps 50 tokens."""
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["do_sample"] and (settings["top_k"], settings["top_p"], settings["temperature"]) == (0, 1.0, 1.0)


def test_figures_of_tokens_are_those_of_a_plain_forward_pass(rewriter, contexts):
    prompts = rewriter.format.encode_prompts(contexts)
    rewrites = [np.arange(10, 11 + place % ANSWER, dtype=np.int32) for place in range(len(contexts))]
    found = rewriter.measure(contexts, rewrites)
    for place in (0, 6, 8, 20):
        whole = np.concatenate([prompts[place], rewrites[place]])[None]
        decoder = Decoder(rewriter.config, rewriter.parameters)
        hidden = decoder(whole, np.arange(whole.shape[1])[None], np.ones_like(whole))[0, len(prompts[place]) - 1 : -1]
        p = np.asarray(jax.nn.softmax(hidden @ decoder.output_embedding.T), np.float64)
        surprisal = -np.log(p[np.arange(len(p)), rewrites[place]]).mean()
        top = -np.sort(-p, axis=1)[:, :TOP]
        top /= top.sum(1, keepdims=True)
        assert found.surprisal[place] == pytest.approx(surprisal, rel=1e-4)
        assert found.entropy[place] == pytest.approx(-(top * np.log(top)).sum(1).mean(), rel=1e-4)


def test_a_loaded_rewriter_is_the_exported_one(folder, rewriter, contexts):
    loaded = Rewriter.load(folder)
    assert loaded.rewrite(contexts) == rewriter.rewrite(contexts)
    description = json.loads((folder / "rewriter.json").read_text())
    assert loaded.version == description["weights_digest"] and description["relevance_version"] == "f00"
    assert len(description["golden"]) == 3
    bfloat16 = Rewriter.load(folder, dtype="bfloat16")
    assert bfloat16.dtype == "bfloat16"


def test_other_weights_do_not_pass_the_golden_contexts(folder, rewriter, contexts):
    golden = json.loads((folder / "rewriter.json").read_text())["golden"]
    changed = rewriter.parameters | {"value": rewriter.parameters["value"] * 1.2}
    other = Rewriter(rewriter.config, changed, rewriter.format, max_new_tokens=ANSWER, rows=8)
    with pytest.raises(GoldenMismatch, match=r"golden context \d \(query '.*'\): its rewrite is off by"):
        other.check_golden(golden, folder)
    nan = Rewriter(
        rewriter.config, rewriter.parameters | {"final_norm": jnp.full(32, jnp.nan)}, rewriter.format,
        max_new_tokens=ANSWER, rows=8,
    )  # fmt: skip
    with pytest.raises(GoldenMismatch):
        nan.check_golden(golden, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2, this program reads 1"),
        ({"template_checksum": "0"}, "does not have its checksum"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(folder, tmp_path, change, message):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(folder / name)
    description = json.loads((folder / "rewriter.json").read_text())
    (tmp_path / "rewriter.json").write_text(json.dumps(description | change))
    with pytest.raises(ValueError, match=message):
        Rewriter.load(tmp_path)
    (tmp_path / "rewriter.json").unlink()
    with pytest.raises(ValueError, match="is no rewriter"):
        Rewriter.load(tmp_path)


def test_nothing_to_rewrite(rewriter):
    assert rewriter.rewrite([]) == [] and rewriter.measure([], []).surprisal.shape == (0,)
