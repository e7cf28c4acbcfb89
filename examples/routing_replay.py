"""Reinforcement learning on a MoE model: record the routing of the rollout and replay it in training.

python examples/routing_replay.py [--device npu]

The rollout runs in bfloat16 with generate, the training in float32. For some tokens their routers choose different
experts, and the probabilities of these tokens differ by far more than rounding: the importance ratios of the policy
gradient are then wrong. With the recorded experts, they are right again. The toy reward is the share of lower-case
letters.
"""

import argparse

import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import moe_npu  # noqa: F401 - makes experts_implementation="moe_npu" known
from moe_npu.layers import RoutingRecord, record_routing, replay_routing

VOCAB = 128  # ASCII


def make_model(device: str, dtype: torch.dtype) -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        initializer_range=0.12,  # experts that differ, as trained ones do
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation="moe_npu").to(device, dtype)


@torch.no_grad()
def roll_out(model: PreTrainedModel, prompts: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences ``[B, S + N]`` and the log-probabilities ``[B, N]`` of the tokens that were sampled."""
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(output.logits, 1)  # [B, N, V]
    return output.sequences, log_probs(logits, output.sequences[:, prompts.size(1) :])


def log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of each token ``[B, N]`` under the logits ``[B, N, V]``."""
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def score(model: PreTrainedModel, sequences: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Log-probabilities ``[B, N]`` of the last tokens of each sequence, in one forward."""
    # the last token has no successor: the rollout did not compute it either
    logits = model(input_ids=sequences[:, :-1]).logits[:, -num_tokens:]
    return log_probs(logits, sequences[:, -num_tokens:])


def rewards_of(tokens: torch.Tensor) -> torch.Tensor:
    """Share of lower-case letters of each answer, ``[B]``."""
    return ((tokens >= ord("a")) & (tokens <= ord("z"))).float().mean(-1)


def policy_loss(new: torch.Tensor, old: torch.Tensor, rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """The clipped loss of GRPO: an answer is as good as it is better than others to the same prompt."""
    groups = rewards.view(-1, group_size)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).view(-1, 1)
    ratio = (new - old).exp()  # [B, N]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def share_of_other_experts(first: RoutingRecord, second: RoutingRecord) -> float:
    """Share of (token, layer) with another set of experts."""
    differ = [
        (a.topk_ids[0].sort(-1).values != b.topk_ids[0].sort(-1).values).any(-1).float().mean().item()
        for a, b in zip(first.layers.values(), second.layers.values(), strict=True)
    ]
    return sum(differ) / len(differ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    args = parser.parse_args()
    logging.set_verbosity_error()

    trained = make_model(args.device, torch.float32)
    rollout = make_model(args.device, torch.bfloat16).eval()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.0)
    prompts = torch.randint(VOCAB, (args.prompts, 8)).repeat_interleave(args.group, 0).to(args.device)

    print(f"{'':12} {'|log p(rollout) - log p(training)|':^36} {'ratio beyond 1 +- 0.2':>23}")
    print(f"{'step':>4} {'reward':>7} {'without replay':>18} {'with replay':>18} {'without':>13} {'with':>9}")
    mismatch: dict[str, list[torch.Tensor]] = {"without": [], "with": []}
    other_experts = []
    for step in range(args.steps):
        for target, source in zip(rollout.parameters(), trained.parameters(), strict=True):
            target.data.copy_(source)  # in place: no copy of the weights is kept anywhere
        with record_routing(rollout) as record:
            sequences, old = roll_out(rollout, prompts, args.tokens)
        record = record.concatenate(batch_size=prompts.size(0))  # prefill and decoding become one forward
        rewards = rewards_of(sequences[:, prompts.size(1) :])

        with torch.no_grad(), record_routing(trained) as natural:
            without = score(trained, sequences, args.tokens)
        other_experts.append(share_of_other_experts(record, natural))

        with replay_routing(trained, record, weights="router"):  # recorded experts, weights with a gradient
            new = score(trained, sequences, args.tokens)
        loss = policy_loss(new, old, rewards, args.group)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()

        errors = {"without": (without - old).cpu(), "with": (new.detach() - old).cpu()}
        for name, error in errors.items():
            mismatch[name].append(error)
        if step % 5 == 0 or step == args.steps - 1:
            cells = [f"{error.abs().mean():.4f} max {error.abs().max():.2f}" for error in errors.values()]
            cells += [f"{((error.exp() - 1).abs() > 0.2).float().mean():.1%}" for error in errors.values()]
            print(f"{step:4d} {rewards.mean():7.3f} {cells[0]:>18} {cells[1]:>18} {cells[2]:>13} {cells[3]:>9}")

    means = {name: torch.stack(errors).abs().mean().item() for name, errors in mismatch.items()}
    print(f"\ntokens whose rollout used other experts than training, per layer: {sum(other_experts) / args.steps:.1%}")
    print(
        f"mean difference of log-probabilities: {means['without']:.4f} without replay, {means['with']:.4f} with, "
        f"{means['without'] / means['with']:.1f} times less"
    )


if __name__ == "__main__":
    main()
