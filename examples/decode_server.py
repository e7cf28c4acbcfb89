"""Serve requests with a decode loop of static shapes: fixed slots, a static KV cache, requests join and leave.

python examples/decode_server.py
python examples/decode_server.py --compile inductor
python examples/decode_server.py --device npu

Continuous batching in its simplest form. Each decode step has the same shapes, whichever slots are in use, so that it
can be compiled to one graph; each request gets the tokens that it would get alone, which is checked.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.cache_utils import StaticLayer
from transformers.utils import logging

import moe_npu  # noqa: F401 - makes experts_implementation="moe_npu" known

VOCAB = 512


@dataclass
class Request:
    """A prompt, the number of tokens wanted, and those that are there."""

    prompt: list[int]
    num_tokens: int
    output: list[int] = field(default_factory=list)


class SlotLayer(StaticLayer):
    """Keys and values ``[slots, heads, length, D]`` of one layer; each slot is at a position of its own."""

    def __init__(self, length: int, positions: torch.Tensor) -> None:
        super().__init__(length)
        self.positions = positions  # [slots], shared with the server

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.positions.view(-1, 1, 1, 1).expand_as(key_states)  # [slots, heads, 1, D]
        self.keys.scatter_(2, index, key_states)
        self.values.scatter_(2, index, value_states)
        return self.keys, self.values

    def fill(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Begin a slot with what a prompt gave, ``[1, heads, P, D]``."""
        self.keys[slot, :, : keys.size(2)] = keys[0]
        self.values[slot, :, : values.size(2)] = values[0]


class Server:
    """Decodes up to ``num_slots`` requests at a time, greedily.

    Args:
        model: of any family with full attention.
        num_slots: requests at a time.
        length: longest prompt with its answer.
        prompt_length: prompts are padded to this length, so that they have one shape, too.
        backend: compiles the decode step with this backend of torch.compile, if given.
    """

    def __init__(
        self, model: PreTrainedModel, num_slots: int, length: int, prompt_length: int, backend: str | None
    ) -> None:
        self.model = model
        self.length = length
        self.prompt_length = prompt_length
        self.slots: list[Request | None] = [None] * num_slots
        self.tokens = torch.zeros(num_slots, dtype=torch.long, device=model.device)
        self.positions = torch.zeros(num_slots, dtype=torch.long, device=model.device)
        config = model.config
        self.layers = [SlotLayer(length, self.positions) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(self.layers)
        self.cache.early_initialization(
            num_slots, config.num_key_value_heads, config.head_dim, model.dtype, model.device
        )
        self.decode: Callable[[], torch.Tensor] = self._decode
        if backend is not None:
            self.decode = torch.compile(self._decode, fullgraph=True, backend=backend)

    @torch.no_grad()
    def join(self, slot: int, request: Request) -> None:
        """Compute the prompt and put its keys and values into a slot."""
        prompt = torch.zeros(1, self.prompt_length, dtype=torch.long)
        prompt[0, : len(request.prompt)] = torch.tensor(request.prompt)
        cache = DynamicCache()
        # what follows the prompt is padding, which no token before it sees and which decoding overwrites
        logits = self.model(prompt.to(self.model.device), None, None, cache).logits
        for layer, prompt_layer in zip(self.layers, cache.layers, strict=True):
            layer.fill(slot, prompt_layer.keys, prompt_layer.values)
        token = logits[0, len(request.prompt) - 1].argmax()
        self.tokens[slot] = token
        self.positions[slot] = len(request.prompt)
        request.output.append(token.item())
        self.slots[slot] = request

    @torch.no_grad()
    def _decode(self) -> torch.Tensor:
        """One token for each slot ``[slots]``; those of empty slots mean nothing."""
        steps = torch.arange(self.length, device=self.positions.device)
        mask = steps <= self.positions[:, None, None, None]  # [slots, 1, 1, length]
        # the cache is the fourth argument of every model; its name depends on the release of transformers
        logits = self.model(self.tokens[:, None], mask, self.positions[:, None], self.cache).logits
        self.tokens.copy_(logits[:, -1].argmax(-1))
        self.positions.add_(1).clamp_(max=self.length - 1)  # empty slots stay in bounds
        return self.tokens

    def serve(self, requests: list[Request]) -> int:
        """Answer all requests; the number of decode steps."""
        waiting = list(requests)
        num_steps = 0
        while waiting or any(self.slots):
            for slot, request in enumerate(self.slots):
                if request is None and waiting:
                    self.join(slot, waiting.pop(0))
            tokens = self.decode().tolist()  # the one time per step that the host waits for the device
            num_steps += 1
            for slot, request in enumerate(self.slots):
                if request is None:
                    continue
                if len(request.output) < request.num_tokens:
                    request.output.append(tokens[slot])
                if len(request.output) == request.num_tokens:
                    self.slots[slot] = None
        return num_steps


def make_requests(number: int, prompt_length: int, num_tokens: int) -> list[Request]:
    generator = torch.Generator().manual_seed(1)

    def random(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high + 1, (size,), generator=generator).tolist()

    return [
        Request(random(0, VOCAB - 1, random(2, prompt_length)[0]), random(num_tokens // 4, num_tokens)[0])
        for _ in range(number)
    ]


def alone(model: PreTrainedModel, request: Request) -> list[int]:
    """What ``generate`` answers to the request."""
    ids = torch.tensor([request.prompt], device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.num_tokens, do_sample=False, pad_token_id=0
    )
    return output[0, len(request.prompt) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--prompt-length", type=int, default=32, help="of the longest prompt")
    parser.add_argument("--tokens", type=int, default=48, help="of the longest answer")
    parser.add_argument("--compile", metavar="BACKEND", help="backend of torch.compile, for example inductor")
    args = parser.parse_args()
    logging.set_verbosity_error()

    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        initializer_range=0.1,  # random weights that do not repeat themselves
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    # a real one: AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_npu", dtype=torch.bfloat16)
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager").to(args.device).eval()
    expected = [alone(model, request) for request in make_requests(args.requests, args.prompt_length, args.tokens)]

    print(f"{'experts':>20} {'steps':>6} {'tokens':>7} {'tokens/s':>9} {'as alone':>9}")
    runs: list[tuple[str, str | None]] = [("eager", None), ("moe_npu", None)]
    if args.compile:
        runs.append(("moe_npu", args.compile))
    for experts, backend in runs:
        model.set_experts_implementation(experts)
        server = Server(model, args.slots, args.prompt_length + args.tokens, args.prompt_length, backend)
        server.serve(make_requests(2, args.prompt_length, 4))  # first calls allocate, plan and compile
        requests = make_requests(args.requests, args.prompt_length, args.tokens)
        start = time.perf_counter()
        num_steps = server.serve(requests)
        seconds = time.perf_counter() - start
        outputs = [request.output for request in requests]
        num_tokens = sum(map(len, outputs))
        num_equal = sum(output == wanted for output, wanted in zip(outputs, expected, strict=True))
        name = experts if backend is None else f"{experts}, {backend}"
        speed = num_tokens / seconds
        print(f"{name:>20} {num_steps:6} {num_tokens:7} {speed:9.1f} {num_equal:6}/{len(outputs)}")
    print("\nfirst answer:", outputs[0])


if __name__ == "__main__":
    main()
