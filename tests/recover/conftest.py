"""One case that the tests of this room share."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from tests.recover.cases import Case, make_case


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("recover"))
