"""REAL data, real pretrained weights: English shop search (CrowdFlower) graded 1..4, SmolLM2-135M as teacher.

    make smollm2
    python -m afrl_jax.main --config=configs/afrl_crowdflower_smollm2.py --workdir=runs/crowdflower \\
        --config.data_root=DIR_OF_THE_DATA_SETS

Hardware meant: 2 CPU cores. Measured: nothing yet. Only the first twenty steps of "sft" were ever
run, so time, scores and what RL and distillation change are not known; nothing here has been tuned.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """Teacher: all 30 layers; student: 15 of them."""
    root = FieldReference("../shared/data")
    train = root + "/crowdflower/train"
    data = {
        # One query in ten is kept for calibration: chosen by hash, never trained on.
        "train": {"format": "folder", "path": train, "keep": (0.0, 0.9)},
        "calibration": {"format": "folder", "path": train, "keep": (0.9, 1.0)},
        "dev": {"format": "folder", "path": root + "/crowdflower/dev"},
    }
    rows = {
        "rows": 16, "row_tokens": 256, "branches_together": 4, "micro_batches": 4, "weight_decay": 0.01,
        "save_every": 20,
    }  # fmt: skip
    return ConfigDict(
        {
            "title": "CrowdFlower search relevance, SmolLM2-135M",
            "seed": 0,
            "data_root": root,
            "instruction": {
                "task": "Judge how well the product matches the shopping query.",
                "labels": ("1", "2", "3", "4"),
                "meanings": ("irrelevant", "partly relevant", "relevant", "exactly what was asked"),
            },
            "dtype": "bfloat16",
            "max_document_tokens": 48,
            "teacher": {"source": "weights/smollm2-135m-instruct-q4_1.gguf"},
            "student": {"cut": 15},
            "data": data,
            "stages": ("sft", "rl", "distill"),
            "sft": {
                "kind": "sft", "mixture": {"train": 1.0}, "steps": 140, "learning_rate": 1.5e-4,
                "ordinal_weight": 1.0, **rows,
            },
            "rl": {
                "kind": "rl", "prompts_from": "train", "experts_from": "train", "steps": 12, "learning_rate": 1e-5,
                "schedule": "constant", "sft_weight": 0.5, "save_every": 6, "micro_batches": 3,
                "rollouts": {"prompts": 24, "group": 8, "graded": True, "expert_rows": 6},
            },
            "distill": {
                "kind": "distill", "mixture": {"train": 1.0}, "steps": 100, "learning_rate": 2e-4,
                "kl_share": 0.7, "temperature": 2.0, **rows,
            },
            "evaluation": {"test": "dev", "calibration": "calibration"},
        }
    )  # fmt: skip
