"""Checkpoints of the published research code, turned into ours.

from cottention.convert import convert_official
print(convert_official("Cosine_Attention_BERT", "models/bert-cosine").summary())
"""

from cottention.convert.official import convert_official
from cottention.convert.report import ConversionReport, LeftOut

__all__ = ["ConversionReport", "LeftOut", "convert_official"]
