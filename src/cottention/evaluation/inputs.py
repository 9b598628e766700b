"""What every evaluation does before its first forward pass: text to tokens, and whether model and tokenizer fit.

tokens = as_tokens(["A text.", "Another."], tokenizer)
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.data.tokenization import tokenize_documents
from cottention.errors import DataError, SettingsError


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


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        SettingsError: they do not belong together.
    """
    num_tokens, num_embeddings = len(tokenizer), model.config.vocab_size
    if num_tokens > num_embeddings:
        raise SettingsError(
            f"tokenizer and model do not belong together: {num_tokens} tokens but {num_embeddings} embeddings"
        )
