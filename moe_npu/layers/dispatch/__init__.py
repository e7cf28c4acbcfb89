"""Token dispatchers: how rows reach their experts and come back. One file each."""

from moe_npu.layers.dispatch.base import Dispatched, TokenDispatcher
from moe_npu.layers.dispatch.capacity import CapacityDispatcher
from moe_npu.layers.dispatch.local import LocalDispatcher

__all__ = ["CapacityDispatcher", "Dispatched", "LocalDispatcher", "TokenDispatcher"]
