"""BERT and GPT with cosine or softmax attention from one code base, as Hugging Face models.

Names are imported on first use (PEP 562), so a config costs no model and a model of one family none of the other.

    from cottention.models import CottentionGPTConfig, CottentionGPTForCausalLM
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cottention.models.auto import install_hooks, register_auto_classes

if TYPE_CHECKING:
    from cottention.models.bert.configuration_bert import CottentionBertConfig as CottentionBertConfig
    from cottention.models.bert.modeling_bert import CottentionBertForMaskedLM as CottentionBertForMaskedLM
    from cottention.models.bert.modeling_bert import CottentionBertForPreTraining as CottentionBertForPreTraining
    from cottention.models.bert.modeling_bert import CottentionBertModel as CottentionBertModel
    from cottention.models.bert.tasks_bert import CottentionBertForMultipleChoice as CottentionBertForMultipleChoice
    from cottention.models.bert.tasks_bert import (
        CottentionBertForNextSentencePrediction as CottentionBertForNextSentencePrediction,
    )
    from cottention.models.bert.tasks_bert import (
        CottentionBertForQuestionAnswering as CottentionBertForQuestionAnswering,
    )
    from cottention.models.bert.tasks_bert import (
        CottentionBertForSequenceClassification as CottentionBertForSequenceClassification,
    )
    from cottention.models.bert.tasks_bert import (
        CottentionBertForTokenClassification as CottentionBertForTokenClassification,
    )
    from cottention.models.cache import CosineCache as CosineCache
    from cottention.models.gpt.configuration_gpt import CottentionGPTConfig as CottentionGPTConfig
    from cottention.models.gpt.modeling_gpt import CottentionGPTForCausalLM as CottentionGPTForCausalLM
    from cottention.models.gpt.modeling_gpt import CottentionGPTModel as CottentionGPTModel
    from cottention.models.gpt.tasks_gpt import CottentionGPTForQuestionAnswering as CottentionGPTForQuestionAnswering
    from cottention.models.gpt.tasks_gpt import (
        CottentionGPTForSequenceClassification as CottentionGPTForSequenceClassification,
    )
    from cottention.models.gpt.tasks_gpt import (
        CottentionGPTForTokenClassification as CottentionGPTForTokenClassification,
    )

_HOME_OF = {
    "CosineCache": "cache",
    "CottentionBertConfig": "bert.configuration_bert",
    "CottentionBertModel": "bert.modeling_bert",
    "CottentionBertForPreTraining": "bert.modeling_bert",
    "CottentionBertForMaskedLM": "bert.modeling_bert",
    "CottentionBertForSequenceClassification": "bert.tasks_bert",
    "CottentionBertForTokenClassification": "bert.tasks_bert",
    "CottentionBertForQuestionAnswering": "bert.tasks_bert",
    "CottentionBertForMultipleChoice": "bert.tasks_bert",
    "CottentionBertForNextSentencePrediction": "bert.tasks_bert",
    "CottentionGPTConfig": "gpt.configuration_gpt",
    "CottentionGPTModel": "gpt.modeling_gpt",
    "CottentionGPTForCausalLM": "gpt.modeling_gpt",
    "CottentionGPTForSequenceClassification": "gpt.tasks_gpt",
    "CottentionGPTForTokenClassification": "gpt.tasks_gpt",
    "CottentionGPTForQuestionAnswering": "gpt.tasks_gpt",
}

__all__ = [
    "CosineCache",
    "CottentionBertConfig",
    "CottentionBertForMaskedLM",
    "CottentionBertForMultipleChoice",
    "CottentionBertForNextSentencePrediction",
    "CottentionBertForPreTraining",
    "CottentionBertForQuestionAnswering",
    "CottentionBertForSequenceClassification",
    "CottentionBertForTokenClassification",
    "CottentionBertModel",
    "CottentionGPTConfig",
    "CottentionGPTForCausalLM",
    "CottentionGPTForQuestionAnswering",
    "CottentionGPTForSequenceClassification",
    "CottentionGPTForTokenClassification",
    "CottentionGPTModel",
    "register_auto_classes",
]


def __getattr__(name: str) -> Any:
    """Import a class when it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_hooks()
