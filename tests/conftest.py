"""Fixtures and settings every test shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.harness import RankPool

# the same examples on every machine and every run: a failure is a failure of the code, never of the draw
settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fixed")

# tests are many small problems, often beside ranks on the same cores: threads would cost more than they give
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Eight ranks with sub-groups of 1, 2, 3 and 4, shared by the whole session."""
    ranks = RankPool()
    yield ranks
    ranks.close()
