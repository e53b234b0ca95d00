"""The pod script's decisions, with a gcloud that only writes down what it is asked."""

import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts/tpu_pod.sh"
# A state a call, the last one again and again; a line that begins with ! is an error. `ssh` ends the run with status 0.
GCLOUD = """#!/usr/bin/env bash
echo "$4" >> "$FAKE/asked"
case $4 in
describe)
    line=$(head -n 1 "$FAKE/states")
    [ "$(wc -l < "$FAKE/states")" = 1 ] || sed -i 1d "$FAKE/states"
    echo "Updates are available." >&2
    case $line in !*) echo "ERROR: ${line#!}" >&2; exit 1 ;; *) echo "$line" ;; esac ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "asked"),
    [
        (["READY"], ["describe", "ssh"]),
        (["PREEMPTED"], ["describe", "delete", "create", "scp", "ssh", "ssh"]),
        (["!NOT_FOUND: Resource 'x' was not found"], ["describe", "create", "scp", "ssh", "ssh"]),
        (["!UNAUTHENTICATED: expired", "!unreachable", "CREATING", "READY"], ["describe"] * 4 + ["ssh"]),
    ],
)
def test_a_slice_is_deleted_only_when_it_is_known_to_be_lost(tmp_path, states, asked):
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    for name, text in {"gcloud": GCLOUD, "sleep": "#!/bin/sh\n", "tar": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "TPU": "t", "ZONE": "z"}
    environment |= {"BUCKET": "b", "SLICE": "v5p-8"}
    ran = subprocess.run(["bash", SCRIPT, "run", "--config=c"], env=environment, cwd=tmp_path, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    assert (tmp_path / "asked").read_text().split() == asked
    assert all(
        state.removeprefix("!") in ran.stderr.decode() for state in states if len(states) > 1 and state != "READY"
    )
