"""Export: the trained model as a folder that transformers, PyTorch servers and `RelevanceModel` read.

    export/                        ...ForCausalLM: config.json, model.safetensors, tokenizer; answers grade first
    export/relevance.json          how to ask it: template, instruction, label tokens, calibration, golden pairs
    export/README.md               the model card
    export/sequence_classifier/    the same backbone as ...ForSequenceClassification, one output a grade

Both forms give the same distribution over the grades: the classifier's `score.weight` holds the head rows of the label
tokens.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afrl_jax import model_card, relevance_file
from afrl_jax.answer_format import AnswerFormat
from afrl_jax.calibration import Calibration
from afrl_jax.decision import Decision
from afrl_jax.schema import Document, Query
from afrl_jax.scoring import ANSWER_TOKENS, RelevanceModel
from lm_jax import run_log
from lm_jax.config import ARCHITECTURES, DecoderConfig, to_hugging_face
from lm_jax.parameters import Parameters
from lm_jax.run_folder import replace_folder
from lm_jax.weights import hugging_face_tensors, weights_digest, write_safetensors, write_weights

CLASSIFIER = "sequence_classifier"
SHARD_BYTES = 5 * 10**9
LIBRARIES = ("jax", "flax", "numpy", "tokenizers", "safetensors")


def export_model(
    folder: Path,
    parameters: Parameters,
    decoder_config: DecoderConfig,
    format: AnswerFormat,
    *,
    calibration: Calibration,
    decision: Decision,
    golden: Sequence[tuple[Query, Document]],
    figures: Mapping[str, float],
    config: Mapping[str, Any],
    title: str,
) -> dict[str, Any]:
    """Write a model folder, whole or not at all; one that is there is replaced. Every process of a mesh must call it.

    Args:
        calibration, decision: fitted on judgments other than those of `figures`.
        golden: pairs whose scores are recorded and checked at every load.
        figures: measured on held-out judgments; "metric", "metric/low" and "metric/high" of its 95% interval.
        config: the run's, JSON-able; its digest is recorded.
        title: heading of the model card.

    Returns:
        Facts for the run's log: parameters, bytes, weights_digest, and, where torch is installed, the largest
        difference between the golden pairs' label probabilities by transformers and ours, for each form.
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    writes = jax.process_index() == 0
    model = RelevanceModel(
        decoder_config, parameters, format, calibration=calibration, decision=decision, dtype="float32"
    )
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    _write_causal_model(partial, parameters, model)
    _write_classifier(partial / CLASSIFIER, parameters, model)
    description = relevance_file.describe(
        model,
        list(golden),
        figures={name: float(value) for name, value in figures.items() if np.isfinite(value)},
        weights_digest=weights_digest(partial) if writes else "",
        config_digest=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        library_versions={library: importlib.metadata.version(library) for library in LIBRARIES},
    )
    label_probabilities = np.exp(model.label_logprobs(golden))
    facts = {"parameters": decoder_config.parameter_count, "golden_pairs": len(golden)}
    if not writes:
        return facts
    _write_json(partial / relevance_file.NAME, description)
    card = model_card.render(title, decoder_config, format, description)
    (partial / "README.md").write_text(card, encoding="utf-8")
    facts["weights_digest"] = description["weights_digest"]
    facts["bytes"] = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    facts |= _differences(partial, format, golden, label_probabilities)
    replace_folder(folder, partial)
    return facts


def transformers_probabilities(
    folder: Path, format: AnswerFormat, pairs: Sequence[tuple[Query, Document]]
) -> dict[str, np.ndarray]:
    """Uncalibrated label probabilities, float32 [N, C], of both forms of an export, by transformers in float32.

    Raises:
        ImportError: torch is not installed.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # one for every file it loads, even where nobody watches
    prompts = [torch.tensor(prompt.tokens[None], dtype=torch.long) for prompt in format.encode_prompts(pairs)]
    causal = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    labels = list(format.label_ids)
    with torch.no_grad():
        of_causal = [causal(prompt, logits_to_keep=1).logits[0, -1, labels].softmax(-1).numpy() for prompt in prompts]
    del causal  # one of the two in memory at a time
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / CLASSIFIER, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        of_classifier = [classifier(prompt).logits[0].softmax(-1).numpy() for prompt in prompts]
    return {"causal": np.stack(of_causal), CLASSIFIER: np.stack(of_classifier)}


def _write_causal_model(folder: Path, parameters: Parameters, model: RelevanceModel) -> None:
    tokenizer = model.format.tokenizer
    stops = {**_special_tokens(model.format), "max_new_tokens": ANSWER_TOKENS}
    write_weights(folder, model.config, parameters, shard_bytes=SHARD_BYTES, **stops)
    if jax.process_index() == 0:
        tokenizer.save(folder)


def _write_classifier(folder: Path, parameters: Parameters, model: RelevanceModel) -> None:
    """The backbone with the head rows of the label tokens as its `score`."""
    config, labels = model.config, model.format.labels

    def tensors():
        for name, array in hugging_face_tensors(config, parameters):
            if name == ("model.embed_tokens.weight" if config.tied_head else "lm_head.weight"):
                yield "score.weight", array[jnp.array(model.format.label_ids)]
            if name != "lm_head.weight":
                yield name, array

    write_safetensors(folder, tensors(), shard_bytes=SHARD_BYTES)
    if jax.process_index() == 0:
        settings = {
            **to_hugging_face(config, **_special_tokens(model.format)),
            "architectures": [f"{ARCHITECTURES[config.family]}ForSequenceClassification"],
            "tie_word_embeddings": False,  # there is no head to tie
            "problem_type": "single_label_classification",
            "id2label": {str(grade): label for grade, label in enumerate(labels)},
            "label2id": {label: grade for grade, label in enumerate(labels)},
        }
        _write_json(folder / "config.json", settings)
        # sentence-transformers would put each pair into the template, where there is one.
        model.format.tokenizer.save(folder, chat_template=False)


def _special_tokens(format: AnswerFormat) -> dict[str, int | None]:
    return {name: getattr(format.tokenizer, name) for name in ("bos", "eos", "pad")}


def _differences(
    folder: Path, format: AnswerFormat, golden: Sequence[tuple[Query, Document]], ours: np.ndarray
) -> dict[str, Any]:
    """The parity figures of an export; without torch or golden pairs, a line that says so."""
    if not golden or importlib.util.find_spec("torch") is None:
        reason = "no golden pairs" if not golden else "torch is not installed"
        run_log.say(f"export: not compared with transformers, {reason}")
        return {"compared_with_transformers": False}
    theirs = transformers_probabilities(folder, format, golden)
    found = {f"difference/{form}": float(np.abs(p - ours).max()) for form, p in theirs.items()}
    told = ", ".join(f"{name.partition('/')[2]} {value:.1e}" for name, value in found.items())
    run_log.say(f"export: largest difference of a label probability to transformers over {len(golden)} pairs: {told}")
    return {"compared_with_transformers": True} | found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
