"""Compare routers and ways to balance them: train the same tiny language model with each, draw what happens.

python examples/router_study.py [--device npu]

The model is made of native layers and reads the sources of the Python standard library as bytes. Without anything that
balances, few experts get most of the tokens; a loss or a bias on the choice spreads them.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import moe_npu
from moe_npu.demo.corpus import VOCAB_SIZE, Corpus
from moe_npu.layers import (
    ExpertLoad,
    GroupLimitedRouter,
    LayerLoad,
    Router,
    SigmoidTopKRouter,
    load_balancing_loss,
    update_correction_bias,
)

HIDDEN, HEADS, LAYERS, EXPERTS, TOP_K, LENGTH = 64, 4, 2, 16, 2, 64


def softmax() -> Router:
    return moe_npu.SoftmaxTopKRouter(HIDDEN, EXPERTS, TOP_K, norm_topk_prob=True)


def sigmoid() -> Router:
    return SigmoidTopKRouter(HIDDEN, EXPERTS, TOP_K, norm_topk_prob=True, has_correction_bias=True)


def grouped() -> Router:
    return GroupLimitedRouter(
        HIDDEN,
        EXPERTS,
        TOP_K,
        num_groups=4,
        topk_groups=2,
        score_function="sigmoid",
        group_score="top2_sum",
        norm_topk_prob=True,
        has_correction_bias=True,
    )


@dataclass
class Study:
    """A router and how it is balanced, and what its training was like."""

    name: str
    router: Callable[[], Router]
    loss_coefficient: float = 0.0
    bias_rate: float = 0.0
    losses: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    held_out: float = 0.0
    loads: list[LayerLoad] = field(default_factory=list)
    shares: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0


class Block(nn.Module):
    """Attention and a MoE layer."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)])
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        experts = moe_npu.GroupedExperts(EXPERTS, HIDDEN, intermediate_size=HIDDEN)
        self.moe = moe_npu.MoE(router, experts, expert_load=ExpertLoad(EXPERTS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, S, H]``, and the load-balancing loss."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, S, D]
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        y, routing = self.moe.forward_with_routing(self.norms[1](x))
        score = "softmax" if isinstance(self.moe.router, moe_npu.SoftmaxTopKRouter) else "sigmoid"
        return x + y, load_balancing_loss(routing.router_logits, routing.topk_ids, score_function=score)


class Model(nn.Module):
    """A language model of bytes."""

    def __init__(self, router: Callable[[], Router]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, HIDDEN)
        self.positions = nn.Parameter(torch.randn(LENGTH, HIDDEN) * 0.02)
        self.blocks = nn.ModuleList([Block(router()) for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB_SIZE, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of predicting ``ids [B, S]`` and of the balance."""
        x = self.embed(ids) + self.positions[: ids.size(1)]
        balance = []
        for block in self.blocks:
            x, loss = block(x)
            balance.append(loss)
        logits = self.head(self.norm(x))[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, ids[:, 1:].flatten()), torch.stack(balance).mean()


def run(study: Study, corpus: Corpus, steps: int, device: str) -> None:
    """Train and fill in what is seen."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model = Model(study.router).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    routers = [block.moe.router for block in model.blocks]
    counters = [block.moe.expert_load for block in model.blocks]
    for step in range(steps):
        loss, balance = model(corpus.batch(16, LENGTH, seed=0, step=step).to(device))
        optimizer.zero_grad()
        (loss + study.loss_coefficient * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if study.bias_rate:
            biases = [router.e_score_correction_bias for router in routers]
            update_correction_bias(biases, [counter.counts for counter in counters], rate=study.bias_rate)
        study.losses.append(loss.item())
        worst = max(LayerLoad.of("", counter.counts.cpu()).max_over_mean for counter in counters)
        study.imbalance.append(worst)
        for counter in counters:
            counter.reset()

    with torch.no_grad():
        study.held_out = model(corpus.held_out_windows(64, LENGTH).to(device))[0].item()
    for number, counter in enumerate(counters):
        counts = counter.counts.cpu()
        study.loads.append(LayerLoad.of(f"layer {number}", counts))
        study.shares.append(counts / counts.float().mean())
    study.seconds = time.perf_counter() - start


def smooth(values: list[float], width: int = 10) -> list[float]:
    return [sum(part) / len(part) for part in (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))]


def plot(studies: list[Study], path: Path) -> None:
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.2, 1))
    losses, imbalance, load = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), grid[1, :]
    for study in studies:
        steps = range(1, len(study.losses) + 1)
        losses.plot(steps, smooth(study.losses), label=study.name)
        imbalance.plot(steps, smooth(study.imbalance), label=study.name)
    losses.set_ylabel("training loss [nats per byte]")
    imbalance.set_ylabel("tokens of the busiest expert / even share")
    imbalance.axhline(1, color="black", linewidth=0.8, linestyle=":")
    for axes in (losses, imbalance):
        axes.set_xlabel("step (mean of the last 10)")
        axes.grid(alpha=0.3)
    losses.legend()  # above the curves, which leave room there
    axes = figure.add_subplot(load)
    rows = torch.stack([share for study in studies for share in study.shares])
    image = axes.imshow(rows.numpy(), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    labels = [f"{study.name}, layer {layer}" for study in studies for layer in range(LAYERS)]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks(range(EXPERTS))
    axes.set_xlabel("expert")
    axes.set_title("Load on held-out text, relative to an even split")
    figure.colorbar(image, ax=axes, label="load (1 = even)", extend="max")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--picture", type=Path, default=Path("routers.png"))
    args = parser.parse_args()

    studies = [
        Study("softmax", softmax),
        Study("softmax, loss", softmax, loss_coefficient=0.01),
        Study("sigmoid", sigmoid),
        Study("sigmoid, bias update", sigmoid, bias_rate=0.01),
        Study("4 groups, bias update", grouped, bias_rate=0.01),
    ]
    corpus = Corpus.load()
    print(f"{'router':<22} {'held-out loss':>13} {'max/mean':>9} {'entropy':>8} {'dead':>5} {'sec.':>6}")
    for study in studies:
        run(study, corpus, args.steps, args.device)
        worst = max(load.max_over_mean for load in study.loads)
        entropy = min(load.entropy for load in study.loads)
        dead = sum(len(load.dead_experts) for load in study.loads)
        print(f"{study.name:<22} {study.held_out:13.3f} {worst:9.2f} {entropy:8.3f} {dead:5} {study.seconds:6.1f}")
    plot(studies, args.picture)
    print("\nmax/mean, entropy: of the worst layer on held-out text; dead: experts without a token")
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
