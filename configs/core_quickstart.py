"""A query rewriter for search after browse, from scratch on the built-in world of clips: nothing to download.

    python -m core_jax.main --config=configs/core_quickstart.py --workdir=runs/core

The deployed relevance model is the AFRL quickstart's export, made first where runs/quickstart/export is absent. Meant
for 12 minutes on 2 cores after that export. Measured: nothing yet.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """A supervised start on what searchers typed after giving up, four phases of semi-online MPO, six weekly redeploys,
    two of them with an incident."""
    relevance = FieldReference("runs/quickstart/export")  # the rewriter starts from its weights
    clips = {"format": "clips", "shown": 8, "random_documents": 2}
    gave_up = {"format": "clips", "shown": 3, "random_documents": 0}  # of few results: many give up
    return ConfigDict(
        {
            "title": "CoRe quickstart: the world of clips",
            "seed": 0,
            "relevance": relevance,
            "relevance_config": "configs/afrl_quickstart.py",
            "rewriter": {"source": relevance + "", "max_watched_tokens": 80, "max_new_tokens": 24},
            "data": {
                "train": {**clips, "split": "train", "week": 0, "sessions": 3200},
                "held_out": {**clips, "split": "dev", "week": 1, "sessions": 800},
            },
            "rewrites": {"typed_later": {**gave_up, "split": "train", "week": 0, "sessions": 32_000}},
            "supervised": {
                "mixture": {"typed_later": 1.0}, "steps": 1500, "rows": 8, "row_tokens": 256, "optimizer": "muon",
                "learning_rate": 1e-3, "save_every": 500,
            },
            "mpo": {"steps": 40, "rows": 8, "row_tokens": 256, "learning_rate": 2e-4, "save_every": 20},
            "phases": {"count": 4, "contexts": 400, "rewrites": 8, "k": 2, "rows": 48},
            "weekly": {
                "weeks": 6, "sessions": 400, "held_out": 800, "searches": 60,
                "incidents": {"week3": "title_copying", "week5": "corrupted_checkpoint"},
            },
            "grpo": {"rows": 8, "row_tokens": 384, "group": 8, "learning_rate": 5e-5, "save_every": 10},
        }
    )  # fmt: skip
