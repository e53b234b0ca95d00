"""Real Redis servers, each on a free port of this machine."""

import dataclasses
import shutil
import socket
import subprocess
import time

import pytest

from tests.absent import absent


@dataclasses.dataclass
class RedisServer:
    url: str
    process: subprocess.Popen

    def stop(self):
        self.process.terminate()
        self.process.wait()


def start(folder) -> RedisServer:
    program = shutil.which("redis-server")
    if program is None:
        absent("redis-server is not installed (Debian: apt-get install redis-server)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    return RedisServer(f"redis://127.0.0.1:{port}/0", process)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """The address of a server that lives as long as the tests."""
    server = start(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.stop()


@pytest.fixture
def redis_server(tmp_path):
    """A server that the test may stop."""
    server = start(tmp_path)
    yield server
    server.stop()
