"""Routers: which experts a token goes to, and with which weights. One file each."""

from moe_npu.layers.routers.base import Router, RouterOutput
from moe_npu.layers.routers.softmax_topk import SoftmaxTopKRouter

__all__ = ["Router", "RouterOutput", "SoftmaxTopKRouter"]
