"""Build a MoE layer, train it for a few steps, and look at how its experts are used.

python examples/layer_from_scratch.py [--device npu]
"""

import argparse

import torch
import torch.nn.functional as F

import moe_npu

HIDDEN, EXPERTS = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)
    layer = moe_npu.MoE(
        moe_npu.SoftmaxTopKRouter(HIDDEN, EXPERTS, top_k=2, norm_topk_prob=True),
        moe_npu.GroupedExperts(EXPERTS, HIDDEN, intermediate_size=32),
        shared_expert=moe_npu.SharedExpert(HIDDEN, 32),
    ).to(args.device)
    print(layer)

    # eight clusters of tokens, each with a linear map of its own: what experts are for
    centers = torch.randn(EXPERTS, HIDDEN)
    maps = torch.randn(EXPERTS, HIDDEN, HIDDEN) / HIDDEN**0.5
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for step in range(args.steps):
        cluster = torch.randint(EXPERTS, (256,))
        x = centers[cluster] + 0.3 * torch.randn(256, HIDDEN)
        target = torch.einsum("th,thi->ti", x, maps[cluster])
        output, routing = layer.forward_with_routing(x.to(args.device))
        loss = F.mse_loss(output, target.to(args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    load = torch.bincount(routing.topk_ids.flatten().cpu(), minlength=EXPERTS)
    print("tokens per expert in the last step:", load.tolist())


if __name__ == "__main__":
    main()
