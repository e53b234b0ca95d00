"""Every stage in half a minute, for tests: it learns nothing.

python -m afrl_jax.main --config=configs/afrl_smoke.py --workdir=runs/smoke
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The smallest run that goes through every stage."""
    shape = {
        "family": "qwen3", "embed": 32, "layers": 2, "query_heads": 2, "kv_heads": 1, "head_size": 16, "ffn": 64,
        "qk_norm": True,
    }  # fmt: skip
    short = {"steps": 4, "learning_rate": 1e-3, "save_every": 2}
    small = {**short, "rows": 4, "row_tokens": 256}
    return ConfigDict(
        {
            "title": "AFRL smoke run",
            "seed": 0,
            "tokenizer": "train",
            "vocabulary": 512,
            "show_rules": False,
            "teacher": {"shape": shape},
            "student": {"shape": {**shape, "layers": 1}},
            "data": {
                "texts": {"format": "clips_text", "split": "train", "texts": 200},
                "train": {"format": "clips", "split": "train", "queries": 20, "documents_per_query": 4},
                "expert": {
                    "format": "clips", "split": "train", "queries": 20, "documents_per_query": 4, "rule_balance": 1.0,
                },
                "calibration": {"format": "clips", "split": "dev", "queries": 10, "documents_per_query": 4},
                "dev": {"format": "clips", "split": "test", "queries": 10, "documents_per_query": 4},
            },
            "stages": ("text", "sft", "rl", "distill"),
            "text": {"kind": "text", "texts": "texts", **small},
            "sft": {"kind": "sft", "mixture": {"train": 0.75, "texts": 0.25}, **small, "micro_batches": 2},
            "rl": {
                "kind": "rl", "prompts_from": "train", "experts_from": "expert", **short,
                "rollouts": {"prompts": 2, "group": 4, "max_new_tokens": 12, "expert_rows": 2}, "arm": "decay",
                "kl": 0.01,
            },
            "distill": {"kind": "distill", "mixture": {"train": 1.0}, **small},
            "evaluation": {"explained_pairs": 8, "max_new_tokens": 12, "resamples": 50},
        }
    )  # fmt: skip
