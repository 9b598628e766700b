"""Training one sequence on several ranks: each holds a slice of it, and the layers exchange states instead of keys.

from cottention.distributed import count_traffic, shard_sequence, slice_batch, sum_gradients
"""

from cottention.distributed.sequence import shard_sequence, slice_batch, sum_gradients
from cottention.distributed.traffic import LayerTraffic, Traffic, count_traffic, traffic_of_layer

__all__ = [
    "LayerTraffic",
    "Traffic",
    "count_traffic",
    "shard_sequence",
    "slice_batch",
    "sum_gradients",
    "traffic_of_layer",
]
