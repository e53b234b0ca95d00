"""Logged judgments, however many, become a dataset of sharded array_record files, by Apache Beam.

  python -m afrl_jax.data.logged_judgments --input='logs/*.jsonl.gz' --labels=0,1,2,3 --output=data/logged

A row of the logs is whole in itself:

  {"query_id": "q1", "query": "chess for kids", "doc_id": "d7", "title": "Chess openings", "grade": 2}

It may also have `context`, `text`, `weight`, `rules` and `explanation`, as in a judgments folder; or `document`, an
object {title, text, further fields}, instead of `title` and `text`. Files are .jsonl, .jsonl.gz, .parquet or .csv; one
worker reads one file. A row that is no judgment is counted, and lies with its reason in OUTPUT/refused. What was in
OUTPUT before is replaced, other splits too: each split has an OUTPUT of its own. A config reads the result as
{"format": "dataset", "path": "data/logged", "split": "train"}.

Apache Beam is no part of requirements.txt: `pip install apache-beam==2.77.0`. Any further argument is one of Beam's, so
that the same command runs on a cluster, whose workers need this project installed:

  ... --input='gs://logs/*.parquet' --output=gs://data/logged --runner=DataflowRunner --project=P --region=R \\
      --temp_location=gs://T --sdk_container_image=IMAGE
  ... --runner=FlinkRunner --flink_master=HOST:8081            ... --runner=SparkRunner --spark_master_url=spark://HOST:7077
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.io import fileio
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from afrl_jax.command_line import told_plainly
from afrl_jax.data.grade_mapping import GradeMapping
from afrl_jax.data.readers import BadRow, parse_judged_pairs
from afrl_jax.data.relevance_dataset_builder import RelevanceDataset, to_example
from afrl_jax.schema import Scale

REFUSED = "refused"


class LoggedJudgments(beam.PTransform):
    """All rows of the files that match `pattern`, as (key, example); the refused ones go to files under `refused`."""

    def __init__(self, pattern: str, scale: Scale, refused: str):
        super().__init__()
        self.pattern, self.scale, self.refused = pattern, scale, refused

    def expand(self, pipeline: Any) -> Any:
        rows = (
            pipeline
            | fileio.MatchFiles(self.pattern, fileio.EmptyMatchTreatment.DISALLOW)
            | fileio.ReadMatches(compression=beam.io.filesystem.CompressionTypes.UNCOMPRESSED)
            | beam.Reshuffle()  # else one worker would read what one worker matched
            | beam.ParDo(_ReadFile(self.scale)).with_outputs(REFUSED, main="kept")
        )
        _ = rows[REFUSED] | beam.io.WriteToText(self.refused, file_name_suffix=".jsonl")
        return rows.kept


class _ReadFile(beam.DoFn):
    def __init__(self, scale: Scale):
        self.scale = scale

    def setup(self) -> None:
        self.grade_mapping = GradeMapping(self.scale)
        self.refused = beam.metrics.Metrics.counter("judgments", REFUSED)

    def process(self, file: fileio.ReadableFile) -> Iterator[Any]:
        path = file.metadata.path
        with file.open() as stream:
            for number, row in enumerate(parse_judged_pairs(path, stream, self.grade_mapping)):
                if isinstance(row, BadRow):
                    self.refused.inc()
                    told = {"reason": row.reason, "row": row.values}
                    yield beam.pvalue.TaggedOutput(REFUSED, json.dumps(told, default=str))
                else:
                    yield f"{path}:{number}", to_example(row)


def write_logged(
    data_dir: str, split: str, pattern: str, scale: Scale, flags: Sequence[str] = (), shards: int | None = None
) -> tuple[int, int]:
    """Write the judgments of all files that match `pattern` as a split of the dataset in `data_dir`, in place of what
    was there.

    Args:
        flags: Beam's own, such as --runner=FlinkRunner.
        shards: how many files; where None, as many as TFDS finds fit.

    Returns:
        How many rows were kept and how many refused.
    """
    stale = [file.path for file in FileSystems.match([f"{data_dir}/{REFUSED}/*"])[0].metadata_list]
    if stale:
        FileSystems.delete(stale)
    rows = LoggedJudgments(pattern, scale, f"{data_dir}/{REFUSED}/{split}")
    builder = RelevanceDataset(data_dir=data_dir, file_format="array_record", scale=scale, splits={split: rows})
    config = tfds.download.DownloadConfig(
        download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS, beam_options=PipelineOptions(list(flags)),
        num_shards=shards,
    )  # fmt: skip
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, and there is none
        builder.download_and_prepare(download_config=config)
    found = {each.key.metric.name: each.committed for each in builder.pipeline_result.metrics().query()["counters"]}
    return builder.info.splits[split].num_examples, found.get(REFUSED, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read arguments; those not ours are Beam's."""
    parser = argparse.ArgumentParser(
        prog="python -m afrl_jax.data.logged_judgments", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--input", required=True, help="a pattern of file names, on any file system that Beam knows")
    parser.add_argument("--labels", required=True, help="the scale, least relevant first, as grades are written: 0,1,2")
    parser.add_argument("--output", required=True, help="the folder of the dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--shards", type=int, help="how many files; TFDS decides where it is not said")
    args, flags = parser.parse_known_args(arguments)
    with told_plainly(parser):
        scale = Scale(tuple(label.strip() for label in args.labels.split(",")))
        kept, refused = write_logged(args.output, args.split, args.input, scale, flags, args.shards)
    print(f"{kept:,} judgments kept, {refused:,} rows refused: {args.output}")


if __name__ == "__main__":
    main()
