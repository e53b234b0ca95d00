"""The language model that both recipes share: decoder, weights, tokenizer, sampling, token losses, training loop."""
