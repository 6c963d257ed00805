"""Fixtures and settings every test shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from tests.harness import SEED_SHIFT, RankPool, shifted

# the same examples on every machine and every run: a failure is a failure of the code, never of the draw
settings.register_profile(
    "fixed", derandomize=not SEED_SHIFT, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fixed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Other seeds, other examples: hypothesis takes its seed as an option."""
    if SEED_SHIFT and config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(SEED_SHIFT)


# tests are many small problems, often beside ranks on the same cores: threads would cost more than they give
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """What a test draws without a generator of its own depends on no test before it; nor does a group it makes."""
    torch.manual_seed(shifted(0))
    before = dist.is_initialized()
    yield
    assert dist.is_initialized() == before, "a test left its process group to those after it"


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Eight ranks with sub-groups of 1, 2, 3 and 4, shared by the whole session."""
    ranks = RankPool()
    yield ranks
    ranks.close()
