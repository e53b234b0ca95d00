import pytest

from afrl_jax.data.grade_mapping import GradeMapping
from afrl_jax.schema import Scale

SCALE = Scale(("0", "1", "2"))
WORDS = {"grades": ("bad", "fair", "good")}
MERGED = {"grades": (["-2", "0"], 1, [2, 3])}
NEAREST = {"grades": (1, 2, 3), "thresholds": (1.5, 2.5)}


@pytest.mark.parametrize(
    ("declared", "raw", "index"),
    [
        ({}, 1.0, 1),
        ({}, "2", 2),
        ({}, " 2.0", 2),
        ({"grades": (1, 2, 3)}, 1, 0),
        (WORDS, "good", 2),
        (MERGED, -2, 0),
        (MERGED, "3", 2),
        (NEAREST, 1, 0),
        (NEAREST, 1.33, 0),
        (NEAREST, 1.5, 1),
        (NEAREST, "2.33", 1),
        (NEAREST, 3, 2),
        ({"grades": (1, 2, 3), "thresholds": (2.0, 3.0)}, 2.67, 1),
    ],
)
def test_a_raw_grade_becomes_its_index_on_the_scale(declared, raw, index):
    assert GradeMapping(SCALE, **declared).index(raw) == index


@pytest.mark.parametrize(
    ("declared", "raw", "allowed"),
    [
        ({}, 3, "0, 1, 2"),
        ({}, 1.5, "0, 1, 2"),
        ({}, True, "0, 1, 2"),
        ({}, "nan", "0, 1, 2"),
        ({}, float("nan"), "0, 1, 2"),
        ({}, 10**400, "0, 1, 2"),
        ({}, [1], "0, 1, 2"),
        (WORDS, "Good", "bad, fair, good"),
        (NEAREST, 3.01, "a number from 1 to 3"),
        (NEAREST, 0.99, "a number from 1 to 3"),
        (NEAREST, "high", "a number from 1 to 3"),
        (NEAREST, float("nan"), "a number from 1 to 3"),
    ],
)
def test_a_grade_off_the_scale_names_the_allowed_ones(declared, raw, allowed):
    with pytest.raises(ValueError, match="is not on the scale") as caught:
        GradeMapping(SCALE, **declared).index(raw)
    assert str(caught.value) == f"{raw!r} is not on the scale; allowed: {allowed}"


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"grades": (1, 2)}, "grades: must name the raw grades of each of the 3 labels"),
        ({"grades": "012"}, "grades: must name the raw grades"),
        ({"grades": (1, 2, "1.0")}, "grades: '1.0' is named twice"),
        ({"thresholds": (1.5,)}, "thresholds: must be 2 ascending cuts"),
        ({"thresholds": (2, 1)}, "thresholds: must be 2 ascending cuts"),
        (WORDS | {"thresholds": (1, 2)}, "thresholds: need grades that are numbers"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(declared, message):
    with pytest.raises(ValueError, match=message):
        GradeMapping(SCALE, **declared)
