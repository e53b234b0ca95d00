"""An exported folder in other programs: the same scores in transformers, sentence-transformers and ONNX Runtime.

  python -m benchmarks.exported_model_elsewhere                  SmolLM2-135M zero-shot (`make smollm2` fetches it)
  python -m benchmarks.exported_model_elsewhere --model=runs/quickstart/export

A model that is no export yet (any Hugging Face causal model, a .gguf file) is exported first, to a temporary folder.
The pairs are judged ones of the built-in world of clips. Compared are label probabilities before calibration:

  transformers                ...ForCausalLM, and ...ForSequenceClassification
                              and its text-classification pipeline
  sentence-transformers       CrossEncoder of the classifier
  ONNX Runtime                the classifier exported with torch.onnx, and its dynamically quantized int8 form

For the int8 form the loss is measured: how far probabilities move, how many grades change, and accuracy, macro F1 and
pair accuracy beside those of float32. --onnx=DIR keeps model.onnx and model.int8.onnx. Prints a table, and one line of
JSON last.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic
from sentence_transformers import CrossEncoder

from afrl_jax.answer_format import AnswerFormat, PromptTokens
from afrl_jax.calibration import Calibration
from afrl_jax.data import clips
from afrl_jax.decision import MOST_PROBABLE
from afrl_jax.evaluation import query_numbers
from afrl_jax.export import CLASSIFIER, export_model, transformers_probabilities
from afrl_jax.ranking_metrics import accuracy, confusion_matrix, expected_grade, macro_f1, pair_accuracy
from afrl_jax.schema import Document, Judgment, Query
from afrl_jax.scoring import RelevanceModel

REPOSITORY = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4  # of a probability, in float32: sums in another order; 6e-6 between transformers and us
BATCH = 8


def exported(source: Path, folder: Path) -> Path:
    """The folder of an export; a model that is none yet is exported into `folder`."""
    if (source / "relevance.json").exists():
        return source
    model = RelevanceModel.load(source)
    golden = [(judgment.query, judgment.document) for judgment in clips.judgments(0, "dev", 2, 2)]
    identity = Calibration.identity(len(model.format.labels))
    options = {"calibration": identity, "decision": MOST_PROBABLE, "figures": {}, "config": {}, "title": source.stem}
    export_model(folder, model.parameters, model.config, model.format, golden=golden, **options)
    return folder


def in_batches(score: Callable[[np.ndarray, np.ndarray], np.ndarray], prompts: Sequence[PromptTokens]) -> np.ndarray:
    """Softmax [N, C] of logits that `score` reads from right-padded (ids, mask), int64 [B, T]."""
    found = []
    for start in range(0, len(prompts), BATCH):
        rows = [prompt.tokens for prompt in prompts[start : start + BATCH]]
        ids, mask = np.zeros((2, len(rows), max(map(len, rows))), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        logits = score(ids, mask).astype(np.float64)
        found.append(np.exp(logits - logits.max(1, keepdims=True)))
    weights = np.concatenate(found)
    return weights / weights.sum(1, keepdims=True)


def text_probabilities(
    folder: Path, format: AnswerFormat, pairs: Sequence[tuple[Query, Document]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of programs that are given prompts as text; and, bool [N], which of these they read as the same tokens.

    They tokenize the document and the slot after it as one text. Where a document ends so that its last token and the
    slot's newline are one token together, the prompt is another, and so is its score.
    """
    texts = [
        (format.prefix_text(query), format.document_text(document) + format.template.slot) for query, document in pairs
    ]
    encoder = CrossEncoder(str(folder / CLASSIFIER), device="cpu", model_kwargs={"dtype": torch.float32})
    found = {"sentence-transformers CrossEncoder": encoder.predict(texts, apply_softmax=True)}
    classify = transformers.pipeline("text-classification", str(folder / CLASSIFIER), top_k=None, device="cpu")
    answers = [{row["label"]: row["score"] for row in rows} for rows in classify([a + b for a, b in texts])]
    found["transformers pipeline"] = np.array([[answer[label] for label in format.labels] for answer in answers])
    read = (
        [encoder.tokenizer(*text).input_ids for text in texts],
        [classify.tokenizer(a + b).input_ids for a, b in texts],
    )
    prompts = [prompt.tokens.tolist() for prompt in format.encode_prompts(pairs)]
    return found, np.array([a == b == prompt for a, b, prompt in zip(*read, prompts, strict=True)])


class LastTokenLogits(torch.nn.Module):
    """The classifier's logits at each row's last token, without the data-dependent code around it."""

    def __init__(self, classifier: transformers.PreTrainedModel):
        super().__init__()
        self.backbone, self.score = classifier.model, classifier.score

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, T] and [B, T], right-padded -> logits [B, C]."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        last = (attention_mask.sum(1) - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self.score(hidden.gather(1, last)[:, 0])


def export_onnx(folder: Path, path: Path) -> None:
    """Write the classifier of an export as ONNX: input_ids, attention_mask int64 [B, T] -> logits float32 [B, C]."""
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / CLASSIFIER, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids, mask = torch.ones(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    batch, length = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("length", min=2, max=8192)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about its own insides
        torch.onnx.export(
            LastTokenLogits(classifier),
            (ids, mask),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}),
            dynamo=True,
            verbose=False,
        )
    # The exporter's notes of shapes in between, which are those before its own last changes, stop the quantizer.
    graph = onnx.load(path, load_external_data=False)
    graph.graph.ClearField("value_info")
    onnx.save(graph, path)


