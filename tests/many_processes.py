"""Programs of several processes that train one model, on one machine: 2 devices each, gloo between them."""

import os
import pathlib
import socket
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def start_together(
    commands: list[list[str]], logs: pathlib.Path, timeout: float = 600, alone: bool = True
) -> list[tuple[int, str]]:
    """Run Python with each list of arguments, process i of len(commands); (exit status, all it said) of each.

    Args:
        logs: a folder for what they say, made here.
        alone: a single one is told of no others; otherwise it joins a run of one.
    """
    logs.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # half of the time is compiling; the numbers are the same to rounding
    }
    joined = len(commands) > 1 or not alone
    if joined:
        shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(len(commands))}
    running = []
    for index, command in enumerate(commands):
        own = {"JAX_PROCESS_ID": str(index)} if joined else {}
        with (logs / str(index)).open("w") as log:
            arguments = [sys.executable, *map(str, command)]
            running.append(subprocess.Popen(arguments, stdout=log, stderr=log, env=shared | own, cwd=logs))
    try:
        statuses = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(status, (logs / str(index)).read_text()) for index, status in enumerate(statuses)]
