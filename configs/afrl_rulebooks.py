"""A judge that reads its instruction: clips judged under random parts and wordings of the rulebook, grades following.

    python -m afrl_jax.main --config=configs/afrl_rulebooks.py --workdir=runs/rulebooks

Then its instruction evolves, from the rulebook without its rare rules, by mined edits and beside as many random ones;
runs/rulebooks/evolution/report/report.html shows what each round fixed, against the full rulebook, also in words that
training never showed. Hardware meant: 2 CPU cores. Measured: nothing yet, so nothing here is tuned. A smaller try
(embed 128, 6 layers, 12 documents a query, 400 steps of text) had not learned to grade after 400 supervised steps: loss
of the grade 1.22, chance 1.39.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Domain text teaches to match; SFT under a new instruction for every query, to read."""
    shape = {
        "family": "qwen3", "embed": 192, "layers": 5, "query_heads": 3, "kv_heads": 1, "head_size": 64, "ffn": 512,
        "qk_norm": True, "rope_theta": 1e6, "initializer_range": 0.06,
    }  # fmt: skip
    train = {"branches_together": 8, "optimizer": "muon", "save_every": 100}
    clips = {"format": "clips", "split": "dev", "documents_per_query": 6, "rule_balance": 0.5}
    rulebooks = {"format": "clips_rulebooks", "documents_per_query": 8, "rule_balance": 0.5}
    return ConfigDict(
        {
            "title": "AFRL on clips: an instruction that is read, and improves itself",
            "seed": 0,
            "tokenizer": "train",
            "vocabulary": 1100,
            "teacher": {"shape": shape},
            "data": {
                "texts": {"format": "clips_text", "split": "train", "texts": 14000},
                "train": {**rulebooks, "split": "train", "queries": 6000},
                "calibration": {**rulebooks, "split": "dev", "queries": 240, "keep": (0.85, 1.0)},
                "dev": {**rulebooks, "split": "test", "queries": 120},
                # One world of queries in three parts: none is in two.
                "dev_new": {**clips, "queries": 240, "keep": (0.0, 0.5)},
                "dev_replay": {**clips, "queries": 240, "keep": (0.5, 0.85)},
                "test": {**clips, "split": "test", "queries": 120},
            },
            "stages": ("text", "sft"),
            "text": {"kind": "text", "texts": "texts", "steps": 800, "learning_rate": 3e-3, "rows": 8,
                     "row_tokens": 256, **train},
            "sft": {"kind": "sft", "mixture": {"train": 0.95, "texts": 0.05}, "steps": 1500, "learning_rate": 8e-4,
                    "rows": 4, "row_tokens": 1024, **train},
            "evolve": {"dev_new": "dev_new", "dev_replay": "dev_replay", "test": "test", "rounds": 3, "clusters": 6,
                       "edits": 3, "most_words": 320, "synthesize": 4},
            "evaluation": {"explained_pairs": 128, "max_new_tokens": 64},
        }
    )  # fmt: skip
