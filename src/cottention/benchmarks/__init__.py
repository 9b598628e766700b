"""Measurements of speed and memory, next to the peers and to the machine's own limits, all from one run.

Nothing is imported here, so that the command line can read the settings without torch.

    from cottention.benchmarks.attention import benchmark_attention
    from cottention.benchmarks.settings import AttentionSettings
"""
