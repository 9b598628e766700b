"""sentence-transformers opens a saved BERT as it stands, and trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from cottention.models import CottentionBertForSequenceClassification, CottentionBertModel
from tests import tiny
from tests.models.helpers import ATTENTION_TYPES, bert_config
from tests.peers import clients

losses: Any = pytest.importorskip("sentence_transformers.losses", reason="`make test-peers` installs it")
st: Any = pytest.importorskip("sentence_transformers", reason="`make test-peers` installs it")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

_SENTENCES = ["the people", "in order to form a more perfect Union of the United States", "people of the Union", "form"]


def _saved(directory: Path, attention_type: str, kind: Any = CottentionBertModel, **settings: Any) -> str:
    tokenizer = tiny.wordpiece_tokenizer()
    tokenizer.model_max_length = 64
    model = kind(bert_config(attention_type, vocab_size=len(tokenizer), **settings))
    return str(clients.saved(directory, model, tokenizer))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_batch_is_encoded_as_each_sentence_alone(attention_type: str, tmp_path: Path):
    model = st.SentenceTransformer(_saved(tmp_path, attention_type), device="cpu", trust_remote_code=True)
    assert model.max_seq_length == 64
    together = model.encode(_SENTENCES)
    alone = np.stack([model.encode(sentence) for sentence in _SENTENCES])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    bert = CottentionBertModel.from_pretrained(tmp_path).eval()
    ids = tiny.wordpiece_tokenizer()(_SENTENCES[0], return_tensors="pt")
    mean = bert(**ids).last_hidden_state.mean(1).detach().numpy()
    np.testing.assert_allclose(together[:1], mean, atol=1e-5)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_training_and_saving(attention_type: str, tmp_path: Path):
    model = st.SentenceTransformer(_saved(tmp_path / "bert", attention_type), device="cpu", trust_remote_code=True)
    before = model.encode(_SENTENCES)
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"), max_steps=5, learning_rate=1e-3, use_cpu=True, report_to="none", save_strategy="no"
        ),
        train_dataset=Dataset.from_dict({"anchor": _SENTENCES, "positive": _SENTENCES[1:] + _SENTENCES[:1]}),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    after = model.encode(_SENTENCES)
    assert np.abs(after - before).max() > 1e-4
    model.save_pretrained(str(tmp_path / "trained"))
    again = st.SentenceTransformer(str(tmp_path / "trained"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(again.encode(_SENTENCES), after, atol=1e-5)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_cross_encoder_scores_pairs(attention_type: str, tmp_path: Path):
    directory = _saved(tmp_path, attention_type, CottentionBertForSequenceClassification, num_labels=1)
    model = st.CrossEncoder(directory, device="cpu", trust_remote_code=True)
    pairs = [(_SENTENCES[0], _SENTENCES[1]), (_SENTENCES[2], _SENTENCES[3])]
    together = model.predict(pairs)
    np.testing.assert_allclose(together, np.concatenate([model.predict([pair]) for pair in pairs]), atol=1e-5)
    ids = tiny.wordpiece_tokenizer()(*pairs[0], return_tensors="pt")
    bert = CottentionBertForSequenceClassification.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(together[0], torch.sigmoid(bert(**ids).logits).item(), atol=1e-5)
