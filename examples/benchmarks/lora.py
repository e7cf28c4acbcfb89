"""Times a training step of adapters on one MoE layer, ours against PEFT's on the same weights.

    python examples/benchmarks/lora.py --tokens 512 --dtype bfloat16

PEFT's `target_parameters` add the product of both factors to the whole weight in every forward; here the rows of each
expert are multiplied by the factors. Prints the medians and the peak memory of one step as JSON. The sizes are OLMoE's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import moe_npu  # noqa: F401 - registers the experts implementation
from moe_npu.layers.lora import add_lora

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class Layer(nn.Module):
    """One MoE layer under the name that it has in a model."""

    def __init__(self, config: OlmoeConfig) -> None:
        """With random weights."""
        super().__init__()
        self.mlp = OlmoeSparseMoeBlock(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, T, H]` to `[B, T, H]`."""
        output = self.mlp(hidden_states)
        return output[0] if isinstance(output, tuple) else output


def make(kind: str, args: argparse.Namespace) -> nn.Module:
    """The layer with adapters: `ours`, or `peft` over an implementation of the experts."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
    )
    config._experts_implementation = {"peft-eager": "eager", "peft-grouped_mm": "grouped_mm"}.get(kind, "moe_npu")
    layer = Layer(config).to(getattr(torch, args.dtype))
    if kind == "ours":
        add_lora(layer, rank=args.rank, alpha=2 * args.rank)
        return layer
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=[], target_parameters=TARGETS)
    return get_peft_model(layer, lora)


def stepper(kind: str, args: argparse.Namespace) -> Callable[[], float]:
    """A function that does one training step and returns its seconds."""
    layer = make(kind, args)
    optimizer = torch.optim.AdamW([parameter for parameter in layer.parameters() if parameter.requires_grad], lr=1e-4)
    x = torch.randn(1, args.tokens, args.hidden, dtype=getattr(torch, args.dtype), requires_grad=True)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        layer(x).float().square().mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def memory(entry: str) -> int:
    """MiB of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{entry}:"))


def main() -> None:
    """Run everything that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"experts": 64, "hidden": 2048, "intermediate": 1024, "top-k": 8, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--kinds", nargs="+", default=["ours", "peft-moe_npu", "peft-grouped_mm", "peft-eager"])
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.memory_of:  # in a process of its own, so that nothing else was allocated
        step = stepper(args.memory_of, args)
        step()  # the state of the optimizer is part of the rest
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        step()
        print(json.dumps({"before_mib": before, "peak_mib": memory("VmHWM")}))
        return
    steps = {kind: stepper(kind, args) for kind in args.kinds}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for step in steps.values():
        step()
    for _ in range(args.steps):  # in turns, so that a busy machine is busy for all
        for kind, step in steps.items():
            times[kind].append(step())
    results = {}
    for kind, seconds in times.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", kind]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        median = statistics.median(seconds)
        ratio = median / statistics.median(times[args.kinds[0]])
        results[kind] = {"median_s": round(median, 4), "ratio": round(ratio, 2), **measured}
    print(
        json.dumps(
            {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(args), "results": results}, indent=2
        )
    )


if __name__ == "__main__":
    main()
