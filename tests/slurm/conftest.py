"""Fixtures of the SLURM tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_programs, write_profile


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes, for the whole session."""
    missing = missing_programs()
    if missing:
        message = f"SLURM is not installed ({', '.join(missing)}); Debian: slurm-wlm"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with all its nodes up and no jobs, before the test and after it."""
    yield running_cluster
    running_cluster.heal()


@pytest.fixture
def slurm(cluster: Cluster) -> dict[str, str]:
    """The environment of the cluster's commands."""
    return cluster.environment


@pytest.fixture
def test_site(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's site profile that describes the cluster."""
    write_profile(tmp_path / "config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return "test"
