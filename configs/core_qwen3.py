"""The real size: Qwen3-1.7B becomes the rewriter of a search engine, rewarded by its deployed relevance model, on TPUs.

    python -m core_jax.main --config=configs/core_qwen3.py --workdir=DIR --config.relevance=EXPORT \\
        --config.data_root=DATA

Hardware: one host with 8 TPU chips, such as v5e:2x4 or v6e:2x4; weights come from the Hugging Face hub. It
was never run: no such hardware was at hand, so there are no times and no scores here.

EXPORT is the model folder that afrl_jax left; DATA holds train.jsonl and next_week.jsonl (sessions) and rewrites.jsonl
(of people), as core_jax/session_reader.py describes them. To sample with vLLM, set `sampler.url` and a `sampler.reload`
command that starts it on {folder}.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """OBJECTIVES 8 and 9 at their defaults."""
    root = FieldReference("data")
    rows = {"rows": 64, "row_tokens": 1024, "micro_batches": 1, "save_every": 100}
    return ConfigDict(
        {
            "title": "CoRe, Qwen3-1.7B",
            "seed": 0,
            "data_root": root,
            "relevance": "export",
            "dtype": "bfloat16",
            "remat": "full",
            "mesh": "fsdp=8",
            "rewriter": {"source": "Qwen/Qwen3-1.7B", "max_watched_tokens": 256, "max_new_tokens": 48},
            "data": {
                "train": {"format": "log", "path": root + "/train.jsonl"},
                "held_out": {"format": "log", "path": root + "/next_week.jsonl"},
            },
            "rewrites": {"people": {"format": "table", "path": root + "/rewrites.jsonl"}},
            "supervised": {"mixture": {"people": 1.0}, "steps": 300, "learning_rate": 1e-5, **rows},
            "mpo": {"steps": 500, "learning_rate": 1e-6, **rows},
            "phases": {"count": 4, "contexts": 20_000, "rewrites": 16, "k": 2, "rows": 64},
        }
    )  # fmt: skip
