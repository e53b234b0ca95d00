"""The command itself: collections that are read or refused, and a start to finish with a real model and store."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import requests

from afrl_jax.data.tables import DataError
from core_jax.inputs import open_sessions
from core_jax.serve.__main__ import main
from core_jax.serve.collection import clips_collection, read_collection, world_of
from lm_jax.config_file import read_config

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


def test_a_table_of_documents_is_read_and_bad_rows_are_named(tmp_path):
    table = tmp_path / "documents.jsonl"
    table.write_text('{"doc_id": "a", "title": "Chess", "minutes": "3"}\n{"doc_id": "b", "title": "Go", "text": "x"}\n')
    first, second = read_collection(table)
    assert (first.doc_id, first.title, first.fields, second.text) == ("a", "Chess", {"minutes": "3"}, "x")
    table.write_text('{"doc_id": "a", "title": "Chess"}\n{"doc_id": "a", "title": "Go"}\n{"doc_id": "c"}\n')
    with pytest.raises(DataError, match=r"(?s)jsonl:2.*earlier row.*jsonl:3.*title"):
        read_collection(table)


def test_a_run_says_which_world_it_lived_in(tmp_path):
    config = read_config(
        REPOSITORY / "configs" / "core_quickstart.py", ["--config.seed=2", "--config.weekly.drift=0.5"]
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    world = world_of(tmp_path)
    like = {"shown": 8, "random_documents": 4, "near_documents": 2}
    assert world == {"seed": 2, "drift": 0.5, "sessions": 800, **like}
    documents, contexts = clips_collection(3, **world | {"sessions": 40})
    lived = open_sessions({**config["data"]["train"], "split": "dev", "week": 3, "sessions": 40, "drift": 0.5}, 2)
    assert {context.key for context in contexts} <= {context.key for context in lived.contexts}
    shown = {each.document.doc_id for session in lived.sessions for each in session.shown}
    assert shown <= {document.doc_id for document in documents}


def test_the_built_in_world_offers_contexts_whose_documents_are_there():
    documents, contexts = clips_collection(2)
    ids = {document.doc_id for document in documents}
    assert len(contexts) == 30 and {context.watched.doc_id for context in contexts} <= ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=x"], "one of --documents and --clips_week"),
        (["--model=x", "--clips_week=1", "--store=s"], "--store needs --secret and --registry"),
        (
            ["--model=x", "--clips_week=1", "--store=absent", "--secret=s", "--registry=r"],
            "--store: there is no absent",
        ),
        (["--model=x", "--clips_week=1", "--run=absent"], "--run: absent is no workdir of core_jax.main"),
        (["--model=x", "--clips_week=1", "--unsafe=absent"], "No such file or directory: 'absent'"),
        (["--model=x", "--clips_week=1", "--recall=solr"], "--recall: 'solr' is none of bm25, opensearch:URL/INDEX"),
        (["--model=x", "--clips_week=1", "--recalled=0"], "--recalled: must be a whole number of at least 1"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_serves_a_model(relevance_folder, tmp_path):
    table = tmp_path / "documents.jsonl"
    rows = [{"doc_id": f"d{i}", "title": f"chess {i}", "kind": "tutorial"} for i in range(5)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    port = 18000 + os.getpid() % 2000
    command = [sys.executable, "-m", "core_jax.serve", f"--model={relevance_folder}", f"--documents={table}"]
    with subprocess.Popen([*command, f"--port={port}"], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as server:
        try:
            for _ in range(600):
                assert server.poll() is None, server.stderr.read()
                try:
                    requests.get(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except requests.ConnectionError:
                    time.sleep(0.1)
            answer = requests.post(f"http://127.0.0.1:{port}/search", json={"query": "chess"}, timeout=60).json()
            info = requests.get(f"http://127.0.0.1:{port}/info", timeout=10).json()
        finally:
            server.send_signal(signal.SIGTERM)
    assert len(answer["results"]) == 5 and answer["reason"] == "no store"
    assert re.fullmatch(r"[0-9a-f]{64}", info["model_version"]) and info["documents"] == 5
