"""What a quickstart says about its model: scores on held-out text beside those of counting, and what the model does.

model, tokenizer = open_model(recipe, "runs/quickstart-gpt/model")
score(recipe, model, tokenizer)["model"]["nats_per_byte"]
try_out(model, tokenizer, seed=0, on_text=print)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.data.tokenization import tokenize_documents
from cottention.evaluation import BigramModel, TrigramModel, UnigramModel, evaluate_masked_lm, evaluate_perplexity
from cottention.generation import fill_mask, generate_text, load_model_and_tokenizer
from cottention.logging import get_logger
from cottention.training.documents import open_documents
from cottention.training.recipe import Recipe

PROMPT = "My fellow citizens"
MASKED = (
    "The people of the United [MASK] are at peace.",
    "I ask the [MASK] to pass this bill.",
    "We have to [MASK] the budget this year.",
    "We are at [MASK] with all nations.",
)
_NEW_TOKENS = 160
_CANDIDATES = 3

logger = get_logger(__name__)


def open_model(recipe: Recipe, model_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open the finished model as every other command does."""
    return load_model_and_tokenizer(model_dir, "causal-lm" if recipe.arch == "gpt" else "masked-lm")


def score(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float | int | str]]:
    """Score the model and its baselines on all of the held-out text.

    Args:
        recipe: names the text.
        model: the trained model.
        tokenizer: its tokenizer.

    Returns:
        For a GPT the figures of `evaluate_perplexity` as "model", and as "unigram", "bigram" and "trigram" those of
        models that count the training text; for a BERT the figures of `evaluate_masked_lm` as "model", its baseline
        among them.
    """
    logger.info("scoring the model on all of the held-out text")
    train, held_out = open_documents(recipe.data, seed=recipe.training.seed)
    bars: Any = {"show_progress": sys.stderr.isatty()}
    if recipe.arch == "bert":
        data: Any = recipe.data
        window, share = data.sequence_length, data.mlm_probability
        masked = evaluate_masked_lm(model, tokenizer, held_out, window=window, mlm_probability=share, **bars)
        return {"model": masked.to_dict()}
    tokens, held_out_tokens = tokenize_documents(train, tokenizer), tokenize_documents(held_out, tokenizer)
    sizes: Any = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    scores = {
        "unigram": UnigramModel.fit(tokens, **sizes).score(held_out_tokens),
        "bigram": BigramModel.fit(tokens, **sizes).score(held_out_tokens),
        "trigram": TrigramModel.fit(tokens, **sizes).score(held_out_tokens),
        "model": evaluate_perplexity(model, tokenizer, held_out_tokens, context=model.config.n_positions, **bars),
    }
    return {name: figures.to_dict() for name, figures in scores.items()}


def try_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    on_text: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    """Let a GPT write, or a BERT fill masks.

    Args:
        model: the trained model.
        tokenizer: its tokenizer.
        seed: decides the text.
        on_text: called with the prompt and with each new piece of text.

    Returns:
        One text (prompt, text, num_new_tokens, tokens_per_s, state_bytes), or several with a mask (text, best_text,
        candidates: the likeliest tokens with their probability).
    """
    if tokenizer.mask_token is not None:
        return [
            {
                "text": filled.text,
                "best_text": filled.best_text,
                "candidates": [{"token": one.token, "probability": one.probability} for one in filled.masks[0]],
            }
            for filled in fill_mask(model, tokenizer, MASKED, _CANDIDATES)
        ]
    num_new_tokens = _NEW_TOKENS
    if model.config.attention_type == "softmax":
        num_read = len(tokenizer(PROMPT)["input_ids"])  # pyright: ignore[reportArgumentType]
        num_new_tokens = min(num_new_tokens, model.config.n_positions - num_read)
    if on_text is not None:
        on_text(PROMPT)
    written = generate_text(model, tokenizer, PROMPT, max_new_tokens=num_new_tokens, seed=seed, stream=on_text)
    return [
        {
            "prompt": PROMPT,
            "text": written.texts[0],
            "num_new_tokens": written.num_new_tokens,
            "tokens_per_s": round(written.tokens_per_s, 1),
            "state_bytes": written.state_bytes,
        }
    ]
