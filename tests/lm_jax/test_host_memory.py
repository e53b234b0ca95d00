"""Freed memory is kept: the second use of a large block faults no page in."""

import subprocess
import sys

import pytest

TOUCH_TWICE = """
import resource, sys, threading
import numpy as np
from lm_jax.host_memory import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()

def touch():
    np.ones(200 << 20, np.uint8)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=touch)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's C library")
def test_a_freed_block_is_used_again():
    def second_use(*arguments: str) -> int:
        done = subprocess.run([sys.executable, "-c", TOUCH_TWICE, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert second_use() > 80  # 100 huge pages at the least, 51,200 small ones at the most
    assert second_use("keep") < 40
