"""From a recipe's data section to examples: corpus, held-out part and tokenizer, which its objective then cuts.

All of it is memory-mapped Arrow that `cottention.data` caches by content and settings, so that a second run on the same
text starts at once. A tokenizer trained for the run lies in its directory.

    text = prepare_text(recipe, run_dir)
    text.stream(recipe)[0], text.tokenizer, text.held_out
"""

from __future__ import annotations

from pathlib import Path

from cottention.data.tokenization import tokenize_documents
from cottention.training.corpora import corpus_tokens, token_corpus
from cottention.training.documents import check_tokenizer, open_documents, open_tokenizer
from cottention.training.objectives import PretrainingObjective, objective_of
from cottention.training.objectives.base import OpenedText
from cottention.training.objectives.base import PreparedText as PreparedText  # for those who hold one
from cottention.training.pair_text import open_pairs
from cottention.training.recipe import Recipe


def prepare_text(recipe: Recipe, run_dir: Path | None) -> PreparedText:
    """Open, split, tokenise and pack the text of a recipe. Writes nothing outside the cache of `datasets`.

    Args:
        recipe: its sections `data` and `model` (the size of a vocabulary to train).
        run_dir: the directory of a run of this recipe, whose tokenizer is taken; None trains it again.

    Raises:
        DataError: the text cannot be used, or is too short for its windows.
        SettingsError: the tokenizer does not fit the recipe.
    """
    check_tokenizer(recipe)
    objective = objective_of(recipe)
    if objective.reads_pairs:
        return objective.examples(open_pairs(objective.recipe, run_dir))
    return objective.examples(_open_tokens(objective, run_dir))


def _open_tokens(objective: PretrainingObjective, run_dir: Path | None) -> OpenedText:
    recipe = objective.recipe
    corpus = token_corpus(recipe.data.source) if objective.reads_token_corpora else None
    if corpus is not None:
        train, held_out, tokenizer = corpus_tokens(corpus, recipe.data, seed=recipe.training.seed)
        return OpenedText(tokenizer, train, held_out)
    documents, held_out_documents = open_documents(recipe.data, seed=recipe.training.seed)
    tokenizer = open_tokenizer(recipe, documents, run_dir)
    train, held_out = (tokenize_documents(each, tokenizer) for each in (documents, held_out_documents))
    return OpenedText(tokenizer, train, held_out)
