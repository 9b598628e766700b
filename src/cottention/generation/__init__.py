"""Text generation, fill-mask and sentences as people call them.

from cottention.generation import generate_text, load_model_and_tokenizer
model, tokenizer = load_model_and_tokenizer("runs/quickstart-gpt/model", "causal-lm")
print(generate_text(model, tokenizer, "My fellow Americans").texts[0])
"""

from cottention.generation.conversation import Conversation
from cottention.generation.fill_mask import Candidate, FilledText, fill_mask
from cottention.generation.loading import load_model_and_tokenizer
from cottention.generation.reading import ReadState
from cottention.generation.saved_state import load_state, read_text, save_state
from cottention.generation.sentences import embed_sentences, score_next_sentences
from cottention.generation.text import GeneratedText, GenerationResult, generate_text

__all__ = [
    "Candidate",
    "Conversation",
    "FilledText",
    "GeneratedText",
    "GenerationResult",
    "ReadState",
    "embed_sentences",
    "fill_mask",
    "generate_text",
    "load_model_and_tokenizer",
    "load_state",
    "read_text",
    "save_state",
    "score_next_sentences",
]
