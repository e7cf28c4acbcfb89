"""Routers: which experts a token goes to, and with which weights. One file each."""

from moe_npu.layers.routers.base import LinearRouter, Router, RouterOutput
from moe_npu.layers.routers.gemma4 import Gemma4Router
from moe_npu.layers.routers.group_limited import GroupLimitedRouter
from moe_npu.layers.routers.hash import HashRouter
from moe_npu.layers.routers.llama4 import Llama4Router
from moe_npu.layers.routers.sigmoid_topk import SigmoidTopKRouter
from moe_npu.layers.routers.softmax_topk import SoftmaxTopKRouter
from moe_npu.layers.routers.sparsemixer import SparseMixerRouter
from moe_npu.layers.routers.sqrt_softplus import SqrtSoftplusRouter
from moe_npu.layers.routers.topk_softmax import TopKSoftmaxRouter

__all__ = [
    "Gemma4Router",
    "GroupLimitedRouter",
    "HashRouter",
    "LinearRouter",
    "Llama4Router",
    "Router",
    "RouterOutput",
    "SigmoidTopKRouter",
    "SoftmaxTopKRouter",
    "SparseMixerRouter",
    "SqrtSoftplusRouter",
    "TopKSoftmaxRouter",
]
