"""The model card: what an exported model is, how good it was measured to be, and how to ask it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from afrl_jax.answer_format import AnswerFormat
from afrl_jax.decision import Decision
from lm_jax.config import ARCHITECTURES, DecoderConfig


def render(title: str, config: DecoderConfig, format: AnswerFormat, description: Mapping[str, Any]) -> str:
    """README.md of a model folder.

    Args:
        description: the folder's relevance.json; its `figures` and their intervals make the table.
    """
    scale, calibration = format.instruction.scale, description["calibration"]
    meanings = scale.meanings or ("",) * len(scale)
    rules = len(format.instruction.rules)
    bias = ", ".join(f"{value:.3f}" for value in calibration["bias"])
    decision = Decision.from_json(json.dumps(description["decision"]))
    return CARD.format(
        title=title,
        architecture=ARCHITECTURES[config.family],
        parameters=f"{config.parameter_count:,}",
        task=format.instruction.task,
        scale="\n".join(f"| `{label}` | {meaning} |" for label, meaning in zip(scale.labels, meanings, strict=True)),
        rules=f"{rules} numbered rules, " + ("which the prompt lists" if format.show_rules else "learned in training")
        if rules
        else "none",
        figures=_figures(description["figures"]),
        temperature=f"{calibration['temperature']:.3f}",
        bias=bias,
        decided=decision,
        decided_in_torch=_in_torch(decision),
        document_tokens=format.max_document_tokens,
        weights_digest=description["weights_digest"],
        config_digest=description["config_digest"],
        versions=", ".join(f"{name} {version}" for name, version in description["library_versions"].items()),
        golden=len(description["golden"]),
    )


def _in_torch(decision: Decision) -> str:
    """The decision as an expression of `probabilities`, a tensor with one entry a grade."""
    if decision.divisor is not None:
        return '(probabilities / torch.tensor(relevance["decision"]["divisor"])).argmax()'
    if decision.threshold is not None:
        return '(probabilities.flip(0).cumsum(0)[:-1] >= relevance["decision"]["threshold"]).sum()'
    return "probabilities.argmax()"


def _figures(figures: Mapping[str, float]) -> str:
    """Rows of the table; a metric's interval stands under "metric/low" and "metric/high". Single rules are left out."""
    if not figures:
        return "No figures were measured."
    rows = ["| metric | value | 95% interval |", "|---|---|---|"]
    for name, value in figures.items():
        last = name.rpartition("/")[2]
        if last in ("low", "high") or last.isdigit():
            continue
        low, high = figures.get(f"{name}/low"), figures.get(f"{name}/high")
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        rows.append(f"| {name} | {value:.3f} | {interval} |")
    return "\n".join(rows)


CARD = """---
library_name: transformers
pipeline_tag: text-ranking
license: other
license_name: unspecified
tags:
- relevance
- cross-encoder
- reranker
- answer-first
---

# {title}

An answer-first relevance model: given a query and a document, its first output token is the relevance grade, and an
explanation follows when it is asked for. A score costs one prefill. {architecture}, {parameters} parameters.

Task: {task}

| grade | meaning |
|---|---|
{scale}

Rulebook: {rules}.

## Use

```python
from afrl_jax.scoring import RelevanceModel
model = RelevanceModel.load(".")
print(model.predict([("chess for kids", "Chess openings, explained to children")]))  # expected grade, in [0, 1]
```

With transformers alone, run in this folder. A prompt is three parts, each tokenized by itself; `relevance.json` has
them.

```python
import json, pathlib, torch, transformers
relevance = json.loads(pathlib.Path("relevance.json").read_text(encoding="utf-8"))
tokenizer = transformers.AutoTokenizer.from_pretrained("sequence_classifier")
classifier = transformers.AutoModelForSequenceClassification.from_pretrained("sequence_classifier")

def tokens(text):
    return tokenizer(text, add_special_tokens=False).input_ids

def grade_probabilities(query, document):
    template = relevance["template"]
    shown = tokens(template["document"] + document)[: relevance["max_document_tokens"]]
    prompt = tokens(relevance["prompt_head"] + " ".join(query.split())) + shown + tokens(template["slot"])
    with torch.no_grad():
        logits = classifier(torch.tensor([prompt])).logits[0].log_softmax(-1)
    calibration = relevance["calibration"]
    return (logits / calibration["temperature"] + torch.tensor(calibration["bias"])).softmax(-1)

def decide(probabilities):  # the grade, as an index on the scale
    return int({decided_in_torch})

print(probabilities := grade_probabilities("chess for kids", "Chess openings, explained to children"))
print(decide(probabilities))
```

`AutoModelForCausalLM.from_pretrained(".")` gives the same probabilities, over the tokens `label_token_ids`, and goes on
to the explanation. A document is its title, its text and its further fields as `name: value`, a line each, runs of
white space made one blank.

## Measured

On judged pairs kept out of training; calibration and decision fitted on other queries. Intervals: bootstrap over
queries.

{figures}

The probabilities served are softmax(log p / {temperature} + bias), bias [{bias}]. The grade decided is {decided}.

## Intended use

Grading and ranking the candidates of a search engine whose queries, documents and guidelines are like those it was
trained on; as a signal among others, with people looking at what it decides.

## Limits

- Scores are calibrated for the judged data above. On other data, calibrate again before reading them as probabilities.
- Documents are cut to {document_tokens} tokens; what comes later is not seen.
- The grade is decided before the explanation is written. The explanation is generated text: it can be wrong about the
  document even where the grade is right.
- It carries over the mistakes and preferences of the people who judged, and of the weights it started from.
- Licence: that of the weights and data it was trained from, which this folder does not know. Declare it before
  publishing.

## Provenance

`relevance.json` records {golden} golden pairs with their scores; loading with afrl_jax scores them again and refuses on
a mismatch. Weights sha256 `{weights_digest}`, training config sha256 `{config_digest}`. Made with {versions}.
"""
