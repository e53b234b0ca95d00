"""Pairs a second of our scorer and of other programs: same weights, same prompts, same cores, one process.

  python -m benchmarks.score_vs_peers            SmolLM2-135M (`make smollm2` fetches it)
  python -m benchmarks.score_vs_peers --quick    fewer documents, one timed repetition
  python -m benchmarks.score_vs_peers --tpu      only what the TPU compiler says of Qwen3-0.6B

W is 1 query x 100 documents of 30 to 90 tokens behind about 130 shared tokens, W2 is 20 queries x 5 such documents.
Every repetition brings other words: texts are tokenized and queries computed anew, only the instruction's keys and
values stay, on every side that keeps any. Sides take turns; ratios are of medians. The peers are PyTorch:
sentence-transformers' CrossEncoder of the exported classifier, transformers with whole prompts padded, and transformers
with a hand-written prefix cache that reads the head at the label rows alone, as ours does. All sides must agree on the
label log-probs.

Also printed: model FLOPs utilization, the FLOPs of tokens that have to be computed over what the machine's fastest
matrix product could have done meanwhile; the shares of tokenization, matrix products and attention, each run alone at
the shapes of the batches; and for one v5e and v6e chip the compiler's own estimate of a batch. Prints one line of JSON
last.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from afrl_jax.answer_format import AnswerFormat
from afrl_jax.batch_plan import Batch, plan
from afrl_jax.calibration import Calibration
from afrl_jax.data import clips
from afrl_jax.decision import MOST_PROBABLE
from afrl_jax.export import export_model
from afrl_jax.label_scorer import BATCH_TOKENS, CPU_BATCH_TOKENS, padded
from afrl_jax.label_step import trace_step
from afrl_jax.relevance_file import DEFAULT_INSTRUCTION
from afrl_jax.schema import Document, Instruction, Query
from afrl_jax.scoring import RelevanceModel
from benchmarks.scoring_peers import Pairs, peers
from kernels.prefix_attention import prefix_attention
from lm_jax.config import preset
from lm_jax.decoder import contract
from lm_jax.lora import TARGETS as PRODUCTS
from lm_jax.parameters import abstract, table
from lm_jax.shared_prefix import scan
from lm_jax.tokenizer import Tokenizer
from sharding.chips import topology
from sharding.mesh import make_mesh
from sharding.plan import Program, measure

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = "chess openings explained to children robots interview sourdough bread at home iceland beginners german".split()
SHARED, SHORTEST, LONGEST = 130, 30, 90  # tokens
# Of a log-prob. float32: sums in another order through 30 layers. bfloat16: 8 bits in each of them.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5}


def long_instruction(tokenizer: Tokenizer) -> Instruction:
    """The default task with as many numbered rules as make about `SHARED` tokens with a query."""
    rules = clips.instruction().rules
    for count in range(len(rules) + 1):
        instruction = Instruction(DEFAULT_INSTRUCTION.task, DEFAULT_INSTRUCTION.scale, rules[:count])
        text = AnswerFormat(tokenizer, instruction).prefix_text(Query("", "chess for kids"))
        if len(tokenizer.encode(text)) >= SHARED - 5:
            return instruction
    raise ValueError("the rules are too few")


def workload(format: AnswerFormat, queries: int, documents: int, draw: int) -> Pairs:
    """Pairs whose documents have `SHORTEST` to `LONGEST` tokens, slot included; draws differ in words alone."""
    sizes, random = np.random.default_rng(queries), np.random.default_rng((queries, draw))
    pairs = []
    for number in range(queries):
        query = Query("", f"{' '.join(sizes.choice(WORDS, 3))} {number:02d} {draw}")
        for _ in range(documents):
            tokens = sizes.integers(SHORTEST, LONGEST + 1)
            words = [*random.choice(WORDS, LONGEST)]
            while len(format.encode_prompts([(query, Document("", " ".join(words)))])[0].document) > tokens:
                words.pop()
            pairs.append((query, Document("", " ".join(words))))
    return pairs


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, [N, C]."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def race(sides: dict[str, Callable[[Pairs], np.ndarray]], draws: Sequence[Pairs]) -> dict[str, Any]:
    """Pairs a second of every side, and how far its log-probs are from those of the first.

    The first draw warms up and is compared; the others are timed. No side has seen a query or a document before.
    """
    found = {name: log_softmax(side(draws[0])) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for pairs in draws[1:]:
        for name, side in sides.items():
            began = time.perf_counter()
            side(pairs)
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(found.values()))
    return {
        name: {
            "pairs_per_second": len(draws[0]) / statistics.median(seconds[name]),
            "seconds": statistics.median(seconds[name]),
            "difference": float(np.abs(found[name] - first).max()),
        }
        for name in sides
    }


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Ours over the strongest peer of the same dtype, and bfloat16 over CrossEncoder."""
    speed = {name: side["pairs_per_second"] for name, side in result.items()}
    found = {}
    for dtype in TOLERANCE:
        strongest = max(value for name, value in speed.items() if name.endswith(dtype) and not name.startswith("ours"))
        found[f"{dtype}/strongest peer"] = speed[f"ours, {dtype}"] / strongest
        encoder = speed[f"sentence-transformers CrossEncoder, {dtype}"]
        found[f"bfloat16/CrossEncoder {dtype}"] = speed["ours, bfloat16"] / encoder
    return found


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the fastest 2048-cubed product of this dtype, by either library."""
    size = 2048
    a = np.random.default_rng(0).standard_normal((size, size))
    x, y = jnp.array(a, dtype), torch.tensor(a, dtype=getattr(torch, dtype))
    product = jax.jit(lambda x: contract("ab,bc->ac", x, x))
    return 2 * size**3 / min(timed(lambda: product(x), 3), timed(lambda: y @ y, 3))


def timed(run: Callable[[], Any], repetitions: int) -> float:
    """Seconds of the fastest of so many runs, after one that does not count."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return min(found)


