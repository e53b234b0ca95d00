"""Imported before jax compiles anything: most of the suite's time is compiling small programs for CPU.

LLVM's optimizations are left out, which halves it; and loops are emitted as LLVM's own code instead of by MLIR, which
leaves two fifths of that (98 s and 38 s of a run of configs/afrl_smoke.py). Processes that tests start inherit the
first, the second where they import this too.
"""

import os

from jaxlib import xla_client

FLAGS = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")

given = os.environ.get("XLA_FLAGS", "").split()
flags = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])
os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
xla_client.CompileOptions()  # jaxlib reads the variable now, and never again
os.environ["XLA_FLAGS"] = flags  # libtpu reads it when it is loaded, and ends a process over a flag it does not know
