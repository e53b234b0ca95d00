"""Judgments as a TFDS dataset: array_record shards with random access, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from afrl_jax.schema import Document, Explanation, Judgment, Match, Query, Scale


class RelevanceDataset(tfds.core.GeneratorBasedBuilder):
    """Builds one array_record split of each iterable of judgments; record i of a split is its i-th judgment.

    A split may also be a Beam transform to (key, `to_example` of a judgment): see `afrl_jax.data.logged_judgments`. Its
    records lie in the order of their keys' hashes, and `pipeline_result` is what Beam says of the run.

    Example:
        builder = RelevanceDataset(data_dir=..., file_format="array_record", scale=scale, splits={"train": judgments})
        builder.download_and_prepare()
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, scale: Scale, splits: Mapping[str, Any], **builder_arguments: Any):
        self._scale = scale
        self._splits = splits
        self.pipeline_result: Any = None
        super().__init__(**builder_arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            description="Graded judgments of documents for queries, with explanations where the data have them.",
            # The order of judgments that have one is kept; batches are drawn by random access.
            disable_shuffling=all(isinstance(split, Iterable) for split in self._splits.values()),
            features=tfds.features.FeaturesDict(
                {
                    "query": {"query_id": text, "text": text, "context": text},
                    "document": {
                        "doc_id": text,
                        "title": text,
                        "text": text,
                        "field_names": texts,
                        "field_values": texts,
                    },
                    "grade": tfds.features.ClassLabel(names=self._scale.labels),
                    "rules": tfds.features.Sequence(np.int64),
                    "weight": np.float32,
                    # lists of lists would need TensorFlow: no explanation is `explained` false and empty parts
                    "explained": np.bool_,
                    "explanation": {"need": texts, "facts": texts, "verdicts": texts, "rule": np.int64},
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {
            name: self._generate_examples(name) if isinstance(split, Iterable) else split
            for name, split in self._splits.items()
        }

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        index = None
        for index, judgment in enumerate(self._splits[split]):
            yield index, to_example(judgment)
        if index is None:
            raise ValueError(f"split {split!r} has no judgment")

    def _process_pipeline_result(self, pipeline_result: Any) -> None:
        self.pipeline_result = pipeline_result


@dataclasses.dataclass(frozen=True)
class JudgmentSource:
    """Random access to the judgments of one split: `len(source)`, `source[i]`; a data source for grain.

    Its repr names folder and split alone, so that a pipeline's saved state can be compared after a restart.
    """

    data_dir: str
    split: str
    labels: tuple[str, ...] = dataclasses.field(repr=False)  # of the scale it was written with
    _records: Any = dataclasses.field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Judgment:
        if not 0 <= index < len(self):
            raise IndexError(f"judgment {index} of {len(self)} in split {self.split!r}")
        return _to_judgment(self._records[index])


def write_dataset(data_dir: str | Path, splits: Mapping[str, Iterable[Judgment]], scale: Scale) -> None:
    """Writes the splits to `data_dir`, in place of what an earlier call wrote there.

    The dataset appears only when it is whole. Weights are kept in float32. One process writes.
    """
    builder = RelevanceDataset(data_dir=data_dir, file_format="array_record", scale=scale, splits=splits)
    overwrite = tfds.download.DownloadConfig(download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, and there is none
        builder.download_and_prepare(download_config=overwrite)


def open_judgments(data_dir: str | Path, split: str) -> JudgmentSource:
    """Opens a split that `write_dataset` wrote, for random access in the order in which it was given.

    Raises:
        FileNotFoundError: there is no dataset in `data_dir`.
        ValueError: the dataset has no such split.
    """
    folder = Path(data_dir) / RelevanceDataset.name / str(RelevanceDataset.VERSION)
    if not (folder / "dataset_info.json").is_file():
        raise FileNotFoundError(f"{folder}: no dataset; write_dataset makes one")
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise ValueError(f"{folder}: no split {split!r}; it has {', '.join(builder.info.splits)}")
    labels = tuple(builder.info.features["grade"].names)
    return JudgmentSource(str(data_dir), split, labels, builder.as_data_source(split=split))


def to_example(judgment: Judgment) -> dict[str, Any]:
    """A judgment as the dataset's features; a query with its own instruction is refused, it has no place there."""
    query = dataclasses.asdict(judgment.query)
    if query.pop("instruction") is not None:
        raise ValueError(f"query {judgment.query.query_id!r} has its own instruction, which a dataset does not keep")
    explanation = judgment.explanation or Explanation((), (), (), 0)
    document = dataclasses.asdict(judgment.document)
    fields = document.pop("fields")
    return {
        "query": query,
        "document": document | {"field_names": list(fields), "field_values": list(fields.values())},
        "grade": judgment.grade,
        "rules": judgment.rules,
        "weight": judgment.weight,
        "explained": judgment.explanation is not None,
        "explanation": dataclasses.asdict(explanation),
    }


def _to_judgment(example: Mapping[str, Any]) -> Judgment:
    query, document = example["query"], example["document"]
    explanation = None
    if example["explained"]:
        parts = example["explanation"]
        explanation = Explanation(
            need=_texts(parts["need"]),
            facts=_texts(parts["facts"]),
            verdicts=tuple(Match(verdict) for verdict in _texts(parts["verdicts"])),
            rule=int(parts["rule"]),
        )
    return Judgment(
        query=Query(**{name: value.decode() for name, value in query.items()}),
        document=Document(
            doc_id=document["doc_id"].decode(),
            title=document["title"].decode(),
            text=document["text"].decode(),
            fields=dict(zip(_texts(document["field_names"]), _texts(document["field_values"]), strict=True)),
        ),
        grade=int(example["grade"]),
        explanation=explanation,
        rules=tuple(int(rule) for rule in example["rules"]),
        weight=float(example["weight"]),
    )


def _texts(values: Iterable[bytes]) -> tuple[str, ...]:
    return tuple(value.decode() for value in values)
