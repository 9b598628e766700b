"""What every evaluation does before its first forward pass: text to tokens.

tokens = as_tokens(["A text.", "Another."], tokenizer)
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cottention.data.tokenization import tokenize_documents
from cottention.errors import DataError


def as_tokens(documents: Dataset | Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenise a corpus or a list of texts; pass through what is tokenised already.

    Raises:
        DataError: there is no text.
    """
    if not isinstance(documents, Dataset):
        documents = Dataset.from_dict({"text": [text for text in documents if text]})
    if not len(documents):
        raise DataError("there is no text to score")
    return documents if "input_ids" in documents.column_names else tokenize_documents(documents, tokenizer)
