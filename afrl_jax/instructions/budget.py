"""What calls of a language model may cost, told before the first one and enforced before each.

A call reserves the most it can cost, and is settled with what it did cost. The ledger lies on disk, so a run that was
killed and started again spends what is left, not the whole sum once more.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path

from lm_jax.run_folder import write_atomically


class BudgetExceeded(RuntimeError):
    """The next call could cost more than what is left."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What may be spent: calls (attempts count), tokens of prompts and answers, and money at the given prices."""

    calls: int = 1000
    tokens: int = 2_000_000
    money: float = math.inf
    prompt_price: float = 0.0  # of a million tokens, in the unit of `money`
    completion_price: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Money for so many tokens."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6


@dataclasses.dataclass(frozen=True)
class Spent:
    """Calls, tokens and money, spent or reserved."""

    calls: int = 0
    tokens: int = 0
    money: float = 0.0

    def plus(self, other: Spent, sign: int = 1) -> Spent:
        """The sum, or with sign -1 the difference."""
        return Spent(
            self.calls + sign * other.calls, self.tokens + sign * other.tokens, self.money + sign * other.money
        )


class Budget:
    """Keeps calls within limits, from many threads at once.

    Args:
        ledger: a JSON file that remembers what was spent; None forgets it with the process.
    """

    def __init__(self, limits: Limits, ledger: Path | None = None):
        self.limits, self._ledger, self._changed = limits, ledger, threading.Condition()
        self.spent = Spent(**json.loads(ledger.read_text())) if ledger and ledger.exists() else Spent()
        self._reserved = Spent()

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> Spent:
        """Set aside the most that one call can cost; `settle` must follow, from the same thread. Where calls under way
        have set aside what is left, it waits for what they leave.

        Raises:
            BudgetExceeded: what is spent leaves less; names the limit and what is left.
        """
        tokens = prompt_tokens + completion_tokens
        asked = Spent(1, tokens, self.limits.cost(prompt_tokens, completion_tokens))
        with self._changed:
            self._changed.wait_for(lambda: not self._short_of(asked, self.spent.plus(self._reserved))
                                   or self._short_of(asked, self.spent))  # fmt: skip
            if name := self._short_of(asked, self.spent):
                wanted, limit, used = (getattr(some, name) for some in (asked, self.limits, self.spent))
                raise BudgetExceeded(
                    f"budget of {name}: the next call may take {wanted:g}, {limit - used:g} of {limit:g} are left"
                )
            self._reserved = self._reserved.plus(asked)
            self._write()
        return asked

    def _short_of(self, asked: Spent, used: Spent) -> str:
        """The name of the first limit that the call would pass, "" of none."""
        names = (field.name for field in dataclasses.fields(Spent))
        passes = (name for name in names if getattr(used.plus(asked), name) > getattr(self.limits, name))
        return next(passes, "")

    def settle(self, reserved: Spent, actual: Spent | None = None) -> None:
        """Book what the call cost; where nobody knows (a timeout, a cut connection), all that was set aside."""
        with self._changed:
            self._reserved = self._reserved.plus(reserved, -1)
            self.spent = self.spent.plus(actual or reserved)
            self._write()
            self._changed.notify_all()

    def _write(self) -> None:
        """Calls under way count as spent: nobody knows what they cost where the process is killed."""
        if self._ledger:
            self._ledger.parent.mkdir(parents=True, exist_ok=True)
            held = self.spent.plus(self._reserved)
            write_atomically(self._ledger, json.dumps(dataclasses.asdict(held)) + "\n")

    def describe(self) -> str:
        """One line for the person who is to agree."""
        limits, spent = self.limits, self.spent
        money = f", money {spent.money:.4f} of {limits.money:g}" if math.isfinite(limits.money) else ""
        return f"calls {spent.calls:,} of {limits.calls:,}, tokens {spent.tokens:,} of {limits.tokens:,}{money}"
