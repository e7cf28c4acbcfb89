"""What holds for every router, whatever it computes: replay, ties, gradients, dtypes, graphs, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moe_npu.layers import routers
from tests.helpers.assertions import assert_bits_equal

T, H, E, K, VOCAB = 7, 16, 8, 2, 11
Make = Callable[..., routers.Router]

MAKE: dict[str, Make] = {
    "softmax": lambda **o: routers.SoftmaxTopKRouter(H, E, K, norm_topk_prob=False, **o),
    "softmax-normalized": lambda **o: routers.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, **o),
    "softmax-correction": lambda **o: routers.SoftmaxTopKRouter(
        H, E, K, norm_topk_prob=True, norm_min=0.3, has_correction_bias=True, **o
    ),
    "softmax-float32-weights": lambda **o: routers.SoftmaxTopKRouter(
        H, E, K, norm_topk_prob=True, routed_scaling_factor=2.5, weights_dtype=torch.float32, **o
    ),
    "topk-softmax": lambda **o: routers.TopKSoftmaxRouter(H, E, K, bias=True, routed_scaling_factor=0.5, **o),
    "sigmoid": lambda **o: routers.SigmoidTopKRouter(
        H, E, K, norm_topk_prob=True, has_correction_bias=True, logit_softcap=2.0, **o
    ),
    "sigmoid-raw": lambda **o: routers.SigmoidTopKRouter(H, E, K, norm_topk_prob=False, logit_scale=1.5, **o),
    "sigmoid-logits": lambda **o: routers.SigmoidTopKRouter(
        H, E, K, norm_topk_prob=True, selects_by="logits", has_correction_bias=True, **o
    ),
    "groups-max": lambda **o: routers.GroupLimitedRouter(
        H,
        E,
        K,
        num_groups=4,
        topk_groups=2,
        score_function="softmax",
        group_score="max",
        norm_topk_prob=False,
        logits_dtype=None,
        **o,
    ),
    "groups-top2": lambda **o: routers.GroupLimitedRouter(
        H,
        E,
        K,
        num_groups=4,
        topk_groups=2,
        score_function="sigmoid",
        group_score="top2_sum",
        norm_topk_prob=True,
        has_correction_bias=True,
        routed_scaling_factor=2.5,
        logits_dtype=None,
        **o,
    ),
    "groups-filled-with-zero": lambda **o: routers.GroupLimitedRouter(
        H,
        E,
        K,
        num_groups=2,
        topk_groups=1,
        score_function="sigmoid",
        group_score="top2_sum",
        norm_topk_prob=True,
        has_correction_bias=True,
        group_fill=0.0,
        logits_dtype=None,
        **o,
    ),
    "sqrt-softplus": lambda **o: routers.SqrtSoftplusRouter(
        H, E, K, norm_topk_prob=True, norm_eps=1e-20, has_correction_bias=True, **o
    ),
    "sqrt-softplus-raw": lambda **o: routers.SqrtSoftplusRouter(H, E, K, norm_topk_prob=False, **o),
    "sparsemixer": lambda **o: routers.SparseMixerRouter(H, E, jitter_eps=0.2, **o).eval(),
    "llama4": lambda **o: routers.Llama4Router(H, E, K, **o),
    "hash": lambda **o: routers.HashRouter(H, E, K, vocab_size=VOCAB, **o),
    "hash-softmax": lambda **o: routers.HashRouter(
        H, E, K, vocab_size=VOCAB, score_function="softmax", norm_topk_prob=False, **o
    ),
    "gemma4": lambda **o: routers.Gemma4Router(H, E, K, **o),
}
EVERY = pytest.mark.parametrize("kind", MAKE)


def make(kind: str, **options: Any) -> routers.Router:
    router = MAKE[kind](**options)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(3).add_(0.01 * torch.randn_like(parameter))
        if getattr(router, "e_score_correction_bias", None) is not None:
            router.e_score_correction_bias.normal_()
    return router


def route(router: nn.Module, x: Tensor, topk_ids: Tensor | None = None) -> routers.RouterOutput:
    return router(x, topk_ids=topk_ids, token_ids=torch.arange(x.size(0), device=x.device) % VOCAB)


def test_every_router_is_among_them() -> None:
    tested = {type(make(kind)) for kind in MAKE}
    assert {getattr(routers, name) for name in routers.__all__} - {routers.Router, routers.RouterOutput} - tested == {
        routers.LinearRouter  # what they have in common
    }


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_replay_of_its_own_choice_is_the_same_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    router, x = make(kind, dtype=dtype), torch.randn(T, H, dtype=dtype)
    first = route(router, x)
    for ids in (first.topk_ids, first.topk_ids.long()):
        again = router(x, topk_ids=ids)  # also the hash router needs no token then
        for a, b in zip(first, again, strict=True):
            assert_bits_equal(a, b)


@pytest.mark.parametrize("kind", [kind for kind in MAKE if kind != "sparsemixer"])  # whose experts have an order
def test_replay_of_other_experts_permutes_with_them(kind: str) -> None:
    router, x = make(kind), torch.randn(T, H)
    ids = torch.rand(T, E).argsort(1)[:, :K]
    there, back = router(x, topk_ids=ids).topk_weights, router(x, topk_ids=ids.flip(1)).topk_weights
    torch.testing.assert_close(there, back.flip(1), rtol=1e-6, atol=0)
    assert (there > 0).all()


@EVERY
def test_gradients_equal_finite_differences(kind: str) -> None:
    router = make(kind, dtype=torch.float64)
    router.weights_dtype = None  # finite differences of float32 weights say nothing
    x = torch.randn(3, H, dtype=torch.float64, requires_grad=True)
    ids = route(router, x).topk_ids
    names = list(dict(router.named_parameters()))

    def outputs(topk_ids: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
        def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
            options = {"topk_ids": topk_ids, "token_ids": torch.arange(3)}
            out = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x,), options)
            return out.router_logits, out.topk_weights

        return call

    for topk_ids in (None, ids):
        assert torch.autograd.gradcheck(outputs(topk_ids), (x, *router.parameters()), atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in MAKE if not kind.startswith("hash")])  # which compares nothing
def test_ties_go_to_the_lower_expert(kind: str) -> None:
    router = make(kind)
    with torch.no_grad():
        router.weight.zero_()
        if router.bias is not None:
            router.bias.zero_()
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.zero_()
    assert torch.equal(route(router, torch.randn(T, H)).topk_ids, torch.tensor([[0, 1]] * T, dtype=torch.int32))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_and_gradients_stay_finite_for_extreme_logits(kind: str, dtype: torch.dtype) -> None:
    router = make(kind, dtype=dtype)
    x = torch.randn(T, H, dtype=dtype).mul(300).requires_grad_()
    out = route(router, x)
    out.topk_weights.float().square().sum().backward()
    for tensor in (out.topk_weights, x.grad, *(parameter.grad for parameter in router.parameters())):
        assert torch.isfinite(tensor).all()


@EVERY
def test_no_tokens(kind: str) -> None:
    router = make(kind)
    x = torch.randn(0, H, requires_grad=True)
    out = route(router, x)
    assert [tuple(tensor.shape) for tensor in out] == [(0, E), (0, K), (0, K)]
    out.topk_weights.sum().backward()
    assert torch.equal(router.weight.grad, torch.zeros(E, H))


@EVERY
def test_correction_bias_chooses_and_does_not_weigh(kind: str) -> None:
    router, x = make(kind), torch.randn(T, H)
    if getattr(router, "e_score_correction_bias", None) is None:
        assert "e_score_correction_bias" not in router.state_dict()
        return
    assert router.state_dict()["e_score_correction_bias"].dtype == torch.float32
    assert not router.e_score_correction_bias.requires_grad
    router.e_score_correction_bias.zero_()
    weights = router(x, topk_ids=torch.tensor([[6, 7]] * T)).topk_weights
    router.e_score_correction_bias[6:] = torch.tensor([1000.0, 500.0])
    out = router(x)
    assert out.topk_ids.tolist() == [[6, 7]] * T
    assert_bits_equal(out.topk_weights, weights)
    router.reset_parameters()
    assert not router.e_score_correction_bias.any()


@EVERY
def test_meta_construction_then_load(kind: str) -> None:
    source, x = make(kind), torch.randn(T, H)
    with torch.device("meta"):
        router = MAKE[kind]()
    assert all(tensor.is_meta for tensor in (*router.parameters(), *router.buffers()))
    on_meta = route(router, x.to("meta"))
    assert [tensor.dtype for tensor in on_meta] == [tensor.dtype for tensor in route(source, x)]
    router.to_empty(device="cpu").load_state_dict(source.state_dict())
    for a, b in zip(route(router, x), route(source, x), strict=True):
        assert_bits_equal(a, b)


@EVERY
def test_reset_parameters_fills_everything(kind: str) -> None:
    router = make(kind)
    for tensor in (*router.parameters(), *router.buffers()):
        with torch.no_grad():
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    router.reset_parameters()
    assert all(tensor.isfinite().all() and (tensor.min() >= -0.25) for tensor in router.parameters())
    assert route(router, torch.randn(T, H)).topk_weights.isfinite().all()


@EVERY
def test_compiles_to_one_graph_for_any_number_of_tokens(kind: str) -> None:
    torch._dynamo.reset()
    router = make(kind)
    compiled = torch.compile(
        lambda x, ids=None: route(router, x, ids), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for num_tokens in (T, T + 2):
        x = torch.randn(num_tokens, H, requires_grad=True)
        for ids in (None, torch.rand(num_tokens, E).argsort(1)[:, :K].contiguous()):
            actual, expected = compiled(x, ids), route(router, x, ids)
            for a, b in zip(actual, expected, strict=True):
                assert_bits_equal(a, b)
            grads = [torch.autograd.grad(out.topk_weights.square().sum(), x)[0] for out in (actual, expected)]
            torch.testing.assert_close(*grads)


@EVERY
def test_exports_with_a_dynamic_number_of_tokens(kind: str) -> None:
    router, tokens = make(kind), torch.export.Dim("tokens", min=2)
    inputs = {"token_ids": torch.arange(T)} if kind.startswith("hash") else {}
    shapes = {"hidden_states": {0: tokens}, **{name: {0: tokens} for name in inputs}}
    program = torch.export.export(router, (torch.randn(T, H),), inputs, dynamic_shapes=shapes)
    x = torch.randn(4, H)
    inputs = {name: value[:4] for name, value in inputs.items()}
    for a, b in zip(program.module()(x, **inputs), router(x, **inputs), strict=True):
        assert_bits_equal(a, b)


@EVERY
def test_repr_shows_what_it_does(kind: str) -> None:
    text = repr(MAKE[kind]())
    assert f"hidden_size={H}, num_experts={E}, top_k={K}" in text
    assert ("num_groups=" in text) == ("groups" in kind)
    assert (", bias=True" in text) == (kind == "topk-softmax")
    assert ("logit_softcap=2.0" in text) == (kind == "sigmoid")
    assert ("selects_by='logits'" in text) == (kind in ("sigmoid-logits", "topk-softmax", "llama4"))


def test_only_llama4_scales_what_experts_read() -> None:
    assert [kind for kind in MAKE if make(kind).scales_input] == ["llama4"]


def test_hash_router_looks_experts_up() -> None:
    router, x = make("hash"), torch.randn(4, H)
    assert router.state_dict()["tid2eid"].dtype == torch.int64
    for dtype in (torch.int32, torch.int64):
        token_ids = torch.tensor([3, 0, 10, 3], dtype=dtype)
        assert torch.equal(router(x, token_ids=token_ids).topk_ids.long(), router.tid2eid[token_ids.long()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sparsemixer_trains_as_transformers_does(dtype: torch.dtype) -> None:
    """The same random numbers, hence the same experts, weights and gradients."""
    router, x = make("sparsemixer", dtype=dtype).train(), torch.randn(200, H, dtype=dtype)
    torch.manual_seed(5)
    actual = router(x)
    torch.manual_seed(5)
    logits = torch.nn.functional.linear(x, router.weight)
    weights, ids = sparsemixer(logits, jitter_eps=router.jitter_eps, training=True, top_k=K)
    assert torch.equal(actual.topk_ids.long(), ids)
    assert_bits_equal(actual.topk_weights, weights)
    sampled = (actual.topk_ids != router.eval()(x).topk_ids).any(-1).float().mean()
    assert 0.1 < sampled < 0.9
    grad = torch.randn(200, K).to(dtype)
    a, b = (torch.autograd.grad(w, router.weight, grad)[0] for w in (actual.topk_weights, weights))
    assert (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()


def groups(**options: Any) -> routers.Router:
    defaults = {"score_function": "sigmoid", "group_score": "top2_sum", "norm_topk_prob": True}
    return routers.GroupLimitedRouter(H, E, K, **{"num_groups": 4, "topk_groups": 2, **defaults, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: routers.TopKSoftmaxRouter(H, 4, 5),
            ValueError,
            "top_k must be a whole number from 1 to num_experts = 4, but is 5",
        ),
        (lambda: routers.TopKSoftmaxRouter(H, 4, 2.0), ValueError, "top_k must be a whole number .* but is 2.0"),
        (lambda: groups(num_groups=3), ValueError, "num_groups must divide num_experts = 8, but is 3"),
        (lambda: groups(topk_groups=5), ValueError, "topk_groups must be between 1 and num_groups = 4, but is 5"),
        (lambda: groups(num_groups=8), ValueError, "groups of at least 2 experts, but num_groups = 8"),
        (
            lambda: groups(num_groups=8, topk_groups=1, group_score="max"),
            ValueError,
            "at most the 1 experts of topk_groups = 1 groups of 1, but is 2",
        ),
        (lambda: groups(group_score="mean"), ValueError, "group_score must be 'max' or 'top2_sum', but is 'mean'"),
        (lambda: groups(score_function="tanh"), ValueError, "score_function must be .* but is 'tanh'"),
        (
            lambda: routers.SigmoidTopKRouter(H, E, K, norm_topk_prob=True, selects_by="bias"),
            ValueError,
            "selects_by must be 'scores' or 'logits', but is 'bias'",
        ),
        (
            lambda: routers.SigmoidTopKRouter(H, E, K, norm_topk_prob=True, logit_softcap=0.0),
            ValueError,
            "logit_softcap must be positive",
        ),
        (lambda: routers.SparseMixerRouter(H, E, 3, jitter_eps=0.1), ValueError, "top_k must be 2 .* but is 3"),
        (lambda: routers.SparseMixerRouter(H, E, jitter_eps=-1.0), ValueError, "jitter_eps must not be negative"),
        (lambda: routers.HashRouter(H, E, K, vocab_size=0), ValueError, "vocab_size must be positive, but is 0"),
        (lambda: make("hash")(torch.randn(T, H)), ValueError, "give token_ids"),
        (
            lambda: make("hash")(torch.randn(T, H), token_ids=torch.arange(3)),
            ValueError,
            r"token_ids must be \[tokens = 7\], but is \[3\]",
        ),
        (
            lambda: make("hash")(torch.randn(T, H), token_ids=torch.rand(T)),
            TypeError,
            "token_ids must be int32 or int64, but is float32",
        ),
        (
            lambda: make("softmax")(torch.randn(T, H + 1)),
            ValueError,
            r"hidden_states must be \[tokens, hidden_size = 16\], but is \[7, 17\]",
        ),
        (lambda: make("softmax")(torch.randn(1, T, H)), ValueError, r"but is \[1, 7, 16\]"),
        (
            lambda: make("softmax")(torch.randn(T, H), topk_ids=torch.zeros(T, 3, dtype=torch.int32)),
            ValueError,
            r"topk_ids must be \[tokens = 7, top_k = 2\], but is \[7, 3\]",
        ),
        (
            lambda: make("softmax")(torch.randn(T, H), topk_ids=torch.zeros(T, K)),
            TypeError,
            "topk_ids must be int32 or int64, but is float32",
        ),
    ],
)
def test_mistakes_are_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
