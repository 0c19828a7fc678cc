"""Fixtures of the SLURM tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import missing_programs, slurm_cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of two nodes: the environment of its commands."""
    missing = missing_programs()
    if missing:
        message = f"SLURM is not installed ({', '.join(missing)}); Debian: slurm-wlm"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment
