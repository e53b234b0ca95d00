import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from lm_jax.decoder import Decoder
from lm_jax.rows import Branch, Group, RowShape, render_row, stack
from lm_jax.token_loss import combine, outputs, ratio


def test_terms_are_divided_once_and_terms_without_data_are_zero():
    sums = {"a": jnp.float32(6.0), "b": jnp.float32(4.0), "none": jnp.float32(0.0)}
    denominators = {"a": jnp.float32(3.0), "b": jnp.float32(0.5), "none": jnp.float32(0.0)}
    assert combine(sums, denominators, {"a": 1.0, "b": 0.25, "none": 7.0}) == 2.0 + 0.25 * 8.0
    assert ratio(jnp.float32(0.0), jnp.float32(0.0)) == 0.0
    gradient = jax.grad(lambda x: ratio(x * x, jnp.float32(0.0)))(jnp.float32(2.0))
    assert gradient == 0.0


@pytest.mark.parametrize("labels", [(5, 9, 2)])
def test_outputs_are_those_of_transformers(twins, labels):
    """Log-probs, entropy and label log-probs of two answers to one prompt, against a sequence each in transformers."""
    config, model, parameters = twins
    rng = np.random.default_rng(0)
    trunk = rng.integers(2, config.vocab_size, 5)
    branches = [
        Branch(ids[:-1], ids[-count:], np.zeros(count, int), label_values={})
        for ids, count in ((rng.integers(2, config.vocab_size, 6), 4), (rng.integers(2, config.vocab_size, 4), 2))
    ]
    row = render_row([Group(trunk, branches)], [(0, (0, 1))], RowShape(16, 8, 3))
    found = jax.jit(lambda p, b: outputs(Decoder(config, p), b, labels))(parameters, stack([row]))
    place = 0
    for slot, branch in enumerate(branches):
        with torch.no_grad():
            logits = model(torch.tensor(np.concatenate([trunk, branch.inputs])[None])).logits[0].double().numpy()
        count = len(branch.targets)
        logprobs = scipy.special.log_softmax(logits, axis=-1)[-count:]
        here = slice(place, place + count)
        # float32 through another order of sums, logits of size 10
        expected = logprobs[np.arange(count), branch.targets]
        np.testing.assert_allclose(found.logprob_BM[0, here], expected, atol=1e-4, rtol=0)
        entropy = -(np.exp(logprobs) * logprobs).sum(-1)
        np.testing.assert_allclose(found.entropy_BM[0, here], entropy, atol=1e-4, rtol=0)
        of_labels = scipy.special.log_softmax(logits[-count, list(labels)])
        np.testing.assert_allclose(found.label_logprob_BQC[0, slot], of_labels, atol=1e-4, rtol=0)
        place += count
    assert found.logprob_BM.dtype == found.label_logprob_BQC.dtype == jnp.float32
