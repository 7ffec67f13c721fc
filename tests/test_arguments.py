import math

import numpy as np
import pytest

from unime_st.arguments import require_count, require_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers(value):
    require_number("k", value, least=3)


@pytest.mark.parametrize("value", [3.0, np.float32(3.5), 10**9])
def test_numbers(value):
    require_number("k", value, least=3, whole=False)


@pytest.mark.parametrize("value", ["3", None, [3], True, np.bool_(1), 3.0, math.nan])
def test_what_is_no_whole_number(value):
    with pytest.raises(TypeError, match=r"`k=.*`, but it must be a whole number\."):
        require_number("k", value)


@pytest.mark.parametrize("value", [0, -1, math.nan, -math.inf])
def test_too_small_is_named_and_nan_is(value):
    with pytest.raises(ValueError, match=r"`k=.*`, but it must be at least 1, or None\."):
        require_number("k", value, least=1, whole=False, optional=True)
    require_number("k", None, least=1, optional=True)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_counts_are_whole_numbers(value):
    with pytest.raises(TypeError, match="must be a whole number of at least 1"):
        require_count("k", value)
    require_count("k", np.int64(3))
    with pytest.raises(ValueError, match=r"^`k=0`, but it must be at least 1\.$"):
        require_count("k", 0)


def test_numbers_are_numbers():
    require_number("margin", -3, above=-math.inf, whole=False)
    require_number("margin", np.float32(0.1), above=-math.inf, whole=False)
    for value, error in ((float("nan"), ValueError), ("0.1", TypeError), (None, TypeError), (False, TypeError)):
        with pytest.raises(error, match=r"`margin=.*`, but it must be a number\.$"):
            require_number("margin", value, above=-math.inf, whole=False)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (math.nan, ValueError), ("1", TypeError)])
def test_numbers_above_a_bound(value, error):
    with pytest.raises(error, match=r"^`patience=.*`, but it must be a number above 0\.$"):
        require_number("patience", value, above=0, whole=False)
    require_number("patience", 1e-9, above=0, whole=False)
