"""A query rewriter for search after browse, from scratch on the built-in world of clips: nothing to download.

    python -m core_jax.main --config=configs/core_quickstart.py --workdir=runs/core

The deployed relevance model is the AFRL quickstart's export, made first where runs/quickstart/export is absent. Meant
for 12 minutes on 2 cores after that export. Measured: nothing yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A supervised start on what searchers typed after giving up, four phases of semi-online MPO, six weekly redeploys,
    two of them with an incident."""
    shape = {
        "family": "qwen3", "embed": 128, "layers": 4, "query_heads": 2, "kv_heads": 1, "head_size": 64, "ffn": 320,
        "qk_norm": True, "rope_theta": 1e6, "initializer_range": 0.06,
    }  # fmt: skip
    clips = {"format": "clips", "shown": 8, "random_documents": 2}
    return ConfigDict(
        {
            "title": "CoRe quickstart: the world of clips",
            "seed": 0,
            "relevance": "runs/quickstart/export",
            "relevance_config": "configs/afrl_quickstart.py",
            "rewriter": {"shape": shape, "max_watched_tokens": 80, "max_new_tokens": 24},
            "data": {
                "train": {**clips, "split": "train", "week": 0, "sessions": 800},
                "held_out": {**clips, "split": "dev", "week": 1, "sessions": 240},
            },
            "rewrites": {"typed_later": {**clips, "split": "train", "week": 0, "sessions": 12_000}},
            "supervised": {
                "mixture": {"typed_later": 1.0}, "steps": 600, "rows": 8, "row_tokens": 256, "optimizer": "muon",
                "learning_rate": 2.5e-3, "save_every": 200,
            },
            "mpo": {"steps": 40, "rows": 8, "row_tokens": 256, "learning_rate": 5e-5, "save_every": 20},
            "phases": {"count": 4, "contexts": 120, "rewrites": 8, "k": 2, "rows": 24},
            "weekly": {
                "weeks": 6, "sessions": 60, "held_out": 160, "searches": 30,
                "incidents": {"week3": "title_copying", "week5": "corrupted_checkpoint"},
            },
            "grpo": {"rows": 8, "row_tokens": 384, "group": 8, "learning_rate": 5e-5, "save_every": 10},
        }
    )  # fmt: skip
