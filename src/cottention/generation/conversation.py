"""A text that a reader and a GPT write in turns: what was said is read once, and kept.

A cosine model keeps one state of constant size, so the tenth turn costs what the first did. A softmax model keeps the
text and reads it again at each turn, until its positions are used up.

    talk = Conversation(model, tokenizer)
    talk.read(book)                                  # as long as you like
    print(talk.ask(" The captain").texts[0])         # nothing of it is remembered
    print(talk.reply(" My name is").texts[0])        # question and answer are
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.generation.reading import ReadState, state_bytes
from cottention.generation.saved_state import read_text
from cottention.generation.text import GenerationResult, generate_text


class Conversation:
    """Goes on with one text.

    Args:
        model: a CottentionGPTForCausalLM.
        tokenizer: the model's own.
        state: of a text that was read before (`load_state`), which the conversation goes on from; cosine models only.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, state: ReadState | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._start = state
        self.state = state
        """What a cosine model knows; None before the first word, and with a softmax model."""
        self.text = ""
        """All that was said here, both sides."""

    @property
    def keeps_state(self) -> bool:
        """Whether the past is a state; else it is the text."""
        return bool(self.model.config.keeps_states)

    @property
    def num_tokens(self) -> int:
        """Tokens that the next turn goes on from."""
        if self.keeps_state:
            return 0 if self.state is None else self.state.num_tokens
        return len(self.tokenizer.encode(self.text))

    @property
    def state_bytes(self) -> int:
        """Memory of the state; 0 for a softmax model, which computes its keys and values again."""
        return 0 if self.state is None else state_bytes(self.state.cache)

    def reset(self) -> None:
        """Forget all that was said."""
        self.state, self.text = self._start, ""

    def read(self, text: str) -> None:
        """Take in a text without an answer.

        Raises:
            SettingsError, DataError: as of `read_text`.
        """
        if self.keeps_state and text:
            self.state = read_text(self.model, self.tokenizer, text, state=self.state)
        self.text += text

    def ask(self, text: str, **options: Any) -> GenerationResult:
        """Answer without remembering question or answer.

        Args:
            text: goes on from all that was read.
            **options: those of `generate_text`, without `state`.
        """
        if self.keeps_state:
            return generate_text(self.model, self.tokenizer, text, state=self.state, **options)
        return generate_text(self.model, self.tokenizer, self.text + text, **options)

    def reply(self, text: str, **options: Any) -> GenerationResult:
        """Answer, and remember both. What `stream` was given before it raised an error is not remembered.

        Args:
            text: the reader's turn; "" lets the model go on.
            **options: those of `generate_text`, without `state`.
        """
        before = self.state, self.text
        try:
            self.read(text)
            result = self.ask("", **options)
            self.read(result.texts[0])
        except BaseException:
            self.state, self.text = before
            raise
        return result
