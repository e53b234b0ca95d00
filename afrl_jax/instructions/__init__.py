"""Instructions that improve themselves, examples for their rules, explanations of human grades."""

# Of a language model's settings, those that may be others when a run is taken up again: the server, and the budget.
CONNECTION = ("base_url", "key_variable", "timeout", "attempts", "concurrency")
BUDGET = ("calls", "tokens", "money", "prompt_price", "completion_price")