def where_time_goes(model: RelevanceModel, pairs: Pairs, seconds: float, peak: float) -> dict[str, float]:
    """Utilization, and the shares of `seconds` that the parts take when each is run alone at the batches' shapes."""
    config, prompts = model.config, model.format.encode_prompts(pairs)
    prefixes = list({prompt.prefix.tobytes(): len(prompt.prefix) for prompt in prompts}.values())
    lengths = [len(prompt.document) for prompt in prompts]
    head = len(model.format.head_tokens)
    computed = sum(lengths) + sum(prefixes) - head * len(prefixes)
    layer = sum(np.prod(table(config)[name].shape) for name in PRODUCTS)
    looked_at = sum(len(prompt.document) * (len(prompt.prefix) + len(prompt.document) / 2) for prompt in prompts)
    flops = 2 * layer * computed + 4 * config.layers * config.query_heads * config.head_size * looked_at
    owner = {prefix: number for number, prefix in enumerate({p.prefix.tobytes() for p in prompts})}
    batches = plan(lengths, [owner[p.prefix.tobytes()] for p in prompts], [0] * len(prompts), budget=CPU_BATCH_TOKENS)
    size = padded(max(prefixes))
    fresh = AnswerFormat(model.format.tokenizer, model.format.instruction)
    began = time.perf_counter()
    fresh.encode_prompts(pairs)
    tokenizing = time.perf_counter() - began
    weights = {name: model.parameters[name] for name in PRODUCTS}
    multiplying = attending = 0.0
    for batch in batches:
        x_BTD = jnp.ones((len(batch.rows), batch.tokens, config.embed))
        multiplying += timed(functools.partial(products, weights, x_BTD), 1)
        attending += config.layers * timed(functools.partial(attention, *attention_inputs(model, batch, size)), 1)
    return {
        "flops_utilization": flops / seconds / peak,
        "tokenization": tokenizing / seconds,
        "matrix products": multiplying / seconds,
        "attention": attending / seconds,
    }


