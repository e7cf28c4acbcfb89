"""Kernel launches, bytes and host reads of one MoE layer on a simulated NPU: ours beside others.

Run it with `moe-npu sim examples/benchmarks/launches.py`. The layer is that of Qwen3-30B-A3B, router included, with
weights of its real size; only the number of tokens is small. Times are not measured: a simulated device has no speed.

Rows
    moe_npu        moe_npu.MoE, in bfloat16 and with quantized experts
    hf moe_npu     the layer of transformers with experts_implementation="moe_npu"
    hf grouped_mm  the same with transformers' own grouped matmul
    hf eager       the same with transformers' loop over the experts
    npu patch      the pattern of public patches for NPUs: histogram, sort, and three grouped matmuls of torch_npu over
                   gate, up and down weights that are stored as [N, K] and transposed for the kernel at every call
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_npu
from moe_npu import sim

# kernels that only move or convert what they read
COPIES = ("aclnnInplaceCopy", "aclnnCast", "aclrtMemcpy", "aten.clone", "aten._to_copy", "aten.cat", "aten.stack")


class Sizes(NamedTuple):
    """Those of the layer."""

    num_experts: int = 128
    hidden_size: int = 2048
    intermediate_size: int = 768
    top_k: int = 8


class Row(NamedTuple):
    """What one layer did."""

    name: str
    forward: sim.Trace
    training: sim.Trace | None
    weights: list[tuple[int, int]]  # begin and end of each in device memory


class GroupedLinear(torch.autograd.Function):
    """A grouped matmul with a gradient as public patches write it."""

    @staticmethod
    def forward(ctx, x, weight, expert_tokens):
        ctx.save_for_backward(x, weight, expert_tokens)
        return grouped_matmul(x, weight.transpose(1, 2).contiguous(), expert_tokens, group_type=0)

    @staticmethod
    def backward(ctx, dy):
        x, weight, expert_tokens = ctx.saved_tensors
        dx = grouped_matmul(dy, weight, expert_tokens, group_type=0)
        return dx, grouped_matmul(dy.t(), x, expert_tokens, group_type=2), None


def grouped_matmul(x: Tensor, weight: Tensor, expert_tokens: Tensor, *, group_type: int) -> Tensor:
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=expert_tokens, group_list_type=1, group_type=group_type, split_item=3
    )
    return y


class PatchedMoE(nn.Module):
    """Histogram, sort, three grouped matmuls, scatter."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        experts, hidden, intermediate, self.top_k = sizes
        shape = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        self.router = nn.Linear(hidden, experts, bias=False)
        for name, size in shape.items():
            self.register_parameter(name, nn.Parameter(torch.empty(experts, *size)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.view(-1, hidden_states.size(-1))
        probabilities = F.softmax(self.router(tokens), dim=-1, dtype=torch.float32)
        weights, ids = probabilities.topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(tokens.dtype)
        flat = ids.view(-1)
        num_experts = self.gate.size(0)
        counts = torch.histc(flat.float(), bins=num_experts, min=0, max=num_experts - 1).to(torch.int64)
        order = torch.argsort(flat)
        rows = tokens[order // self.top_k]
        gate = GroupedLinear.apply(rows, self.gate, counts)
        up = GroupedLinear.apply(rows, self.up, counts)
        rows = GroupedLinear.apply(F.silu(gate) * up, self.down, counts)
        rows = rows * weights.view(-1)[order].unsqueeze(1)
        return torch.zeros_like(tokens).index_add(0, order // self.top_k, rows).view(hidden_states.shape)


def ours(sizes: Sizes, scheme: str | None) -> Callable[[], nn.Module]:
    experts, hidden, intermediate, top_k = sizes

    def build() -> nn.Module:
        router = moe_npu.SoftmaxTopKRouter(hidden, experts, top_k, norm_topk_prob=True)
        if scheme is None:
            return moe_npu.MoE(router, moe_npu.GroupedExperts(experts, hidden, intermediate))
        quantized = moe_npu.QuantizedExperts(experts, hidden, intermediate, scheme=moe_npu.get_scheme(scheme))
        return moe_npu.MoE(router, quantized)

    return build


def transformers_block(sizes: Sizes, implementation: str) -> Callable[[], nn.Module]:
    config = Qwen3MoeConfig(
        num_experts=sizes.num_experts,
        hidden_size=sizes.hidden_size,
        moe_intermediate_size=sizes.intermediate_size,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    return lambda: Qwen3MoeSparseMoeBlock(config)


def fill(layer: nn.Module) -> None:
    """Small values everywhere, fast; only the router's decide what happens."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        if "router" in name or "gate.weight" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 32)
        else:
            parameter.data.fill_(1 if parameter.dtype in (torch.int8, torch.int32) else 0.01)


def measure(name: str, build: Callable[[], nn.Module], tokens: Tensor, *, is_trained: bool) -> Row:
    with torch.device("npu"):
        default, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.bfloat16)
        layer = build()
        torch.set_default_dtype(default)
    fill(layer)
    weights = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in layer.parameters() if p.dim() == 3]
    with torch.no_grad(), sim.trace() as forward:
        layer(tokens)
    training = None
    if is_trained:
        inputs, grad = tokens.clone().requires_grad_(), torch.ones_like(tokens)
        with sim.trace() as training:
            layer(inputs).backward(grad)
    return Row(name, forward, training, weights)


def copied(trace: sim.Trace, weights: list[tuple[int, int]]) -> int:
    """Bytes of copies of a whole weight, or of anything of the size of one."""
    smallest = min(end - begin for begin, end in weights)
    return sum(
        launch.bytes_written
        for launch in trace.launches
        if launch.name.startswith(COPIES) and launch.bytes_read >= smallest
    )


def print_table(title: str, traces: list[tuple[Row, sim.Trace]]) -> None:
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, title_justify="left")
    table.add_column("layer")
    for column in ("launches", "read and written [MB]", "weight copies [MB]", "host syncs"):
        table.add_column(column, justify="right")
    for row, trace in traces:
        table.add_row(
            row.name,
            f"{trace.num_launches:,}",
            f"{(trace.bytes_read + trace.bytes_written) / 1e6:,.0f}",
            f"{copied(trace, row.weights) / 1e6:,.0f}",
            f"{trace.num_synchronizations:,}",
        )
    Console(width=100).print(table)


def measure_all(sizes: Sizes, *, num_tokens: int, only: str | None = None) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, num_tokens, sizes.hidden_size, generator=generator).to("npu", torch.bfloat16)
    layers: dict[str, tuple[Callable[[], nn.Module], bool]] = {
        "moe_npu bf16": (ours(sizes, None), True),
        "moe_npu w8a8": (ours(sizes, "w8a8"), False),
        "moe_npu w4a16": (ours(sizes, "w4a16"), True),
        "hf moe_npu": (transformers_block(sizes, "moe_npu"), True),
        "hf grouped_mm": (transformers_block(sizes, "grouped_mm"), True),
        "hf eager": (transformers_block(sizes, "eager"), True),
        "npu patch": (lambda: PatchedMoE(sizes), True),
    }
    if only is not None and only not in layers:
        raise SystemExit(f"--detail must be one of {', '.join(map(repr, layers))}, but is {only!r}")
    return [
        measure(name, build, tokens, is_trained=is_trained)
        for name, (build, is_trained) in layers.items()
        if only in (None, name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="rows of the input (default 64)")
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--detail", metavar="ROW", help="print every kernel of one row, e.g. 'moe_npu bf16'")
    arguments = parser.parse_args()
    sim.activate()
    sizes = Sizes(*(getattr(arguments, name) for name in Sizes._fields))
    what = ", ".join(f"{name} {size}" for name, size in sizes._asdict().items())
    print(f"One MoE layer, router included: {arguments.tokens} tokens, {what}\n")
    rows = measure_all(sizes, num_tokens=arguments.tokens, only=arguments.detail)
    print_table("forward", [(row, row.forward) for row in rows])
    print_table("forward + backward", [(row, row.training) for row in rows if row.training is not None])
    if arguments.detail:
        print(f"forward\n{rows[0].forward}\n")
        if rows[0].training is not None:
            print(f"forward + backward\n{rows[0].training}")


if __name__ == "__main__":
    main()
