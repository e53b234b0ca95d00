"""Label log-probs on one device and on meshes of eight CPU devices, as JSON."""

import json

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402

from afrl_jax.answer_format import PromptTokens  # noqa: E402
from afrl_jax.label_scorer import LabelScorer  # noqa: E402
from lm_jax.config import DecoderConfig  # noqa: E402
from lm_jax.parameters import initialize, shardings  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402
from tests import quick_compiling  # noqa: E402, F401

CONFIG = DecoderConfig("qwen3", 96, 32, 2, 4, 2, 8, 64, qk_norm=True)
MESHES = ("data=8", "fsdp=4,tensor=2")
HEAD = np.arange(1, 21, dtype=np.int32)


def random_prompts() -> list[PromptTokens]:
    """Three queries behind one instruction, ten documents each."""
    random = np.random.default_rng(0)
    prefixes = [np.concatenate([HEAD, random.integers(1, 96, 3 + i).astype(np.int32)]) for i in range(3)]
    lengths = random.integers(2, 40, 30)
    return [
        PromptTokens(prefixes[i % 3], random.integers(1, 96, length).astype(np.int32))
        for i, length in enumerate(lengths)
    ]


def score(parameters) -> tuple[np.ndarray, np.ndarray, int]:
    """Log-probs, those of whole prompts [.., C], and how many batches it took."""
    scorer = LabelScorer(parameters, CONFIG, (5, 6, 7), head=HEAD)
    prompts = random_prompts()
    found = scorer.label_logprobs(prompts)
    batches = scorer.counts.batches
    return found, scorer.prefill(prompts[:4])[0], batches


def main():
    # Large weights, so that attention is far from uniform.
    parameters = {name: 10 * x if x.ndim > 2 else x for name, x in initialize(CONFIG, 0).items()}
    alone, whole, batches = score(parameters)
    found = {}
    for shape in MESHES:
        mesh = make_mesh(shape)
        with jax.set_mesh(mesh):
            same, same_whole, fewer = score(jax.device_put(parameters, shardings(CONFIG, mesh)))
        difference = max(np.abs(same - alone).max(), np.abs(same_whole - whole).max())
        found[shape] = {"difference": float(difference), "batches": fewer, "batches_alone": batches}
    print(json.dumps(found | {"spread": float(np.ptp(alone, axis=0).max())}))


if __name__ == "__main__":
    main()
