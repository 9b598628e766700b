"""Checkpoints of the published research code and of stock softmax models, turned into ours.

from cottention.convert import convert_official, convert_softmax
print(convert_official("Cosine_Attention_BERT", "models/bert-cosine").summary())
print(convert_softmax("bert-base-cased", "models/bert-from-softmax").summary())
"""

from cottention.convert.distil import DistillationSettings
from cottention.convert.distil_report import DistillationReport, Scores
from cottention.convert.official import convert_official
from cottention.convert.report import ConversionReport, LeftOut
from cottention.convert.softmax import convert_softmax

__all__ = [
    "ConversionReport",
    "DistillationReport",
    "DistillationSettings",
    "LeftOut",
    "Scores",
    "convert_official",
    "convert_softmax",
]
