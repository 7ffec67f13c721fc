"""A corpus with planted neighbours."""

import numpy as np
import pytest
from planted_rows import DIM, planted, write


@pytest.fixture
def rows():
    return planted(1500)


@pytest.fixture
def corpus(rows, tmp_path):
    return write(tmp_path / "corpus", rows)


@pytest.fixture
def queries(rows):
    return rows[:30] + 0.1 * np.random.default_rng(5).standard_normal((30, DIM)).astype(np.float32)
