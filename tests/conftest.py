"""The surroundings of every test: CPU, no network, one compilation cache. Set before jax is imported anywhere."""

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # plans for TPU topologies compile without asking for a TPU's metadata
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns at every fork of a process that has tokenized
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
