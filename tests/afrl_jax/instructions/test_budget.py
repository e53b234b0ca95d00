"""What calls may cost: set aside before, booked after, remembered by the next process."""

import concurrent.futures
import time

import pytest

from afrl_jax.instructions.budget import Budget, BudgetExceeded, Limits, Spent


def test_what_a_call_did_not_use_is_free_again():
    budget = Budget(Limits(calls=10, tokens=100))
    reserved = budget.reserve(40, 20)
    with pytest.raises(BudgetExceeded, match="budget of tokens: the next call may take 101, 100 of 100 are left"):
        budget.reserve(100, 1)
    budget.settle(reserved, Spent(1, 25))
    assert budget.spent == Spent(1, 25)
    with pytest.raises(BudgetExceeded, match="may take 76, 75 of 100 are left"):
        budget.reserve(75, 1)
    budget.reserve(75, 0)


def test_what_calls_under_way_set_aside_is_waited_for():
    """Each may take 60 of 100 tokens and takes 20: five calls fit, whatever happens at once."""
    budget = Budget(Limits(tokens=140))

    def call(_):
        reserved = budget.reserve(40, 20)
        time.sleep(0.01)
        budget.settle(reserved, Spent(1, 20))

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        list(pool.map(call, range(5)))
    assert budget.spent == Spent(5, 100)


def test_a_call_under_way_at_a_kill_counts_in_full(tmp_path):
    Budget(Limits(), tmp_path / "spent.json").reserve(5, 5)
    assert Budget(Limits(), tmp_path / "spent.json").spent == Spent(1, 10)


def test_a_call_of_unknown_cost_costs_what_was_set_aside():
    budget = Budget(Limits(prompt_price=2.0, completion_price=10.0))
    budget.settle(budget.reserve(1_000_000, 100_000))
    assert budget.spent == Spent(1, 1_100_000, 3.0)


@pytest.mark.parametrize(
    ("limits", "name"),
    [(Limits(calls=1), "calls"), (Limits(tokens=15), "tokens"), (Limits(money=1.5, prompt_price=1e5), "money")],
)
def test_each_limit_holds(limits, name):
    budget = Budget(limits)
    budget.settle(budget.reserve(10, 0))
    with pytest.raises(BudgetExceeded, match=f"budget of {name}"):
        budget.reserve(10, 0)


def test_many_threads_never_pass_the_limit():
    budget = Budget(Limits(calls=50))

    def call(_):
        try:
            budget.settle(budget.reserve(1, 1), Spent(1, 2))
        except BudgetExceeded:
            return 0
        return 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(call, range(200))) == 50
    assert budget.spent == Spent(50, 100)


def test_the_ledger_outlives_the_process(tmp_path):
    ledger = tmp_path / "new" / "spent.json"
    first = Budget(Limits(calls=2), ledger)
    first.settle(first.reserve(5, 5), Spent(1, 7))
    second = Budget(Limits(calls=2), ledger)
    assert second.spent == Spent(1, 7)
    assert second.describe() == "calls 1 of 2, tokens 7 of 2,000,000"
    second.settle(second.reserve(5, 5))
    with pytest.raises(BudgetExceeded):
        Budget(Limits(calls=2), ledger).reserve(1, 1)