@jax.jit
def products(weights: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """The matrix products of all layers, one after the other."""

    def layer(x, w):
        dtype = w["query"].dtype
        q, k, v = (contract("btd,dnh->btnh", x, w[name]) for name in ("query", "key", "value"))
        mixed = (q + jnp.pad(k + v, [(0, 0)] * 2 + [(0, q.shape[2] - k.shape[2]), (0, 0)])).astype(dtype)
        x = contract("btnh,nhd->btd", mixed, w["output"])
        both = contract("btd,df->btf", x, w["gate"]) + contract("btd,df->btf", x, w["up"])
        return contract("btf,fd->btd", both.astype(dtype), w["down"]), None

    return scan(layer, x_BTD, weights)[0]


attention = jax.jit(prefix_attention)


def attention_inputs(model: RelevanceModel, batch: Batch, size: int) -> tuple[jax.Array, ...]:
    """Arguments of one layer's attention at the shape of a batch behind prefixes of `size`."""
    config, dtype, lines = model.config, model.dtype, batch.slots * len(batch.rows)
    wide, kv = (lines, batch.width), (config.kv_heads, config.head_size)
    return (
        jnp.ones((*wide, config.query_heads, config.head_size), dtype),
        jnp.ones((*wide, *kv), dtype),
        jnp.ones((*wide, *kv), dtype),
        jnp.ones(wide, jnp.int32),
        jnp.ones((batch.prefixes, size, *kv), dtype),
        jnp.ones((batch.prefixes, size, *kv), dtype),
        jnp.full(batch.prefixes, size, jnp.int32),
        jnp.arange(lines, dtype=jnp.int32) % batch.prefixes,
    )


def tpu_estimates() -> dict[str, dict[str, float]]:
    """What the TPU compiler says of one batch of Qwen3-0.6B, bfloat16, on one chip: seconds, bytes, pairs a second."""
    config = preset("qwen3-0.6b")
    documents = BATCH_TOKENS // ((SHORTEST + LONGEST) // 2)
    batch, *_ = plan([(SHORTEST + LONGEST) // 2] * documents, [0] * documents, [0] * documents, budget=BATCH_TOKENS)
    found = {}
    for name in ("v5e:2x2", "v6e:2x2"):
        chip, devices = topology(name)
        mesh = make_mesh("data=1", devices[:1])
        weights = abstract(config, mesh)

        def trace(remat: str, weights=weights):
            return trace_step(weights, config, batch, grades=4, prefix_size=padded(SHARED), dtype="bfloat16")

        program = Program("scoring", trace, {"weights": weights}, len(batch.items), "pairs")
        figures = measure(program, chip, mesh, "none")
        found[name.partition(":")[0]] = {
            "seconds": figures.seconds, "bytes": figures.bytes, "pairs": len(batch.items),
            "pairs_per_second": figures.per_second, "flops_utilization": figures.mfu,
        }  # fmt: skip
    return found


def told(name: str, result: dict[str, Any], parts: dict[str, dict[str, float]]) -> None:
    """The table of a workload."""
    print(f"{name}: pairs a second, seconds, largest difference of a label log-prob to ours in float32")
    for side, values in sorted(result.items(), key=lambda item: -item[1]["pairs_per_second"]):
        print(f"  {side:46} {values['pairs_per_second']:7.2f} {values['seconds']:8.2f} {values['difference']:9.1e}")
    for ratio, value in ratios(result).items():
        print(f"  ours over {ratio:36} {value:7.2f}")
    for dtype, shares in parts.items():
        print(f"  ours, {dtype}: " + ", ".join(f"{part} {value:.1%}" for part, value in shares.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    """See the head of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "weights" / "smollm2-135m-instruct-q4_1.gguf")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tpu", action="store_true")
    args = parser.parse_args(arguments)
    if not args.tpu and not args.model.exists():
        parser.error(f"{args.model} is absent: `make smollm2` fetches it, or name another --model")
    logging.disable(logging.WARNING)  # of libraries about their own insides
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, Any] = {"benchmark": "score_vs_peers"}
    agree = True
    if not args.tpu:
        raced = compare(args.model, args.quick, 1 if args.quick else args.repetitions)
        agree = all(
            side["difference"] < TOLERANCE[side_name.rpartition(", ")[2]]
            for result in raced["workloads"].values()
            for side_name, side in result["sides"].items()
        )
        found |= raced | {"agree": agree}
    found["tpu"] = tpu_estimates()
    for chip, values in found["tpu"].items():
        print(
            f"{chip}, Qwen3-0.6B, the compiler's estimate: {values['pairs']} pairs in "
            f"{1e3 * values['seconds']:.1f} ms, "
            f"{values['bytes'] / 1e9:.2f} GB moved, {values['pairs_per_second']:,.0f} pairs a second"
        )
    print(json.dumps(found))
    if not agree:
        raise SystemExit("failed: the sides do not give the same label log-probs")


def compare(source: Path, quick: bool, repetitions: int) -> dict[str, Any]:
    """Both workloads raced."""
    tokenizer = Tokenizer.load(source)
    instruction = long_instruction(tokenizer)
    models = {dtype: RelevanceModel.load(source, instruction=instruction, dtype=dtype) for dtype in TOLERANCE}
    exact = models["float32"]
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export"
        fitted = {"calibration": Calibration.identity(len(exact.format.labels)), "decision": MOST_PROBABLE}
        facts = {"golden": [], "figures": {}, "config": {}, "title": source.stem}
        export_model(export, exact.parameters, exact.config, exact.format, **fitted, **facts)
        sides = {f"ours, {dtype}": model.label_logprobs for dtype, model in models.items()}
        sides |= peers(export, exact.format)
    peaks = {dtype: matmul_peak(dtype) for dtype in models}
    for dtype, peak in peaks.items():
        print(f"fastest {dtype} matrix product: {peak / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    print("OpenVINO and llama.cpp are not compared with here")
    workloads = {}
    for name, queries, documents in (("W", 1, 20 if quick else 100), ("W2", 4 if quick else 20, 5)):
        draws = [workload(exact.format, queries, documents, draw) for draw in range(1 + repetitions)]
        result = race(sides, draws)
        parts = {
            dtype: where_time_goes(model, draws[0], result[f"ours, {dtype}"]["seconds"], peaks[dtype])
            for dtype, model in models.items()
        }
        told(name, result, parts)
        workloads[name] = {"sides": result, "ratios": ratios(result), "shares": parts}
    return {"matmul_flops_per_second": peaks, "threads": torch.get_num_threads(), "workloads": workloads}


if __name__ == "__main__":
    main()
