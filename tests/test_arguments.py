import math

import numpy as np
import pytest

from unime_st.arguments import require_number


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
