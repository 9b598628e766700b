"""Documents to sentences to pairs: neighbours of one document, within the length, the same on every machine."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from cottention.data import load_corpus, load_tokenizer, sentence_documents, sentence_pairs, train_tokenizer
from cottention.data.encoding import plain_tokenizer
from cottention.data.pairing import PAIRS, Pairing, pair_rows
from cottention.data.sentences import described_tokenizer
from cottention.errors import CottentionError
from tests import tiny
from tests.data.helpers import refusal

NUM_DOCUMENTS = 60


def synthetic(seed: int = 0) -> list[list[str]]:
    """Documents of sentences in which every word tells document and place, so that a wrong neighbour shows."""
    rng = np.random.default_rng(seed)
    documents = []
    for document in range(NUM_DOCUMENTS):
        lengths = rng.integers(1, 30, size=rng.integers(1, 25))
        words = (f"D{document}w{number}" for number in itertools.count())
        documents.append([" ".join(itertools.islice(words, length)).capitalize() + "." for length in lengths])
    return documents


def word_tokenizer(documents: list[list[str]]):
    """One token per word and mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: None for sentences in documents for s in sentences for word in s.replace(".", " .").split()}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ("pad", "unk", "cls", "sep", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in zip(names, special, strict=True)}
    )


def rows_of(documents: list[list[str]]) -> Dataset:
    return Dataset.from_dict({"document": range(len(documents)), "sentences": documents})


def text_of(documents: list[list[str]]) -> Dataset:
    return Dataset.from_dict({"text": [" ".join(sentences) for sentences in documents]})


def pairs_of(sentences: Any, tokenizer: Any, max_length: int, **settings: Any) -> Any:
    """`sentence_pairs`, with rows that a type checker takes for anything."""
    return sentence_pairs(sentences, tokenizer, max_length, **settings)


def check_pairs(pairs: Any, sentences: Any, tokenizer: Any, max_length: int) -> None:
    """Every pair is one stretch of its document's tokens, in order and without overlap, with the boundary inside."""
    streams: dict[int, list[list[int]]] = {}
    for row in sentences:
        ids = tokenizer(row["sentences"], add_special_tokens=False)["input_ids"]
        streams.setdefault(row["document"], []).append([token for sentence in ids for token in sentence])
    places = {document: iter([bytes(np.array(ids, np.int32)) for ids in parts]) for document, parts in streams.items()}
    current = {document: (next(parts), 0) for document, parts in places.items()}
    for pair in pairs:
        first, second, document = pair["first"], pair["second"], pair["document"]
        assert first
        assert second
        assert len(first) + len(second) + 3 <= max_length
        needle = np.array([*first, *second], np.int32).tobytes()
        stream, start = current[document]
        while (at := stream.find(needle, start)) < 0:
            stream, start = next(places[document]), 0  # a StopIteration: not the text of this document
        current[document] = (stream, at + len(needle))


@pytest.mark.parametrize("segments", ["filled", "sentence"])
@pytest.mark.parametrize("max_length", [8, 32, 128])
def test_no_pair_crosses_documents(segments, max_length):
    documents = synthetic()
    tokenizer: Any = word_tokenizer(documents)
    pairs = pairs_of(rows_of(documents), tokenizer, max_length, segments=segments)
    check_pairs(pairs, rows_of(documents), tokenizer, max_length)
    owner = {token: int(word[1:].partition("w")[0]) for word, token in tokenizer.get_vocab().items() if "w" in word}
    for pair in pairs:
        owners = {owner[token] for token in pair["first"] + pair["second"] if token in owner}
        assert owners <= {pair["document"]}
    with_pairs = {pair["document"] for pair in pairs}
    assert {number for number, sentences in enumerate(documents) if len(sentences) > 1} <= with_pairs


def test_no_pair_crosses_documents_in_real_text(shared_dir):
    corpus: Any = load_corpus(shared_dir / "data/lm/wiki_vital").select(range(1500))
    tokenizer = load_tokenizer(shared_dir / "data/tokenizers/bert-base-cased")
    sentences: Any = sentence_documents(corpus)
    pairs = pairs_of(sentences, tokenizer, 128)
    check_pairs(pairs, sentences, tokenizer, 128)
    assert len(pairs) > len(sentences)
    for row in sentences.select(range(0, len(sentences), 50)):
        text = " ".join(corpus[row["document"]]["text"].split())
        assert all(sentence in text for sentence in row["sentences"])


