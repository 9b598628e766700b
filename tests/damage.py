"""What happens to files behind everybody's back: one bit, or a block of zeros.

@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_noticed(harm): harm(path, random.Random(0))
"""

from __future__ import annotations

import random
from pathlib import Path


def flip_a_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def zero_some(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = chance.randrange(max(1, len(content) - 4096))
    num_bytes = len(content[start : start + 4096])
    content[start : start + num_bytes] = bytes(num_bytes)
    path.write_bytes(content)


HARMS = (flip_a_bit, zero_some)
