"""The demo: a whole MoE life on real text, from training to quantized generation, on a laptop or an NPU."""

from moe_npu.demo.run import run_demo

__all__ = ["run_demo"]
