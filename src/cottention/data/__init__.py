"""Text to training batches: corpora, tokenizers, packing into windows, collators.

The names below are imported on first use: reading a corpus needs neither torch nor transformers.

    corpus = load_corpus("books/")
    tokenizer = train_tokenizer(corpus, kind="bpe", vocab_size=4096)
    windows = pack_windows(tokenize_documents(corpus, tokenizer), 512, tokenizer.eos_token_id)

    sentences = sentence_documents(corpus)                       # BERT: documents to sentences,
    pairs = sentence_pairs(sentences, tokenizer, 128)            # sentences to pairs of neighbouring segments
    corpus = open_corpus("corpora/wiki")                         # what `cottention data` wrote: kind, manifest, dataset
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cottention.data.collators import CausalCollator as CausalCollator
    from cottention.data.collators import MaskedLMCollator as MaskedLMCollator
    from cottention.data.corpus import load_corpus as load_corpus
    from cottention.data.corpus import load_default_corpus as load_default_corpus
    from cottention.data.glue import load_glue as load_glue
    from cottention.data.glue_tasks import glue_task as glue_task
    from cottention.data.packing import PackingReport as PackingReport
    from cottention.data.packing import pack_mlm_windows as pack_mlm_windows
    from cottention.data.packing import pack_windows as pack_windows
    from cottention.data.packing import packing_report as packing_report
    from cottention.data.sentences import sentence_documents as sentence_documents
    from cottention.data.sentences import sentence_pairs as sentence_pairs
    from cottention.data.shards import Corpus as Corpus
    from cottention.data.shards import is_corpus as is_corpus
    from cottention.data.shards import open_corpus as open_corpus
    from cottention.data.tokenization import tokenize_documents as tokenize_documents
    from cottention.data.tokenizer import load_tokenizer as load_tokenizer
    from cottention.data.tokenizer import train_tokenizer as train_tokenizer

_HOME_OF = {
    "CausalCollator": "collators",
    "Corpus": "shards",
    "MaskedLMCollator": "collators",
    "PackingReport": "packing",
    "is_corpus": "shards",
    "glue_task": "glue_tasks",
    "load_corpus": "corpus",
    "load_default_corpus": "corpus",
    "load_glue": "glue",
    "load_tokenizer": "tokenizer",
    "open_corpus": "shards",
    "pack_mlm_windows": "packing",
    "pack_windows": "packing",
    "packing_report": "packing",
    "sentence_documents": "sentences",
    "sentence_pairs": "sentences",
    "tokenize_documents": "tokenization",
    "train_tokenizer": "tokenizer",
}

__all__ = [
    "CausalCollator",
    "Corpus",
    "MaskedLMCollator",
    "PackingReport",
    "glue_task",
    "is_corpus",
    "load_corpus",
    "load_default_corpus",
    "load_glue",
    "load_tokenizer",
    "open_corpus",
    "pack_mlm_windows",
    "pack_windows",
    "packing_report",
    "sentence_documents",
    "sentence_pairs",
    "tokenize_documents",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
