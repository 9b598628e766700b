"""Tools that start a process of their own open our directories by trust_remote_code, and train and score with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.models.test_elsewhere import elsewhere

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("always")]

SENTENCES = """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({bert!r}, trust_remote_code=True)
assert model.encode(["the people", "order"]).shape == (2, 32)
model.save({bert!r} + "-saved")
again = SentenceTransformer({bert!r} + "-saved", trust_remote_code=True)
assert abs(again.encode(["the people"]) - model.encode(["the people"])).max() < 1e-6
"""
SFT = """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
settings = SFTConfig(output_dir={gpt!r} + "-run", max_steps=1, report_to=[], use_cpu=True, bf16=False, max_length=32,
                     save_strategy="no", model_init_kwargs={{"trust_remote_code": True}})
data = Dataset.from_dict({{"text": ["The people of the United States"] * 8}})
trainer = SFTTrainer(model={gpt!r}, args=settings, train_dataset=data)
trainer.train()
import cottention.models
assert type(trainer.model) is cottention.models.CottentionGPTForCausalLM
"""
REWARD = """
import torch, transformers
from datasets import Dataset
from trl import RewardConfig, RewardTrainer
model = transformers.AutoModelForSequenceClassification.from_pretrained({gpt!r}, num_labels=1, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained({gpt!r}, trust_remote_code=True)
model.config.pad_token_id = tokenizer.pad_token_id
data = Dataset.from_dict({{"chosen": ["The people order tea."] * 8, "rejected": ["of the"] * 8}})
settings = RewardConfig(output_dir={gpt!r} + "-reward", max_steps=2, report_to=[], use_cpu=True, bf16=False,
                        save_strategy="no", max_length=32)
trainer = RewardTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
assert trainer.train().training_loss > 0
"""
HARNESS = """
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained={gpt!r}, trust_remote_code=True, device="cpu", batch_size=1)
request = Instance("loglikelihood", {{}}, ("The people", " of"), 0)
assert model.loglikelihood([request])[0][0] < 0
"""


@pytest.mark.parametrize("script", [SENTENCES, SFT, REWARD, HARNESS], ids=["sentences", "sft", "reward", "harness"])
def test_a_client_opens_a_directory_by_itself(script: str, tmp_path: Path) -> None:
    gpt, bert = tmp_path / "gpt", tmp_path / "bert"
    tiny.save(gpt, tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())
    tiny.save(bert, tiny.bert(dtype=torch.float32), tiny.wordpiece_tokenizer())
    done = elsewhere(script.format(gpt=str(gpt), bert=str(bert)), tmp_path / "cache")
    assert done.returncode == 0, done.stderr