def test_counts_add_up():
    documents = synthetic()
    tokenizer = plain_tokenizer(described_tokenizer(word_tokenizer(documents), ()))
    for segments, max_length in itertools.product(("filled", "sentence"), (8, 20, 64)):
        pairing = Pairing(max_length=max_length, segments=segments, seed=0)
        table, counts = pair_rows(rows_of(documents).data.table, tokenizer, first_row=0, pairing=pairing)
        kept = sum(len(row["first"]) + len(row["second"]) for row in table.to_pylist())
        dropped = counts["tokens_dropped_trimmed"] + counts["tokens_dropped_no_partner"]
        assert counts["tokens_kept"] == kept
        assert counts["tokens"] == kept + dropped
        assert counts["pairs"] == len(table)
        assert counts["rows"] == len(documents)
        assert counts["sentences"] == sum(map(len, documents))
        assert (counts["sentences_cut"] > 0) == (segments == "filled" and max_length < 32)


def test_filled_pairs_are_full_and_a_tenth_is_shorter():
    sentence = "One two three four five six seven eight nine."
    documents = [[sentence] * 4000]
    tokenizer: Any = word_tokenizer(documents)
    pairs = pairs_of(rows_of(documents), tokenizer, 128)
    lengths = np.array([len(pair["first"]) + len(pair["second"]) for pair in pairs])
    assert lengths.max() == 120  # of 125: twelve whole sentences of ten tokens
    assert 0.05 < (lengths < 120).mean() < 0.16
    middles = np.array([len(pair["first"]) for pair in pairs])[lengths == 120]
    assert set(middles % 10) == {0}  # between sentences
    assert set(middles) == set(range(10, 120, 10))
    assert lengths.sum() >= 40000 - 10


def test_one_sentence_each():
    documents = [["One two.", "Three four five.", "Six.", "Seven eight.", "Nine."]]
    tokenizer: Any = word_tokenizer(documents)
    pairs = pairs_of(rows_of(documents), tokenizer, 128, segments="sentence")
    spelled = [(tokenizer.decode(pair["first"]), tokenizer.decode(pair["second"])) for pair in pairs]
    assert spelled == [("One two .", "Three four five ."), ("Six .", "Seven eight .")]


def test_sentences_that_do_not_fit_keep_their_inner_ends():
    documents = [
        [" ".join(f"a{n}" for n in range(40)), " ".join(f"b{n}" for n in range(50))],
        ["c.", " ".join(["d"] * 90)],
    ]
    tokenizer: Any = word_tokenizer(documents)
    pairs = pairs_of(rows_of(documents), tokenizer, 33, segments="sentence")
    assert tokenizer.decode(pairs[0]["first"]).split() == [f"a{n}" for n in range(25, 40)]
    assert tokenizer.decode(pairs[0]["second"]).split() == [f"b{n}" for n in range(15)]
    assert [len(pairs[1]["first"]), len(pairs[1]["second"])] == [2, 28]


def test_a_sentence_longer_than_a_pair_is_cut_and_nothing_of_it_lost():
    documents = [[" ".join(f"a{n}" for n in range(200))]]
    tokenizer: Any = word_tokenizer(documents)
    pairs = pairs_of(rows_of(documents), tokenizer, 33)
    assert sum(len(pair["first"]) + len(pair["second"]) for pair in pairs) == 200


def test_text_that_spells_a_special_token_stays_text():
    documents = [["Here is [SEP] as text.", "And [MASK] too."]]
    tokenizer: Any = tiny.wordpiece_tokenizer()
    pair = pairs_of(rows_of(documents), tokenizer, 64)[0]
    assert not {tokenizer.sep_token_id, tokenizer.mask_token_id} & {*pair["first"], *pair["second"]}


