"""Float8 experts of transformers through "moe_npu", against transformers' own code over dequantized weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_npu  # noqa: F401 - registers
from tests.helpers.hf_experts import INTER, Config, E, H, inputs, results

# before 5.7 it cannot be imported without triton
finegrained_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", exc_type=ImportError)
if not hasattr(finegrained_fp8, "ALL_FP8_EXPERTS_FUNCTIONS"):
    pytest.skip("this transformers has no interface for float8 experts", allow_module_level=True)

WEIGHTS = ("gate_up_proj", "down_proj")
BLOCKS = {"blocks": (4, 2), "one-column-of-blocks": (4, 64), "larger-than-the-weight": (128, 128), "whole": None}


@pytest.fixture(scope="module")
def fp8_class() -> type[nn.Module]:
    """As `replace_with_fp8_linear` makes it, on a class of our own."""
    own = type("FP8Experts", (finegrained_fp8.FP8Experts,), {})
    interface = finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    return finegrained_fp8.use_experts_implementation(experts_class=own, experts_interface=interface)


def build(fp8_class: type[nn.Module], block_size: tuple[int, int] | None, **options: Any) -> nn.Module:
    # FP8Experts asks by getattr for what a config may lack
    config = Config("FP8Experts")
    unused = ("swiglu_alpha", "swiglu_limit", "mlp_gate_softcap", "mlp_up_softcap")
    config.__dict__.update(dict.fromkeys(unused), hidden_activation="silu")
    experts = fp8_class(config, block_size=block_size, **options)
    generator = torch.Generator().manual_seed(0)
    for name in WEIGHTS:
        weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
        if weight.dtype == torch.float8_e4m3fn:
            codes = torch.randint(0, 256, weight.shape, generator=generator, dtype=torch.uint8)
            weight.data = codes.masked_fill((codes & 0x7F) == 0x7F, 0).view(torch.float8_e4m3fn)  # no NaN
        sizes = torch.rand(scale.shape, generator=generator) * 2 + 1
        scale.data = (2 ** sizes.round() if scale.dtype != torch.float32 else sizes).mul(2**-11).to(scale.dtype)
    return experts


def dequantized(experts: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same module over float weights, which its own eager code multiplies as they are."""
    for name in WEIGHTS:
        weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv").float()
        repeated = scale.repeat_interleave(weight.size(1) // scale.size(1), 1)
        repeated = repeated.repeat_interleave(weight.size(2) // scale.size(2), 2)
        setattr(experts, name, nn.Parameter((weight.float() * repeated).to(dtype), requires_grad=False))
    return experts


def run(experts: nn.Module, arguments: list[Tensor], implementation: str) -> dict[str, Tensor]:
    experts.requires_grad_(False)
    found = results(_Frozen(experts), arguments, implementation)
    assert found.keys() == {"y", "hidden_states", "weights"}
    return found


class _Frozen(nn.Module):
    """Hides the parameters, which have no gradient."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.call = [experts]
        self.config = experts.config

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.call[0](*arguments)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_equals_float_experts(fp8_class: type[nn.Module], blocks: str, dtype: torch.dtype, scale_fmt: str) -> None:
    try:
        experts = [build(fp8_class, BLOCKS[blocks], scale_fmt=scale_fmt) for _ in range(2)]
    except TypeError:
        pytest.skip("this transformers has no e8m0 scales")
    arguments = inputs(dtype)
    actual = run(experts[0], arguments, "moe_npu")
    expected = run(dequantized(experts[1], dtype), arguments, "moe_npu")
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key
    if dtype == torch.float32:
        for key, value in run(experts[1], arguments, "eager").items():
            torch.testing.assert_close(actual[key], value)


def test_each_code_is_exact(fp8_class: type[nn.Module]) -> None:
    from moe_npu.layers._fp8 import _as_float, _dequantized

    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(1, 1, -1).view(torch.float8_e4m3fn)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(_dequantized(codes, torch.ones(1, 1, 1), dtype), codes.to(dtype))
    exponents = torch.arange(1, 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert torch.equal(_as_float(exponents), exponents.float())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by Dynamo, of any autograd.Function
def test_compiled_first(fp8_class: type[nn.Module]) -> None:
    experts = build(fp8_class, (4, 4))
    experts.config._experts_implementation = "moe_npu"
    experts.requires_grad_(False)
    hidden_states, ids, weights = inputs(torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    y = compiled(hidden_states, ids, weights)
    (grad,) = torch.autograd.grad(y.sum(), hidden_states)
    expected = experts(hidden_states, ids, weights)
    assert torch.equal(y, expected)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), hidden_states)[0])


def test_autocast(fp8_class: type[nn.Module]) -> None:
    experts = build(fp8_class, (4, 4))
    experts.config._experts_implementation = "moe_npu"
    hidden_states, ids, weights = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = experts(hidden_states, ids, weights)
    expected = experts(hidden_states.to(torch.bfloat16), ids, weights)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=2**-8, atol=1e-6)  # one rounding of the result


def test_half_blocks_are_refused(fp8_class: type[nn.Module]) -> None:
    experts = build(fp8_class, (8, 8))  # 12 rows of gate do not end with a block
    experts.config._experts_implementation = "moe_npu"
    with pytest.raises(
        ValueError, match=r"gate_up_proj_scale_inv must have one scale for each block of 8 x 8 .*24, 16"
    ):
        experts(*inputs(torch.bfloat16))


def test_fp4_is_refused(fp8_class: type[nn.Module]) -> None:
    experts = build(fp8_class, (4, 4))
    experts.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * INTER, H // 2, dtype=torch.int8), requires_grad=False)
    experts.config._experts_implementation = "moe_npu"
    with pytest.raises(ValueError, match=r"gate_up_proj must be float8_e4m3fn, but is torch.int8: .* FP4"):
        experts(*inputs(torch.bfloat16))