def onnx_probabilities(path: Path, prompts: Sequence[PromptTokens]) -> tuple[np.ndarray, float]:
    """Of an ONNX file on the CPU; and seconds a pair."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def score(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]

    in_batches(score, prompts[:BATCH])
    start = time.perf_counter()
    found = in_batches(score, prompts)
    return found, (time.perf_counter() - start) / len(prompts)


def quality(model: RelevanceModel, probabilities: np.ndarray, judgments: Sequence[Judgment]) -> dict[str, float]:
    """Figures of calibrated probabilities on judged pairs, and the grades they decide."""
    calibrated = model.calibration.apply(np.log(np.maximum(probabilities, 1e-30)))
    gold = np.array([judgment.grade for judgment in judgments])
    confusion = confusion_matrix(gold, model.decision(calibrated), calibrated.shape[1])
    return {
        "accuracy": float(accuracy(confusion)),
        "macro_f1": float(macro_f1(confusion)),
        "pair_accuracy": pair_accuracy(query_numbers(judgments), gold, expected_grade(calibrated)),
    }


def folder_bytes(path: Path) -> int:
    """Bytes of an ONNX file and of the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


def main() -> None:
    """Export where needed, score everywhere, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "weights" / "smollm2-135m-instruct-q4_1.gguf")
    parser.add_argument("--onnx", type=Path, help="a folder to keep the ONNX files in")
    parser.add_argument("--queries", type=int, default=100, help="of 8 pairs each")
    parser.add_argument("--quick", action="store_true", help="5 queries")
    args = parser.parse_args()
    if not args.model.exists():
        parser.error(f"{args.model} is absent: `make smollm2` fetches it, or name another --model")
    logging.disable(logging.WARNING)  # of libraries about their own insides
    transformers.utils.logging.disable_progress_bar()
    queries = 5 if args.quick else args.queries
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = exported(args.model, work / "export")
        figures = compare(folder, list(clips.judgments(0, "test", queries, 8)), args.onnx or work / "onnx")
    print(json.dumps({"benchmark": "exported_model_elsewhere", "model": args.model.name, **figures}))
    if not figures["equal"]:
        raise SystemExit("failed: a float32 form does not give the same probabilities")


def compare(folder: Path, judgments: Sequence[Judgment], kept: Path) -> dict[str, float]:
    """The figures; ONNX files are written to the folder `kept`."""
    model = RelevanceModel.load(folder)
    format, pairs = model.format, [(judgment.query, judgment.document) for judgment in judgments]
    if len(format.labels) != len(clips.instruction().scale):
        raise SystemExit(f"clips have {len(clips.instruction().scale)} grades, this model {len(format.labels)}")
    prompts = format.encode_prompts(pairs)
    ours = np.exp(model.label_logprobs(pairs))
    few = pairs[:40]  # one pair at a time there
    differences = {
        f"transformers {form}": np.abs(found - ours[: len(few)]).max()
        for form, found in transformers_probabilities(folder, format, few).items()
    }
    of_texts, same = text_probabilities(folder, format, pairs)
    differences |= {name: np.abs(found - ours)[same].max() for name, found in of_texts.items()}
    kept.mkdir(parents=True, exist_ok=True)
    float32, int8 = kept / "model.onnx", kept / "model.int8.onnx"
    export_onnx(folder, float32)
    quantize_dynamic(float32, int8, weight_type=QuantType.QInt8, per_channel=True)
    exact, seconds = onnx_probabilities(float32, prompts)
    rounded, rounded_seconds = onnx_probabilities(int8, prompts)
    differences["ONNX Runtime float32"] = np.abs(exact - ours).max()
    print(f"largest difference of a label probability to ours, float32, {len(pairs)} pairs")
    for name, value in differences.items():
        print(f"  {name:36} {value:.1e}")
    print(
        f"  {same.mean():.1%} of the prompts are the same tokens where they are given as text; only these are compared"
    )
    before, after = quality(model, exact, judgments), quality(model, rounded, judgments)
    moved = np.abs(rounded - exact)
    changed = (rounded.argmax(1) != exact.argmax(1)).mean()
    print(f"int8: probabilities move by {moved.mean():.4f} on average, {moved.max():.3f} at most; {changed:.1%} of the")
    print(f"  most probable grades change; {folder_bytes(int8) / folder_bytes(float32):.2f} of the bytes,")
    print(f"  {seconds / rounded_seconds:.2f} times the speed of float32 in ONNX Runtime")
    for name in before:
        print(f"  {name:16} float32 {before[name]:.3f}   int8 {after[name]:.3f}")
    return {
        "pairs": len(pairs),
        "equal": bool(max(differences.values()) < TOLERANCE),
        **{f"difference/{name}": float(value) for name, value in differences.items()},
        "same_tokens_as_text": float(same.mean()),
        "int8/mean_difference": float(moved.mean()),
        "int8/max_difference": float(moved.max()),
        "int8/changed_grades": float(changed),
        "int8/bytes_ratio": folder_bytes(int8) / folder_bytes(float32),
        "int8/speed_ratio": seconds / rounded_seconds,
        **{f"float32/{name}": value for name, value in before.items()},
        **{f"int8/{name}": value for name, value in after.items()},
    }


if __name__ == "__main__":
    main()
