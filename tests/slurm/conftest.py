"""Two kinds of SLURM for all tests of this directory, and the marker `slurm` on each of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.cluster import Cluster, unavailable

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is here; the hook is given the items of all directories."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def needs_slurm() -> None:
    """Skip where no cluster can be had."""
    if reason := unavailable():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(needs_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two cores. Nothing is set in this process: give `cluster.env` to whom it concerns."""
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def term_cluster(needs_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The same with two GPUs a node, at a site that warns by SIGTERM alone."""
    with Cluster(tmp_path_factory.mktemp("term"), gpus=2, preempt_user_signal=False) as cluster:
        yield cluster
