"""The graph compiler of optcpu: rewrites of training graphs, built on torch alone."""

from passes.activations import SaveOutputsInBf16
from passes.attention import RouteAttention, UnfoldAttentionBackward
from passes.base import FunctionPass, Pass, PatternPass, Stage, as_pass, cache_key
from passes.blocks import Blocks, share_blocks
from passes.canonicalize import Canonicalize
from passes.casts import CancelCasts, HoistDowncasts, ShareWeightCasts, SinkUpcasts
from passes.convolution import SubsampleForWeightGradient
from passes.cross_entropy import ChunkCrossEntropy
from passes.embedding import AddEmbeddingGradient
from passes.halves import GradientsInBf16, ReadUpperHalves
from passes.hand_over import hand_over_gradients
from passes.indices import CheckIndices
from passes.linear import FuseLinear, RouteProducts
from passes.linear_backward import FuseLinearBackward
from passes.lowering import KEPT_WHOLE, lower
from passes.pooling import MaxPoolInBf16, PoolBackwardBySize, PoolBeforeRelu, PoolChannelsLast
from passes.precision import POLICY, InsertCasts

__all__ = [
    "KEPT_WHOLE",
    "POLICY",
    "AddEmbeddingGradient",
    "Blocks",
    "CancelCasts",
    "Canonicalize",
    "CheckIndices",
    "ChunkCrossEntropy",
    "FunctionPass",
    "FuseLinear",
    "FuseLinearBackward",
    "GradientsInBf16",
    "HoistDowncasts",
    "InsertCasts",
    "MaxPoolInBf16",
    "Pass",
    "PatternPass",
    "PoolBackwardBySize",
    "PoolBeforeRelu",
    "PoolChannelsLast",
    "ReadUpperHalves",
    "RouteAttention",
    "RouteProducts",
    "SaveOutputsInBf16",
    "ShareWeightCasts",
    "SinkUpcasts",
    "Stage",
    "SubsampleForWeightGradient",
    "UnfoldAttentionBackward",
    "as_pass",
    "cache_key",
    "hand_over_gradients",
    "lower",
    "share_blocks",
]
