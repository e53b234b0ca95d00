"""Every stage of the rewriter in seconds, for tests: it learns nothing.

    python -m core_jax.main --config=configs/core_smoke.py --workdir=runs/core_smoke

The relevance model is that of configs/afrl_smoke.py, made first where runs/smoke/export is absent.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The smallest run that goes through every stage."""
    shape = {
        "family": "qwen3", "embed": 32, "layers": 2, "query_heads": 2, "kv_heads": 1, "head_size": 16, "ffn": 64,
        "qk_norm": True,
    }  # fmt: skip
    small = {"steps": 4, "rows": 4, "row_tokens": 192, "learning_rate": 1e-3, "save_every": 2}
    clips = {"format": "clips", "shown": 6, "random_documents": 2}
    return ConfigDict(
        {
            "title": "CoRe smoke run",
            "seed": 0,
            "relevance": "runs/smoke/export",
            "relevance_config": "configs/afrl_smoke.py",
            "rewriter": {"shape": shape, "max_watched_tokens": 32, "max_new_tokens": 12},
            "data": {
                "train": {**clips, "split": "train", "week": 0, "sessions": 24},
                "held_out": {**clips, "split": "dev", "week": 1, "sessions": 12},
            },
            "rewrites": {"typed_later": {**clips, "split": "train", "week": 0, "start": 24, "sessions": 100}},
            # With fewer steps no rewrite that is drawn would end.
            "supervised": {"mixture": {"typed_later": 1.0}, **small, "steps": 12, "learning_rate": 2e-2},
            "mpo": small,
            "grpo": {"rows": 2, "row_tokens": 192, "group": 4, "learning_rate": 1e-3, "save_every": 2},
            "phases": {"count": 2, "contexts": 6, "rewrites": 4, "k": 1, "margin": 1e-6, "rows": 4},
            "evaluation": {"resamples": 50, "searches": 4},
        }
    )  # fmt: skip
