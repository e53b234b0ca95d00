"""TRL's trainers, one step at a time, on a model folder and on tokens that are known; for the benchmarks beside this.

All computing is TRL's and transformers' own: what is replaced is the loop around a step, and tokenizing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset

DPO_LOSSES = ["sigmoid", "bco_pair", "sft"]


def common(folder: Path, batch: int, bf16: bool) -> dict[str, Any]:
    """Arguments of every trainer: no logging, no files, no gradient checkpointing."""
    return {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": batch, "bf16": bf16, "use_cpu": True,
        "learning_rate": 1e-6, "gradient_checkpointing": False, "report_to": "none", "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }  # fmt: skip


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder as a causal model of transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


class TRLSide:
    """Steps of one of TRL's trainers, without its loop.

    In bf16, weights stay float32 and products are autocast, as TRL does it: the first product is looked at.
    """

    def __init__(self, trainer: Any, bf16: bool):
        self.trainer = trainer
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model
        trainer.current_gradient_accumulation_steps = 1
        self.batch = next(iter(trainer.get_train_dataloader()))
        self.expected, self.seen = torch.bfloat16 if bf16 else torch.float32, set()
        product = next(each for each in trainer.model.modules() if isinstance(each, torch.nn.Linear))
        product.register_forward_hook(lambda module, arguments, result: self.seen.add(result.dtype))

    def loss(self, batch: Any = None) -> float:
        """The loss of a batch, the step's own by default, before any step."""
        self.trainer.model.eval()  # no dropout; these models have none
        with torch.no_grad():
            return float(self.trainer.compute_loss(self.model, dict(self.batch if batch is None else batch)))

    def step(self) -> float:
        """Seconds of one step: all that TRL does for it, clipping and the optimizer."""
        self.seen.clear()
        began = time.perf_counter()
        self.trainer.model.train()
        batch = self.batch if isinstance(self.batch, list) else dict(self.batch)
        self.trainer.training_step(self.model, batch, None)
        torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        taken = time.perf_counter() - began
        assert self.expected in self.seen, f"TRL computed in {self.seen}"
        return taken


class PairsOnTokens(trl.DPOTrainer):
    """On pairs that are token ids already."""

    def _prepare_dataset(self, dataset, *rest):
        return dataset


class PromptsOnTokens(trl.GRPOTrainer):
    """On prompts that are token ids already."""

    def _tokenize_prompts(self, prompts):
        return prompts, None, {}


def dpo(
    folder: Path, pairs: Sequence[Sequence[np.ndarray]], weights: Sequence[float], beta: float, bf16: bool
) -> TRLSide:
    """DPOTrainer with the losses of MPO on (prompt, chosen, rejected)."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(columns, (tokens.tolist() for tokens in pair), strict=True)) for pair in pairs]
    arguments = trl.DPOConfig(
        loss_type=DPO_LOSSES, loss_weights=list(weights), beta=beta, precompute_ref_log_probs=True, max_length=None,
        **common(folder, len(pairs), bf16),
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = PairsOnTokens(
        load(folder), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return TRLSide(trainer, bf16)


def sft(folder: Path, tokens_BT: np.ndarray, bf16: bool) -> TRLSide:
    """SFTTrainer on whole rows of tokens."""
    arguments = trl.SFTConfig(max_length=tokens_BT.shape[1], packing=False, **common(folder, len(tokens_BT), bf16))
    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in tokens_BT])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return TRLSide(trl.SFTTrainer(load(folder), args=arguments, train_dataset=rows, processing_class=tokenizer), bf16)


def even_share(completion_ids: list[list[int]], **rest: Any) -> list[float]:
    """A reward that costs nothing: the share of even token ids."""
    return [float(np.mean(np.array(ids) % 2 == 0)) for ids in completion_ids]


def grpo(folder: Path, prompts_PS: np.ndarray, group: int, new_tokens: int, bf16: bool) -> TRLSide:
    """GRPOTrainer, each step of which draws `group` answers of `new_tokens` tokens to each prompt."""
    arguments = trl.GRPOConfig(
        num_generations=group, max_completion_length=new_tokens, generation_kwargs={"min_new_tokens": new_tokens},
        loss_type="grpo", beta=0.0, epsilon=0.2, **common(folder, len(prompts_PS) * group, bf16),
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": row.tolist()} for row in prompts_PS])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = PromptsOnTokens(load(folder), even_share, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return TRLSide(trainer, bf16)


class BareLoop:
    """Next-token training without any trainer: bf16 weights, AdamW, PyTorch's own cross-entropy."""

    def __init__(self, folder: Path, tokens_BT: np.ndarray, dtype: torch.dtype):
        self.model, self.tokens = load(folder, dtype).train(), torch.tensor(tokens_BT, dtype=torch.long)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)

    def _loss(self) -> torch.Tensor:
        logits = self.model(self.tokens).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())

    def loss(self) -> float:
        """The loss before any step."""
        with torch.no_grad():
            return float(self._loss())

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self._loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began
