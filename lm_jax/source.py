"""Where a model comes from: a folder, a .gguf file or a name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import huggingface_hub


def locate(source: str | Path, patterns: Iterable[str]) -> Path:
    """The folder or .gguf file that `source` names; a hub id is downloaded into the hub's cache first.

    Args:
        source: a folder in Hugging Face layout, a .gguf file, or a hub id such as "Qwen/Qwen3-0.6B".
        patterns: which files to fetch when it is a hub id.

    Raises:
        FileNotFoundError: it is a path that does not exist.
        ConnectionError: the hub does not have it or cannot be reached, and the cache does not hold it.
    """
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    name = str(source)
    if path.exists() or path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: neither a model folder nor a .gguf file")
    try:
        # A pattern's * goes through folders too, such as that of another form of the model.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises its own, httpx's and OS errors
        raise ConnectionError(
            f"{name!r} is no folder or .gguf file here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
