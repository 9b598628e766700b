"""What AutoTokenizer opens beside one of our models where no file names a tokenizer class: the files themselves say.

The models take any tokenizer. A tokenizer.json is one as it stands; stock rows would build it anew from its vocabulary
with the class's own settings, and lose its case.

    AutoTokenizer.from_pretrained("runs/mine/model")      # by `ModelTokenizer`, registered in `models/auto.py`
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

_PLACE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class ModelTokenizer:
    """The row of both model types in AutoTokenizer's table."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *inputs: Any, **kwargs: Any) -> Any:
        """Open tokenizer.json, else BERT's vocab.txt, else GPT-2's vocab.json and merges.txt.

        Raises:
            ValueError: there is none of them.
        """
        from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

        source = os.fspath(pretrained_model_name_or_path)
        kind: Any = PreTrainedTokenizerFast
        place = {name: kwargs[name] for name in _PLACE if name in kwargs}
        if _file(source, "tokenizer.json", place) is None:
            vocab = _file(source, "vocab.txt", place)
            if vocab is not None:
                kind = BertTokenizer
                if "do_lower_case" not in {**get_tokenizer_config(source, **place), **kwargs}:
                    kwargs["do_lower_case"] = not _has_capitals(vocab)
            elif _file(source, "vocab.json", place) is not None:
                kind = GPT2Tokenizer
        return kind.from_pretrained(source, *inputs, **kwargs)


def _file(source: str, name: str, place: dict[str, Any]) -> str | None:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **place)


def _has_capitals(vocab: str) -> bool:
    """Whether a vocabulary was made from text in its own case; [CLS] and its like say nothing of it."""
    tokens = Path(vocab).read_text(encoding="utf-8").splitlines()
    return any(token != token.lower() for token in tokens if not token.startswith("["))
