"""The folder of one run: its config, the stages that are finished and what each left. Running again continues here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_jax.checkpoint import load_tree, save_tree
from sharding.distributed import on_primary

DIGESTS = "data.json"  # in the run folder: data set -> digest
# Keys of a config that say how the work is laid out, not what is computed: a run that goes on with others is the same
# to rounding.
LAYOUT = ("mesh", "micro_batches", "remat")


class ConfigChanged(ValueError):
    """The workdir belongs to a run with another config."""


class RunFolder:
    """`workdir`/config.json, checkpoints/<stage>/ while a stage runs, stages/<stage>/ once it is finished.

    Raises:
        ConfigChanged: the folder was started with a config that differs; names every differing key with both values.
        ValueError, NotADirectoryError: as `refuse_other_config` says.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        refuse_other_config(workdir, config)
        self.path = workdir

        def begin() -> None:
            workdir.mkdir(parents=True, exist_ok=True)
            if not (workdir / "config.json").exists():
                write_atomically(workdir / "config.json", json.dumps(config, indent=2) + "\n")
            for left in (workdir / "checkpoints").glob("*"):  # a kill came between the mark and their removal
                if (workdir / "stages" / left.name / "done.json").exists():
                    shutil.rmtree(left)

        on_primary("run folder", begin)

    def keep_digests(self, digests: Mapping[str, str]) -> None:
        """What `refuse_other_data` compares the next start's with. One process calls it."""
        write_atomically(self.path / DIGESTS, json.dumps(digests, indent=2) + "\n")

    def checkpoints(self, stage: str) -> Path:
        """Where the checkpoints of a running stage are."""
        return self.path / "checkpoints" / stage

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The facts that a finished stage left (seconds, ...), None where it is not finished."""
        file = self.path / "stages" / stage / "done.json"
        return json.loads(file.read_text()) if file.exists() else None

    def finish(self, stage: str, facts: Mapping[str, Any], arrays: Any = None) -> None:
        """Mark a stage finished, after writing its arrays; then drop its checkpoints. All processes call it."""
        folder = self.path / "stages" / stage
        on_primary(f"{stage}: folder", lambda: folder.mkdir(parents=True, exist_ok=True))
        if arrays is not None:
            save_tree(folder / "arrays", arrays)

        def mark() -> None:
            write_atomically(folder / "done.json", json.dumps(dict(facts), indent=2) + "\n")
            shutil.rmtree(self.checkpoints(stage), ignore_errors=True)

        on_primary(f"{stage}: finished", mark)

    def arrays(self, stage: str, like: Any) -> Any:
        """The arrays of a finished stage, placed as `like`."""
        return load_tree(self.path / "stages" / stage / "arrays", like)

    def once(self, stage: str, make: Callable[[], Mapping[str, Any]], leaves: Path | None = None) -> Mapping[str, Any]:
        """The facts of a stage without arrays: `make` runs unless it is finished, and again where `leaves` is gone."""

        def forget() -> None:
            if not leaves.exists():
                (self.path / "stages" / stage / "done.json").unlink(missing_ok=True)

        if leaves is not None:
            on_primary(f"{stage}: is it there", forget)
        facts = self.finished(stage)
        if facts is None:
            facts = make()
            self.finish(stage, facts)
        return facts


def refuse_other_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Raise ConfigChanged, naming every differing key with both values, where the folder holds another config's run.

    Keys in `LAYOUT` may differ. Raises NotADirectoryError where it is a file, ValueError where it is an address, or
    where the config has a value that JSON does not.
    """
    if address := re.match(r"[A-Za-z][\w+.-]+:/(?!:)", workdir.as_posix()):
        raise ValueError(
            f"--workdir: {workdir} begins with {address[0]}, an address; a run lives in a folder: mount the bucket and "
            "give the folder, see docs/tpu_pod.md"
        )
    for key, value in _flatten(config).items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(f"{key}: {value!r} cannot be kept in config.json: {error}") from error
    if workdir.is_file():
        raise NotADirectoryError(f"--workdir: {workdir} is a file; a run lives in a folder")
    file = workdir / "config.json"
    if not file.exists():
        return
    before, now = _flatten(json.loads(file.read_text())), _flatten(json.loads(json.dumps(config)))
    changed = [
        f"  {key}: {before.get(key, '(absent)')!r} then, {now.get(key, '(absent)')!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "(absent)") != now.get(key, "(absent)") and key.rpartition(".")[2] not in LAYOUT
    ]
    if changed:
        raise ConfigChanged(
            f"{workdir} holds a run with another config; use another --workdir, or the same values:\n"
            + "\n".join(changed)
        )


def digest_of(rows: Iterable[object]) -> str:
    """SHA-256 of rows in their order, each by its repr."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()


def refuse_other_data(workdir: Path, digests: Mapping[str, str], prefix: str = "") -> None:
    """Raise ValueError, naming `prefix` + what differs, where the folder holds a run on data of other digests, by name.

    What a run made of its data row by row, as a teacher's labels, fits those data alone.
    """
    file = workdir / DIGESTS
    before = json.loads(file.read_text()) if file.exists() else {}
    if changed := ", ".join(prefix + name for name, digest in before.items() if digests.get(name) != digest):
        raise ValueError(f"{workdir} holds a run on other data, {changed}; use another --workdir, or the same data")


def write_atomically(file: Path, text: str) -> None:
    """Write a small file that is there whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def replace_folder(folder: Path, partial: Path) -> None:
    """`partial` takes the place of `folder`, which is never there half."""
    before = folder.with_name(f"{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        os.replace(folder, before)
    os.replace(partial, folder)
    shutil.rmtree(before, ignore_errors=True)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat
