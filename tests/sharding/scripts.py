"""Programs that need several fake devices, and so a process of their own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def printed(script: str) -> tuple[dict[str, Any], str]:
    """The JSON that a script of this folder prints, and what else it says."""
    done = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr
