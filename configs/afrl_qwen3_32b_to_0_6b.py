"""The real size: Qwen3-32B is trained by a curriculum and mode-balanced RL, then distilled into Qwen3-0.6B, on a pod.

    python -m afrl_jax.main --config=configs/afrl_qwen3_32b_to_0_6b.py --workdir=DIR --config.data_root=DATA

Hardware: a TPU pod slice; DIR lies on a disk that its hosts share, weights come from the Hugging Face hub. It was never
run: no such hardware was at hand, so there are no times and no scores here. What is tested is that every stage of it
traces and lowers at full size (tests/configs/test_configs.py). By the TPU compiler's figures a step of SFT takes 7.6 s
on v5p:4x4x4, 50.2% MFU (model FLOPs by PaLM's formula; 47% where a causal square counts half), with 33 of 96 GiB a
chip: 6.4 s of computing, a quarter of it what remat computes again, and 1.2 of exchanges that nothing hides, most of
them the five all-reduces a layer over `tensor`. The update of RL is at 46.6%, 3.4 points below the goal of 50%. All
stages fit there, and on two smaller slices, by the same figures of `--compile_for`:

    slice      mesh              micro_batches of sft_*, rl, distill   GiB at most    a step of SFT
    v5p:2x2x4  fsdp=16           4, 8, 2                               48.5 of 95.7   30.5 s, 50% MFU
    v5e:8x8    fsdp=8,tensor=8   16, 32, 4                             12.8 of 15.8   30.8 s, 29% MFU

DATA holds judgments folders (afrl_jax.data.readers): train (with explanations and rules where you have them), hard
(conflicts and near misses), expert (a rule-stratified set of gold explanations), calibration and dev. Replace
`instruction` by your own rulebook.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """S1 single rules, S2 conflicts, S4 RL on the natural mix (`afrl_jax.curriculum`), then distillation."""
    root = FieldReference("data")
    sets = ("train", "hard", "expert", "calibration", "dev")
    rows = {"rows": 128, "row_tokens": 4096, "branches_together": 8, "save_every": 100}
    return ConfigDict(
        {
            "title": "AFRL, Qwen3-32B to Qwen3-0.6B",
            "seed": 0,
            "data_root": root,
            "instruction": {
                "task": "Judge how well the document answers the query. The first rule that applies decides.",
                "labels": ("0", "1", "2", "3"),
                "meanings": ("irrelevant", "related", "nearly right", "just right"),
                "rules": (
                    (1, "another subject than the one asked for", (0,)),
                    (2, "right subject, but a hard constraint of the query is violated", (1,)),
                    (3, "right subject, one constraint cannot be told from the document", (2,)),
                    (4, "all constraints met", (3,)),
                ),
            },
            "dtype": "bfloat16",
            "remat": "full",
            "mesh": "fsdp=-1,tensor=4",
            "max_document_tokens": 1024,
            "teacher": {"source": "Qwen/Qwen3-32B"},
            "student": {"source": "Qwen/Qwen3-0.6B"},
            "data": {name: {"format": "folder", "path": root + f"/{name}"} for name in sets},
            "stages": ("sft_rules", "sft_conflicts", "rl", "distill"),
            "sft_rules": {
                "kind": "sft", "mixture": {"train": 1.0}, "steps": 2000, "learning_rate": 1e-5, "balance": 0.5, **rows,
            },
            "sft_conflicts": {
                "kind": "sft", "mixture": {"train": 0.5, "hard": 0.5}, "steps": 1000, "learning_rate": 5e-6,
                "balance": 0.5, **rows,
            },
            "rl": {
                "kind": "rl", "prompts_from": "train", "experts_from": "expert", "steps": 500, "learning_rate": 1e-6,
                "schedule": "constant", "arm": "decay", "sft_weight": 0.5, "sft_weight_end": 0.02, "micro_batches": 4,
                "save_every": 50,
                "rollouts": {"prompts": 192, "group": 8, "max_new_tokens": 256, "mask": True, "expert_rows": 64},
            },
            "distill": {
                "kind": "distill", "mixture": {"train": 0.7, "hard": 0.3}, "steps": 8000, "learning_rate": 2e-5, **rows,
            },
            "evaluation": {"explained_pairs": 2048, "max_new_tokens": 256},
        }
    )  # fmt: skip
