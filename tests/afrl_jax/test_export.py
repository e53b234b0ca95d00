import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import scipy.special
import sentence_transformers
import torch
import transformers
from safetensors.numpy import load_file, save_file

from afrl_jax import export, model_card, relevance_file
from afrl_jax.decision import Decision
from afrl_jax.export import CLASSIFIER, export_model, transformers_probabilities, weights_digest
from afrl_jax.schema import Document, Query
from afrl_jax.scoring import ANSWER_TOKENS, RelevanceModel

FAMILIES = ("qwen3", "qwen3_untied", "qwen2", "qwen2_untied", "llama", "llama_untied")
FIGURES = {
    "accuracy": 0.6123,
    "accuracy/low": 0.5011,
    "accuracy/high": 0.7034,
    "ndcg_exp@10": 0.8456,
    "rule_recall/7": 0.25,
    "ece": float("nan"),
}
# A label probability in float32, sums taken in another order; 1e-6 observed, 1e-4 promised.
TOLERANCE = 1e-4


def export_to(folder, model, pairs, **changes):
    arguments = {
        "calibration": model.calibration,
        "decision": model.decision,
        "golden": pairs,
        "figures": FIGURES,
        "config": {"seed": 3, "stages": ("sft", "rl")},
        "title": "A tiny model",
    }
    return export_model(folder, model.parameters, model.config, model.format, **(arguments | changes))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_model):
    """(folder, facts, model) by family, each exported once."""
    made = {}

    def of(family, pairs):
        if family not in made:
            folder, model = tmp_path_factory.mktemp(family) / "export", tiny_model(family)
            made[family] = folder, export_to(folder, model, pairs), model
        return made[family]

    return of


@pytest.fixture
def tampered(exported, pairs, tmp_path):
    """A copy of an export to be spoilt."""
    folder = tmp_path / "export"
    shutil.copytree(exported("qwen3", pairs)[0], folder)
    return folder