def test_processes_and_batches_do_not_change_the_result(tmp_path, monkeypatch):
    documents = synthetic()
    tokenizer: Any = word_tokenizer(documents)
    monkeypatch.setattr("cottention.data.sentences._TASK_CHARACTERS", 400)
    sentences: dict[Any, Any] = {}
    pairs: dict[Any, Any] = {}
    for num_proc, batch in ((None, 1 << 22), (2, 1 << 10)):
        monkeypatch.setattr("cottention.data.tokenization._BATCH_BYTES", batch)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / str(num_proc))
        sentences[num_proc] = sentence_documents(text_of(documents), num_proc=num_proc)
        pairs[num_proc] = pairs_of(sentences[num_proc], tokenizer, 32, num_proc=num_proc)
    assert sentences[None]["sentences"][:] == sentences[2]["sentences"][:]
    assert sentences[None]["document"][:] == sentences[2]["document"][:]
    for name in PAIRS.names:
        assert pairs[None][name][:] == pairs[2][name][:]


def test_another_seed_cuts_elsewhere_and_the_same_does_not():
    documents = synthetic()
    tokenizer: Any = word_tokenizer(documents)
    first, again, other = (pairs_of(rows_of(documents), tokenizer, 64, seed=seed) for seed in (1, 1, 2))
    assert first._fingerprint == again._fingerprint != other._fingerprint
    assert first["first"][:] == again["first"][:] != other["first"][:]


def test_the_cache_is_used(monkeypatch):
    documents = text_of(synthetic())
    before = sentence_documents(documents)
    monkeypatch.setattr("cottention.data.splitting.sentences_of", None)
    assert sentence_documents(documents)._fingerprint == before._fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 7}, "max_length must be at least 8; got 7"),
        ({"segments": "sentences"}, "segments must be filled or sentence; got 'sentences'; did you mean 'sentence'?"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"num_proc": 0}, "num_proc must be at least 1; got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    rows = rows_of([["One.", "Two."]])
    with pytest.raises(CottentionError) as error:
        sentence_pairs(rows, tiny.wordpiece_tokenizer(), **{"max_length": 128, **settings})
    assert refusal(error) == message


def test_a_tokenizer_without_the_special_tokens_is_refused():
    with pytest.raises(CottentionError) as error:
        sentence_pairs(rows_of([["One.", "Two."]]), tiny.bpe_tokenizer(), 128)
    assert refusal(error) == "the tokenizer has no cls_token, sep_token, mask_token, which this kind of training needs"


def test_datasets_of_another_kind_are_refused():
    tokenizer: Any = tiny.wordpiece_tokenizer()
    with pytest.raises(CottentionError) as error:
        sentence_pairs(Dataset.from_dict({"text": ["One. Two."]}), tokenizer, 128)
    assert refusal(error) == "pairs are made of the columns 'document' and 'sentences'; 'document' is not in 'text'"
    with pytest.raises(CottentionError) as error:
        sentence_pairs(rows_of([["One alone."]]), tokenizer, 128)
    assert refusal(error) == "the corpus has no two neighbouring sentences, so there are no pairs"
    with pytest.raises(CottentionError) as error:
        sentence_documents(Dataset.from_dict({"text": ["One alone."]}))
    assert refusal(error) == "the corpus has no document of at least 2 sentences"
    with pytest.raises(CottentionError, match="min_sentences must be at least 1"):
        sentence_documents(Dataset.from_dict({"text": ["One. Two."]}), min_sentences=0)


def test_a_trained_tokenizer_serves_too():
    documents = synthetic()
    tokenizer = train_tokenizer(text_of(documents), kind="wordpiece", vocab_size=120)
    pairs = pairs_of(sentence_documents(text_of(documents)), tokenizer, 128)
    assert len(pairs) > NUM_DOCUMENTS


def test_what_was_left_out_is_said_in_words(log_lines):
    documents = [["One thing is here.", "Another one is there."], ["One thing is here.", "1918!"], []]
    sentences = sentence_documents(text_of(documents))
    sentence_pairs(sentences, word_tokenizer(documents), 16)
    first, second = log_lines
    assert first == (
        "2 sentences of 1 document; left out: 1 document without a sentence, 1 document of too few sentences, "
        "1 sentence without a letter"
    )
    assert second == "1 pair of 2 sentences, 10 tokens"
