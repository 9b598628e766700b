"""Our operation under other people's models.

from cottention.integrations import accelerate_gated_delta
accelerate_gated_delta(model)           # a Qwen3-Next, Qwen3.5 or OLMo-hybrid of transformers, on a CPU
"""

from __future__ import annotations

from cottention.integrations.gated_delta import AcceleratedLayers, accelerate_gated_delta, restore_gated_delta

__all__ = ["AcceleratedLayers", "accelerate_gated_delta", "restore_gated_delta"]
