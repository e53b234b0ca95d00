"""Log-probability of each target token and entropy of its distribution, without an array [tokens, vocabulary].

A head of V rows turns a hidden state into V logits, of which a loss needs one log-probability. Materializing them costs
tokens x V x 4 bytes (32k tokens of Qwen3: 20 GB); here they exist one chunk of tokens at a time, in the forward pass
and again in the backward pass.
"""

from kernels.token_logprobs.reference import token_logprobs

__all__ = ["token_logprobs"]
