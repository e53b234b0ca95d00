"""Every config of the rewriter reads and says how it is run."""

import json
import pathlib

import pytest

from core_jax.settings import read_settings
from lm_jax.config_file import read_config

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("core_*.py"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_says_how_it_is_run_and_reads(file):
    config = read_config(file, [])
    settings = read_settings(config)
    assert settings.title and settings.arm == "mpo" and settings.phases.count >= 2
    assert f"python -m core_jax.main --config=configs/{file.name} --workdir=" in file.read_text().split('"""')[1]
    json.dumps(config)
    if settings.relevance_config:
        assert (REPOSITORY / settings.relevance_config).exists()


def test_one_override_moves_all_data_of_the_real_size():
    config = read_config(REPOSITORY / "configs/core_qwen3.py", ["--config.data_root=elsewhere"])
    paths = [source["path"] for table in ("data", "rewrites") for source in config[table].values()]
    assert len(paths) == 3 and all(path.startswith("elsewhere/") for path in paths)


@pytest.mark.parametrize("name", ["core_quickstart", "core_smoke"])
def test_the_start_has_not_seen_the_searchers_of_the_phases(name):
    """Of the built-in world session number i of (split, week) is the same one wherever it is asked for."""
    config = read_config(REPOSITORY / "configs" / f"{name}.py", [])
    phases, start = config["data"]["train"], config["rewrites"]["typed_later"]
    assert (phases["split"], phases["week"]) == (start["split"], start["week"])
    assert start["start"] >= phases.get("start", 0) + phases["sessions"]
