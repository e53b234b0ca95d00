"""`python -m afrl_jax.serve` as an operator meets it: its log, SIGTERM, and models that are not what they were."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


def start(*arguments, stderr=subprocess.PIPE):
    command = [sys.executable, "-m", "afrl_jax.serve", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, env=dict(os.environ), stderr=stderr, text=True)


def test_sigterm_lets_what_was_admitted_end(export, tmp_path):
    (tmp_path / "keys").write_text("very-secret\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The first request waits 1.5 s for company: long enough to be interrupted.
    # Batches are small: fewer shapes are compiled at start.
    options = ["--batch_wait_ms=1500", "--kernels=xla", "--batch_pairs=3"]
    # A file: a pipe that nobody reads would fill while the server is asked for readiness.
    with (tmp_path / "log").open("w") as log:
        known = f"--api_keys={tmp_path / 'keys'}"
        server = start(f"--model={export[0]}", f"--port={port}", known, *options, stderr=log)
    url, headers = f"http://127.0.0.1:{port}", {"authorization": "Bearer very-secret"}
    while True:
        assert server.poll() is None, (tmp_path / "log").read_text()
        try:
            if requests.get(f"{url}/ready", timeout=5).ok:
                break
        except requests.ConnectionError:
            pass
        time.sleep(0.1)
    with socket.create_connection(("127.0.0.1", port)) as rude:
        rude.sendall(b"no HTTP\r\n\r\n")
        while rude.recv(1000):
            pass
    body = {"query": "chess", "documents": ["robots", "home"]}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(requests.post, f"{url}/rerank", json=body, headers=headers, timeout=30)
        while "afrl_queue_pairs 2.0" not in requests.get(f"{url}/metrics", timeout=5).text:
            time.sleep(0.02)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(requests.ConnectionError):
            requests.post(f"{url}/rerank", json=body, headers=headers, timeout=5)
        assert len(waiting.result().json()["results"]) == 2
    assert server.wait(timeout=30) == 0
    errors = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in errors.splitlines()]
    of_others = {line["logger"]: line["message"] for line in lines if line["event"] == "message"}
    assert "Invalid HTTP request" in of_others["uvicorn.error"] and "xla, as asked for" in of_others["kernels"]
    (scored,) = [line for line in lines if line.get("pairs")]
    assert scored["client"] == "key 1" and scored["status"] == 200 and scored["tokens"] > 0
    assert scored["queue_ms"] > 500 and {"tokenize_ms", "compute_ms", "total_ms", "request_id"} <= scored.keys()
    assert lines[-1]["event"] == "shut down" and "very-secret" not in errors


def slow_to_load(what):
    """The command with a model whose loading runs the statement."""
    command = f"""
import time
from afrl_jax import relevance_file
from afrl_jax.scoring import RelevanceModel
def load(*arguments, **options):
    {what}
RelevanceModel.load, relevance_file.read = load, lambda model: None
from afrl_jax.serve.__main__ import main
main(["--model=m", "--port=0"])
"""
    return subprocess.Popen([sys.executable, "-c", command], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_that_still_loads(ending):
    server = slow_to_load("time.sleep(600)")
    try:
        assert json.loads(server.stderr.readline())["event"] == "listening"
        time.sleep(0.5)  # until the server has taken the signals over
        server.send_signal(ending)
        _, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0 and json.loads(errors.splitlines()[-1])["event"] == "shut down"


def test_a_model_that_fails_in_any_way_is_status_2():
    _, errors = (server := slow_to_load('raise RuntimeError("out of memory")')).communicate(timeout=120)
    assert server.returncode == 2 and "in load" in errors
    assert errors.splitlines()[-1] == "python -m afrl_jax.serve: error: out of memory"


def test_a_model_that_lost_its_golden_scores_is_not_served(export, tmp_path):
    spoilt = tmp_path / "export"
    shutil.copytree(export[0], spoilt)
    file = spoilt / "relevance.json"
    description = json.loads(file.read_text())
    description["golden"][0]["probabilities"].reverse()
    file.write_text(json.dumps(description))
    server = start(f"--model={spoilt}", "--port=0")
    _, errors = server.communicate(timeout=120)
    assert server.returncode == 2 and "golden pair 0" in errors.splitlines()[-1] and '"ready"' not in errors


def test_what_is_wrong_is_told_in_one_line(export, tmp_path):
    (tmp_path / "keys").write_text("")
    wrong = {
        "holds no API key": [f"--model={export[0]}", f"--api_keys={tmp_path / 'keys'}"],
        "queue_pairs": [f"--model={export[0]}", "--queue_pairs=5"],
        "neither a model folder": [f"--model={tmp_path / 'absent'}"],
    }
    running = {told: start(*arguments) for told, arguments in wrong.items()}
    for told, server in running.items():
        _, errors = server.communicate(timeout=120)
        assert server.returncode == 2 and told in errors and "Traceback" not in errors
