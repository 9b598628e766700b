"""Text that a person gave, to tokens.

token_ids = encode(tokenizer, "My fellow Americans", "the prompt")
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from cottention.errors import DataError


def encode(tokenizer: PreTrainedTokenizerBase, text: str, which: str) -> list[int]:
    """Tokens of a text, with the special tokens that its tokenizer adds.

    Args:
        tokenizer: the model's own.
        text: any text; what spells a special token becomes that token.
        which: the text's name in a message.

    Raises:
        DataError: it is no text. Bytes of an argument that are not UTF-8 come as code points that no text has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{which} is not valid Unicode text (character {error.start})") from error
    return tokenizer(text, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]
