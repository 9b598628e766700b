"""Text that a person gave, to tokens.

token_ids = encode(tokenizer, "My fellow Americans", "the prompt")
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from cottention.data.readers import blocks_of
from cottention.errors import DataError


def encode(tokenizer: PreTrainedTokenizerBase, text: str, which: str, *, add_special_tokens: bool = True) -> np.ndarray:
    """Tokens of a text as int32, block by block: while it works, a tokenizer holds a hundred bytes and more per token.

    Args:
        tokenizer: the model's own.
        text: any text; what spells a special token becomes that token.
        which: the text's name in a message.
        add_special_tokens: whether to add what the tokenizer puts around a text.

    Raises:
        DataError: it is no text. Bytes of an argument that are not UTF-8 come as code points that no text has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{which} is not valid Unicode text (character {error.start})") from error
    blocks = list(blocks_of(text))
    if len(blocks) == 1:
        return _ids_of(tokenizer, text, add_special_tokens)
    before, behind = _around(tokenizer) if add_special_tokens else ([], [])
    inside = (_ids_of(tokenizer, block, False) for block in blocks)
    return np.concatenate([np.array(before, dtype=np.int32), *inside, np.array(behind, dtype=np.int32)])


def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> np.ndarray:
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that come before and behind every text."""
    bare = _ids_of(tokenizer, "a", False).tolist()
    whole = _ids_of(tokenizer, "a", True).tolist()
    begin = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:begin], whole[begin + len(bare) :]
