"""Pairs of neighbouring sentences from the embedded speeches, as rows that a fine-tuning for similarity reads.

    python examples/speech_pairs.py sotu:train > pairs.jsonl
    python examples/speech_pairs.py sotu:validation > pairs-dev.jsonl
    cottention finetune --model runs/bert/model --objective similarity --data pairs.jsonl --dev pairs-dev.jsonl \
        --text-column sentence --text-pair-column next

A sentence is nearer in meaning to the one behind it than to others of other speeches. Any corpus of yours may stand in
place of the speeches: a file, a folder, a pattern.
"""

from __future__ import annotations

import json
import random
import sys

from cottention.data import load_corpus, sentence_documents

MIN_CHARACTERS = 40  # a shorter sentence says little


def main() -> None:
    """Print the pairs, none with a sentence in common, in a random order: a part of them is of all speeches."""
    documents = sentence_documents(load_corpus(sys.argv[1]))["sentences"]
    pairs = [pair for sentences in documents for pair in zip(sentences[::2], sentences[1::2], strict=False)]
    pairs = [pair for pair in pairs if min(map(len, pair)) >= MIN_CHARACTERS]
    random.Random(0).shuffle(pairs)
    for sentence, following in pairs:
        print(json.dumps({"sentence": sentence, "next": following}, ensure_ascii=False))


if __name__ == "__main__":
    main()
