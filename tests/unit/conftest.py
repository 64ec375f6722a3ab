from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import group_of_one


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For students that are trained in this process."""
    with group_of_one(tmp_path_factory.mktemp("store")):
        yield
