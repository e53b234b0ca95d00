"""Which tokens may follow in an explanation: the answer format as a table, for decoding that cannot leave it.

The text after an answer's label, up to its verdict line, is a regular language over characters: "Match:" with its
checks, then "Rule:" with a number, see `afrl_jax.answer_format`. Its automaton, run over the text of every token, says
for each state which tokens lead where. What a phrase says stays free, but for what would end it in the wrong place.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from afrl_jax.answer_format import VERDICT_LINE
from afrl_jax.schema import Match
from lm_jax.tokenizer import Tokenizer

START = 0
RULE_DIGITS = 6  # of a rule's number, at most
OTHER = ""  # stands for every character that a state does not name
REFUSED = -1
Automaton = list[dict[str, int]]  # of each state: where a character leads; where neither it nor OTHER is, nowhere


def automaton() -> Automaton:
    """States from `START`, after the label, to the last, where everything is accepted: the verdict's line has begun."""
    states: Automaton = [{}]

    def new() -> int:
        states.append({})
        return len(states) - 1

    def literal(start: int, text: str, end: int | None = None) -> int:
        """Read `text`; the state after it, `end` if given."""
        *path, last = text
        for character in path:
            states[start][character] = following = new()
            start = following
        states[start][last] = new() if end is None else end
        return states[start][last]

    def phrase(start: int) -> int:
        """Read characters, not none, up to " | "; the state after that."""
        inside, blank = new(), new()
        free = {OTHER: inside, ";": REFUSED, "|": REFUSED, "\n": REFUSED}
        states[start] |= free | {" ": REFUSED}
        states[inside], states[blank] = free | {" ": blank}, free | {" ": blank}
        return literal(blank, "| ")

    check = literal(START, "\nMatch: ")
    verdict, checked = phrase(phrase(check)), new()
    for match in Match:
        literal(verdict, match, checked)
    states[literal(checked, "; ")] |= states[check]  # one more; the first alone may be missing
    rule = literal(checked, "\nRule: ")
    states[check]["\n"] = states[checked]["\n"]
    digits = [new() for _ in range(RULE_DIGITS)]
    for before, after in zip([rule, *digits], digits, strict=False):
        states[before] |= dict.fromkeys("123456789" if before == rule else "0123456789", after)
    states[rule]["0"] = zero = new()
    done = literal(zero, VERDICT_LINE)
    for state in digits:
        states[state]["\n"] = states[zero]["\n"]
    states[done] = {OTHER: done}
    return states


def token_table(states: Automaton, texts: list[str]) -> np.ndarray:
    """Where each token leads from each state, int16 [S, V]; -1 where it may not come, and for tokens without text."""
    alphabet = sorted({character for state in states for character in state if character != OTHER})
    index = {character: number for number, character in enumerate(alphabet, start=1)}
    refused = len(states)  # a state of its own here, which all characters lead back to
    moves = np.full((refused + 1, len(alphabet) + 1), refused)
    for number, state in enumerate(states):
        moves[number] = [state.get(character, state.get(OTHER, refused)) for character in (OTHER, *alphabet)]
    moves[moves < 0] = refused
    found = np.full((len(states), len(texts)), refused)
    found[:, [bool(text) for text in texts]] = np.arange(len(states))[:, None]
    longest = max(map(len, texts))
    characters = np.array([[index.get(c, 0) for c in text] + [-1] * (longest - len(text)) for text in texts])
    for place in range(longest):
        here = characters[:, place] >= 0
        found[:, here] = moves[found[:, here], characters[here, place]]
    return np.where(found == refused, -1, found).astype(np.int16)


@functools.lru_cache(maxsize=4)
def explanation_table(tokenizer: Tokenizer, vocab_size: int) -> jax.Array:
    """`token_table` of `automaton` for a model's vocabulary; special tokens may not come."""
    return jnp.asarray(token_table(automaton(), tokenizer.texts(vocab_size)))