def plain_label_probabilities(folder, prompt_ids, label_ids):
    """From scratch: next-token softmax of the causal model over the label tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return np.stack([model(torch.tensor([ids])).logits[0, -1, label_ids].softmax(-1).numpy() for ids in prompt_ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_both_forms_and_agrees_with_us(exported, pairs, family):
    folder, facts, model = exported(family, pairs)
    ours = np.exp(model.label_logprobs(pairs))
    prompts = [torch.tensor(prompt.tokens[None]) for prompt in model.format.encode_prompts(pairs)]
    for form, auto in {
        ".": transformers.AutoModelForCausalLM,
        CLASSIFIER: transformers.AutoModelForSequenceClassification,
    }.items():
        theirs, loading = auto.from_pretrained(folder / form, dtype=torch.float32, output_loading_info=True)
        kind = "ForCausalLM" if form == "." else "ForSequenceClassification"
        assert type(theirs).__name__ == {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[family[:5]] + kind
        assert not any(loading.values()), loading
        with torch.no_grad():
            logits = [theirs(prompt).logits[0] for prompt in prompts]
        rows = [row[-1, list(model.format.label_ids)] if form == "." else row for row in logits]
        probabilities = torch.stack(rows).softmax(-1).numpy()
        np.testing.assert_allclose(probabilities, ours, atol=TOLERANCE, rtol=0)
    assert np.ptp(ours, axis=0).max() > 0.01  # the pairs do differ
    assert 0 <= facts["difference/causal"] < TOLERANCE and 0 <= facts[f"difference/{CLASSIFIER}"] < TOLERANCE
    assert json.loads(json.dumps(facts)) == facts


def test_classifier_scores_padded_batches_and_names_the_grades(exported, pairs):
    folder, _, model = exported("llama", pairs)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder / CLASSIFIER)
    assert classifier.config.id2label == {0: "1", 1: "2", 2: "3"} and classifier.config.num_labels == 3
    prompts = [prompt.tokens.tolist() for prompt in model.format.encode_prompts(pairs)]
    longest = max(map(len, prompts))
    pad = classifier.config.pad_token_id
    tokens = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in prompts])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in prompts])
    with torch.no_grad():
        probabilities = classifier(tokens, attention_mask=mask).logits.softmax(-1).numpy()
    np.testing.assert_allclose(probabilities, np.exp(model.label_logprobs(pairs)), atol=TOLERANCE, rtol=0)


def test_a_cross_encoder_scores_as_we_do_where_the_tokenizer_has_a_chat_template(
    tiny_model, pairs, tmp_path, monkeypatch
):
    model = tiny_model("llama")
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    monkeypatch.setitem(model.format.tokenizer._settings, "chat_template", template)
    export_to(tmp_path / "export", model, pairs)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == template
    encoder = sentence_transformers.CrossEncoder(str(tmp_path / "export" / CLASSIFIER), device="cpu")
    decode = model.format.tokenizer.decode
    texts = [(decode(p.prefix), decode(p.document)) for p in model.format.encode_prompts(pairs)]  # documents are cut
    found = encoder.predict(texts, apply_softmax=True)
    np.testing.assert_allclose(found, np.exp(model.label_logprobs(pairs)), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("form", [".", CLASSIFIER])
def test_the_exported_tokenizer_is_ours(exported, pairs, form):
    for family in ("qwen3", "qwen2", "llama"):
        folder, _, model = exported(family, pairs)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / form)
        for text in ("\nDocument: Chess  openings 24\n", "ログ", "\nGrade: 3", "Ａ ﬁne é"):
            assert tokenizer(text, add_special_tokens=False).input_ids == model.format.tokenizer.encode(text)


def test_a_loaded_export_gives_the_same_scores(exported, pairs):
    folder, facts, model = exported("qwen2", pairs)
    loaded = RelevanceModel.load(folder)
    np.testing.assert_array_equal(loaded.predict_proba(pairs), model.predict_proba(pairs))
    assert (loaded.calibration, loaded.decision) == (model.calibration, model.decision)
    assert loaded.format.instruction == model.format.instruction
    assert loaded.format.max_document_tokens == 40
    assert loaded.version == facts["weights_digest"] == weights_digest(folder)


def test_the_model_card_holds_the_figures_and_its_code_runs(exported, pairs, monkeypatch, capsys):
    folder, facts, model = exported("qwen3", pairs)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| accuracy | 0.612 | 0.501 to 0.703 |" in card and "| ndcg_exp@10 | 0.846 |  |" in card
    assert "| ece" not in card and "rule_recall/7" not in card  # undefined (NaN); one rule of many
    assert "# A tiny model" in card and "| `3` | good |" in card and facts["weights_digest"] in card
    assert re.match(r"---\nlibrary_name: transformers\npipeline_tag: text-ranking\nlicense: ", card)
    monkeypatch.chdir(folder)
    ours, plain = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(ours, {})
    spoken = re.search(r"\[([\d.]+)\]", capsys.readouterr().out)
    asked = ("chess for kids", "Chess openings, explained to children")
    assert float(spoken[1]) == pytest.approx(model.predict(asked), abs=1e-6)
    scope = {}
    exec(plain, scope)
    for query, document in (asked, ("robots\n at  home", "Robots, " * 40)):
        expected = model.predict_proba([(query, document)])[0]
        np.testing.assert_allclose(scope["grade_probabilities"](query, document), expected, atol=TOLERANCE, rtol=0)


def test_the_code_of_the_readme_runs(exported, pairs, tmp_path, monkeypatch):
    folder, _, model = exported("llama", pairs)
    readme = (pathlib.Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## The exported model in other programs")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "export").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = {module.__name__: module for module in (json, pathlib, sentence_transformers, torch, transformers)}
    with torch.no_grad():
        exec(code, names)
    asked = ("chess for kids", "Chess openings")
    ours = np.exp(model.label_logprobs([(Query("", asked[0]), Document("", asked[1]))]))
    for found in (names["logits"].softmax(-1)[None], names["probabilities"], names["of_pairs"]):
        np.testing.assert_allclose(found, ours, atol=TOLERANCE, rtol=0)
    assert {row["label"] for row in names["grades"]} == set(model.format.labels)
    assert len(model.format.tokenizer.encode(names["answer"])) > 20  # of random weights: any words


def test_transformers_stops_where_we_do_and_not_after_20_tokens(exported, pairs):
    folder, _, model = exported("llama", pairs)
    config = transformers.GenerationConfig.from_pretrained(folder)
    assert config.max_new_tokens == ANSWER_TOKENS
    assert config.eos_token_id == model.format.tokenizer.eos


def test_relevance_json_says_how_the_model_came_to_be(exported, pairs):
    folder, _, model = exported("qwen3", pairs)
    description = json.loads((folder / "relevance.json").read_text(encoding="utf-8"))
    assert description["figures"] == {name: value for name, value in FIGURES.items() if name != "ece"}
    assert description["library_versions"]["jax"] == jax.__version__
    assert re.fullmatch("[0-9a-f]{64}", description["config_digest"])
    assert description["label_token_ids"] == list(model.format.label_ids)
    assert len(description["golden"]) == len(pairs)


def test_config_digest_depends_on_values_not_on_the_order_of_keys(tiny_model, tmp_path):
    digests = []
    for number, config in enumerate(({"a": 1, "b": (2,)}, {"b": [2], "a": 1}, {"a": 1, "b": [3]})):
        export_to(tmp_path / str(number), tiny_model("qwen2"), [], config=config)
        digests.append(json.loads((tmp_path / str(number) / "relevance.json").read_text())["config_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_a_spoilt_weight_is_refused(tampered):
    tensors = load_file(tampered / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] * np.float32(1.2)
    save_file(tensors, tampered / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        relevance_file.GoldenMismatch, match=r"golden pair \d \(query .* weights, tokenizer or template"
    ):
        RelevanceModel.load(tampered)
    RelevanceModel.load(tampered, check=False)


def test_other_weights_are_refused_though_they_score_alike(tampered):
    tensors = load_file(tampered / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] * np.float32(1 + 1e-6)
    save_file(tensors, tampered / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(relevance_file.GoldenMismatch, match="weights_digest is "):
        RelevanceModel.load(tampered)


def test_weights_that_are_not_finite_are_refused(tampered):
    tensors = load_file(tampered / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, tampered / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(relevance_file.GoldenMismatch):
        RelevanceModel.load(tampered)


def test_a_killed_export_is_never_seen_half(tiny_model, pairs, tmp_path, monkeypatch):
    folder, model = tmp_path / "export", tiny_model("qwen2")
    with monkeypatch.context() as patched:
        patched.setattr(export.model_card, "render", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_to(folder, model, pairs)
    assert not folder.exists()
    export_to(folder, model, pairs)
    (folder / "from an older export").touch()
    export_to(folder, model, pairs, title="Once more")
    assert not (folder / "from an older export").exists()
    assert "# Once more" in (folder / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_without_torch_the_comparison_is_skipped_and_said(tiny_model, pairs, tmp_path, monkeypatch, capsys):
    find_spec = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    facts = export_to(tmp_path / "export", tiny_model("qwen2"), pairs)
    assert facts["compared_with_transformers"] is False and not any("difference" in name for name in facts)
    assert "torch is not installed" in capsys.readouterr().err


def test_transformers_probabilities_are_a_plain_softmax_over_the_label_tokens(exported, pairs):
    folder, _, model = exported("qwen3_untied", pairs)
    found = transformers_probabilities(folder, model.format, pairs)
    prompts = [prompt.tokens.tolist() for prompt in model.format.encode_prompts(pairs)]
    expected = plain_label_probabilities(folder, prompts, list(model.format.label_ids))
    np.testing.assert_allclose(found["causal"], expected, atol=1e-6)
    calibrated = scipy.special.softmax(np.log(expected) / 0.8 + np.array([0.3, 0, -0.2]), axis=-1)
    np.testing.assert_allclose(model.predict_proba(pairs), calibrated, atol=TOLERANCE)


@pytest.mark.parametrize("made", [Decision(), Decision(threshold=0.37), Decision(divisor=(0.2, 1.0, 0.5))])
def test_the_card_decides_as_we_do(made):
    for row in np.random.default_rng(0).dirichlet(np.ones(3), 50):
        told = {"torch": torch, "probabilities": torch.tensor(row), "relevance": {"decision": dataclasses.asdict(made)}}
        assert int(eval(model_card._in_torch(made), told)) == made(row)
