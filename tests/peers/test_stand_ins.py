"""The parts of transformers' tests that its source distribution lacks; once it has them, they can be used."""

from __future__ import annotations

import pytest

from tests.peers import upstream
from tests.peers.unpack import unpacked_tests

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("name", [*upstream.STAND_INS, "pipelines"])
def test_the_source_distribution_lacks_what_has_a_stand_in(name: str):
    found = unpacked_tests() / name.replace(".", "/")
    assert not found.exists()
    assert not found.with_suffix(".py").exists()
