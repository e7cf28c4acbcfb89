"""Everything of torch itself on the simulated device, against the CPU."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from moe_npu.sim import aten
from moe_npu.sim import device as simulated

pytestmark = [
    pytest.mark.npu,
    pytest.mark.usefixtures("npu"),
    # of torch_npu
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Cannot create tensor with internal format:UserWarning"),
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
]

# what torch_npu refuses, or does otherwise than the CPU, on a real device too
REFUSED = {
    **dict.fromkeys(
        ("bfloat16", "bool", "byte", "char", "float", "half", "int", "long", "short", "cdouble", "cfloat", "chalf"),
        "Only contiguous_format or preserve_format is supported",
    ),
    **dict.fromkeys(("double", "float_power", "to"), "torch.float32 != torch.float64"),  # it has no float64
    "nn.functional.binary_cross_entropy_with_logits": "'NoneType' object",  # no gradient of the weights
    "nn.functional.max_unpool2d": "NPU contiguous operator only supported contiguous memory format",
    "nn.functional.max_unpool2d.grad": "NPU contiguous operator only supported contiguous memory format",
    "stft": "not differentiable with respect to argument 'window'",
    "tensor_split": "expected tensor_indices_or_sections to be on cpu",
    # not of the simulated device
    "sparse.mm.reduce": "Cannot access storage of SparseCsrTensorImpl",
    "sparse.sampled_addmm": "Cannot access storage of SparseCsrTensorImpl",
    "to_sparse": "tensors of torch.sparse_coo are not implemented on the simulated device",
    # nothing to compare: memory that is not initialized
    **dict.fromkeys(
        ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"), "not close"
    ),
    "nn.functional.scaled_dot_product_attention": "not close",  # another order of additions; see below
}


NOT_FOR_THE_CPU = [
    "broadcast_shapes",
    "torch.ops.aten._flash_attention_forward",
    "torch.ops.aten._efficient_attention_forward",
    "nn.functional.batch_norm.without_cudnn",
    "jiterator_unary",
    "jiterator_binary",
    "jiterator_4inputs_with_extra_args",
    "jiterator_binary_return_by_ref",
    "jiterator_2inputs_2outputs",
]


def to_npu(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("npu").requires_grad_(tensor.requires_grad), value)


def assert_same(results: Any, expected: Any) -> None:
    for result, wanted in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        assert result.device.type == "npu"
        torch.testing.assert_close(result.detach().cpu(), wanted.detach(), rtol=0, atol=0, equal_nan=True)


def assert_close(results: Any, expected: Any) -> None:
    for result, wanted in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        assert result.device.type == "npu"
        torch.testing.assert_close(result.detach().cpu(), wanted.detach())


# ---- operators -------------------------------------------------------------------------------------------------------


def test_torchs_own_samples_agree_with_the_cpu() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.npu.torch_samples"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    unexpected = {name: what for name, what in report["complaints"].items() if REFUSED.get(name, "\0") not in what}
    assert unexpected == {}
    assert report["silent"] == NOT_FOR_THE_CPU
    assert report["agreeing"] > 2800


INDEXED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "index": lambda x, i: (x[i], x[:, i], x[x > 0], x[i, i], x[None, ..., 1]),
    "index_put": lambda x, i: (
        x.clone().index_put_((i,), x[:3], accumulate=True),
        x.clone().masked_fill_(x > 0, 2),
        torch.where(x > 0, x, 0.0),
    ),
    "gather": lambda x, i: (x.gather(1, i[None].expand(6, 3)), x.take(i), x.index_select(0, i)),
    "scatter": lambda x, i: (
        x.scatter(0, i[:, None], 9.0),
        x.scatter_add(0, i[:, None].expand(3, 5), x[:3]),
        x.scatter_reduce(0, i[:, None].expand(3, 5), x[:3], "amax"),
        x.index_add(0, i, x[:3]),
    ),
    "nonzero": lambda x, i: (x.nonzero(), torch.where(x > 0), x.masked_select(x > 0)),
    "unique": lambda x, i: (x.int().unique(return_inverse=True, return_counts=True), i.unique_consecutive()),
    "sort": lambda x, i: (tuple(x.sort(1)), tuple(x.topk(2)), x.argsort(stable=True), tuple(x.kthvalue(2))),
    "bins": lambda x, i: (
        torch.histc(x, 5),
        torch.bincount(i, minlength=7),
        torch.bincount(i, weights=x[:3, 0]),
        torch.searchsorted(x[0].sort()[0], x),
    ),
    "repeat_interleave": lambda x, i: (x.repeat_interleave(2, 0), i.repeat_interleave(i), x.repeat_interleave(3)),
    "one_hot": lambda x, i: (F.one_hot(i, 5), F.one_hot(i)),
    "views": lambda x, i: (x.clone().transpose_(0, 1), x.rot90(), x.unsqueeze(0).squeeze(), x.unfold(0, 2, 2)),
}


@pytest.mark.parametrize("name", INDEXED)
def test_indexing(name: str) -> None:
    x, index = torch.randn(6, 5), torch.tensor([0, 2, 2])
    assert_same(INDEXED[name](x.npu(), index.npu()), INDEXED[name](x, index))


def test_histograms_of_integers() -> None:
    x = torch.tensor([0, 3, 3, 1], dtype=torch.int32).npu()
    result = torch.histc(x, bins=4, min=0, max=3)
    assert (result.dtype, result.tolist()) == (torch.int32, [1, 1, 0, 2])


def test_indices_may_be_on_the_host() -> None:
    x, index = torch.randn(6, 5), torch.tensor([0, 2, 2])
    assert_same(x.npu()[index], x[index])
    x_npu = x.npu()
    x_npu[index] = 1.0
    x[index] = 1.0
    assert_same(x_npu, x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
                                   torch.complex64, torch.float16, torch.bfloat16])  # fmt: skip
def test_dtypes(dtype: torch.dtype) -> None:
    def compute(x: Tensor) -> list[Tensor]:
        return [
            *(x * 2, x / 3, x.sum(), x == 1, x + torch.tensor(2), torch.tensor(2.0) * x, x[1] * x[2]),
            *(torch.cat([x, x]), x.reshape(2, 3)[:, 1], x.new_empty(0).sum(), x.new_zeros(0, 3).sum(0)),
        ]

    x = torch.arange(6).to(dtype)
    results, expected = compute(x.npu()), compute(x)
    assert [result.dtype for result in results] == [wanted.dtype for wanted in expected]
    assert_same(results, expected)
    assert results[0].tolist() == expected[0].tolist()
    assert results[2].item() == expected[2].item()
    assert "npu:0" in repr(results[0])


@pytest.mark.parametrize("source", ["cpu", "npu"])
@pytest.mark.parametrize("destination", ["cpu", "npu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_copies_of_views(source: str, destination: str, dtype: torch.dtype) -> None:
    for source_dtype in (torch.float32, torch.float16, torch.int32, torch.int8, torch.bool):
        base = torch.arange(24).reshape(4, 6).to(source_dtype)
        view = base.to(source).t()[1:, ::2]
        target, expected = torch.zeros(10, 4, dtype=dtype).to(destination), torch.zeros(10, 4, dtype=dtype)
        target[::2, ::2].copy_(view)
        expected[::2, ::2].copy_(base.t()[1:, ::2])
        assert torch.equal(target.cpu(), expected)
        assert torch.equal(view.to(destination).cpu(), base.t()[1:, ::2])
        assert torch.equal(view.to(destination, dtype).cpu(), base.t()[1:, ::2].to(dtype))
        assert torch.equal(base[0].to(source).expand(3, 6).to(destination).cpu(), base[0].expand(3, 6))
        target.copy_(base[0, :4].to(source))  # which is one row of many
        assert torch.equal(target.cpu(), base[0, :4].to(dtype).expand(10, 4))


def test_out_arguments_are_resized_and_written() -> None:
    ones = torch.ones(4, 2).npu()
    out = torch.empty(0).npu()
    assert torch.add(ones, 1, out=out) is out
    assert out.tolist() == [[2.0, 2.0]] * 4
    transposed = torch.empty(3, 4).npu().t()
    torch.mm(ones, torch.ones(2, 3).npu(), out=transposed)
    assert transposed.tolist() == [[2.0] * 3] * 4
    whole = torch.zeros(4, 2).npu()
    torch.add(ones[:2], 1, out=whole[::2])
    assert whole.tolist() == [[2.0] * 2, [0.0] * 2] * 2
    torch.mul(whole, 2, out=whole)
    assert whole.tolist() == [[4.0] * 2, [0.0] * 2] * 2
    values, indices = torch.empty(0).npu(), torch.empty(0, dtype=torch.int64).npu()
    torch.sort(torch.tensor([3.0, 1.0]).npu(), out=(values, indices))
    assert (values.tolist(), indices.tolist()) == ([1.0, 3.0], [1, 0])


def test_conjugated_and_negated_views() -> None:
    x = torch.randn(3, 3, dtype=torch.complex64)
    assert_same([x.npu().conj() @ x.npu(), x.npu().conj().imag], [x.conj() @ x, x.conj().imag])


def test_matmuls_with_float32_results() -> None:
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
    assert_same(torch.mm(a.npu(), b.npu(), out_dtype=torch.float32), a.float() @ b.float())
    bias = torch.randn(3, 5)
    result = torch.baddbmm(bias[None].npu(), a[None].npu(), b[None].npu(), out_dtype=torch.float32)
    assert_same(result, torch.baddbmm(bias[None], a[None].float(), b[None].float()))


def test_inputs_are_only_read_where_the_cpu_has_no_kernel_of_their_precision() -> None:
    x = torch.ones(1).half().npu().expand(4, 4)  # which cannot be written
    assert torch.linalg.svdvals(x)[0].item() == pytest.approx(4)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_tensors_on_two_devices_are_refused() -> None:
    x = torch.ones(2).npu()
    with pytest.raises(RuntimeError, match=r"aten\.add\.Tensor: Expected all tensors to be on the same device"):
        x + torch.ones(2)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.add(x, x, out=torch.empty(2))
    with pytest.raises(RuntimeError, match="Expected a 'npu' device type for generator"):
        torch.randn(3, device="npu", generator=torch.Generator())


def test_the_cpus_messages_arrive() -> None:
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(2x3 and 2x3\)"):
        torch.ones(2, 3).npu() @ torch.ones(2, 3).npu()
    with pytest.raises(IndexError, match="index 5 is out of bounds"):
        torch.ones(2).npu()[torch.tensor([5]).npu()]


class FailsInBackward(torch.autograd.Function):
    """A function whose gradient needs an operator that the device does not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(grad, grad, grad, dropout_p=0.5)


def test_what_is_not_implemented_says_so_by_name() -> None:
    x = torch.ones(1, 2, 4, 16).npu().requires_grad_()
    with pytest.raises(NotImplementedError, match="aclnnDropoutGenMaskV2"):
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    with pytest.raises(NotImplementedError, match="aclnnDropoutGenMaskV2"):
        FailsInBackward.apply(x).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse_coo"):
        torch.eye(3).npu().to_sparse()


# ---- random numbers --------------------------------------------------------------------------------------------------

RANDOM: dict[str, Callable[[], Tensor]] = {
    "randn": lambda: torch.randn(50, device="npu"),
    "rand_like": lambda: torch.rand_like(torch.ones(50, device="npu")),
    "randint": lambda: torch.randint(0, 1000, (50,), device="npu"),
    "randperm": lambda: torch.randperm(50, device="npu"),
    "bernoulli": lambda: torch.bernoulli(torch.full((50,), 0.5, device="npu")),
    "multinomial": lambda: torch.multinomial(torch.ones(50, device="npu"), 20),
    "normal_": lambda: torch.empty(50, device="npu").normal_(),
    "uniform_": lambda: torch.empty(50, device="npu").uniform_(1, 2),
    "exponential_": lambda: torch.empty(50, device="npu").exponential_(),
    "normal": lambda: torch.normal(torch.zeros(50, device="npu"), 1.0),
    "dropout": lambda: F.dropout(torch.ones(50, device="npu")),
    "rrelu": lambda: F.rrelu(-torch.ones(50, device="npu"), training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_repeat_with_their_seed(name: str) -> None:
    draw = RANDOM[name]
    host_state = torch.get_rng_state()
    torch.npu.manual_seed(1)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), host_state)
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    state = torch.npu.get_rng_state()
    assert torch.equal(draw(), second)
    torch.npu.set_rng_state(state)
    with torch.random.fork_rng(device_type="npu"):
        assert torch.equal(draw(), second)
    assert torch.equal(draw(), second)


def test_generators() -> None:
    generator = torch.Generator("npu").manual_seed(7)
    first, second = (torch.randn(5, device="npu", generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.randn(5, device="npu", generator=generator.manual_seed(7)), first)


def test_dropout_scales_what_it_keeps() -> None:
    x = torch.ones(10_000).npu().requires_grad_()
    y = F.dropout(x, 0.25)
    y.sum().backward()
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert torch.equal(x.grad, y.detach())
    assert 0.23 < (y == 0).float().mean().item() < 0.27


# ---- modules and losses ----------------------------------------------------------------------------------------------

MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(8, 4), lambda: torch.randn(2, 3, 8)),
    "layer_norm": (lambda: nn.LayerNorm(8), lambda: torch.randn(3, 8)),
    "rms_norm": (lambda: nn.RMSNorm(8), lambda: torch.randn(3, 8)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), lambda: torch.randn(2, 4, 8)),
    "batch_norm": (lambda: nn.BatchNorm2d(3), lambda: torch.randn(2, 3, 8, 8)),
    "embedding": (lambda: nn.Embedding(10, 4), lambda: torch.tensor([1, 2, 2])),
    "embedding_bag": (lambda: nn.EmbeddingBag(10, 4), lambda: torch.tensor([[1, 2], [2, 3]])),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, groups=4), lambda: torch.randn(2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), lambda: torch.randn(2, 3, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3), lambda: torch.randn(2, 3, 8, 8, 8)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 3), lambda: torch.randn(2, 3, 8, 8)),
    "max_pool": (lambda: nn.MaxPool2d(2), lambda: torch.randn(1, 2, 6, 6)),
    "upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), lambda: torch.randn(1, 2, 4, 4)),
    "gelu": (lambda: nn.GELU("tanh"), lambda: torch.randn(3, 8)),
    "silu": (nn.SiLU, lambda: torch.randn(3, 8)),
    "softmax": (lambda: nn.Softmax(-1), lambda: torch.randn(3, 8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_same_results_and_gradients(name: str) -> None:
    make, make_input = MODULES[name]
    module, x = make(), make_input()
    x.requires_grad_(x.is_floating_point())
    on_device, x_npu = copy.deepcopy(module).to("npu"), to_npu(x)
    expected, result = tree_leaves(module(x))[0], tree_leaves(on_device(x_npu))[0]
    assert_same(result, expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    result.backward(grad.npu())
    for leaf, wanted in zip([x_npu, *on_device.parameters()], [x, *module.parameters()], strict=True):
        if wanted.grad is not None:
            assert_same(leaf.grad, wanted.grad)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda x, t, y: F.cross_entropy(x, t, label_smoothing=0.1),
    "cross_entropy_of_probabilities": lambda x, t, y: F.cross_entropy(x, y),
    "nll": lambda x, t, y: F.nll_loss(x.log_softmax(1), t),
    "l1": lambda x, t, y: F.l1_loss(x, y),
    "l1_sum": lambda x, t, y: F.l1_loss(x, y, reduction="sum"),
    "mse": lambda x, t, y: F.mse_loss(x, y),
    "smooth_l1": lambda x, t, y: F.smooth_l1_loss(x, y),
    "huber": lambda x, t, y: F.huber_loss(x, y),
    "bce": lambda x, t, y: F.binary_cross_entropy(x.sigmoid(), y),
    "bce_with_logits": lambda x, t, y: F.binary_cross_entropy_with_logits(x, y),
    "bce_with_logits_weighted": lambda x, t, y: F.binary_cross_entropy_with_logits(
        x, y, weight=y, pos_weight=y[0], reduction="none"
    ).sum(),
    "kl_div": lambda x, t, y: F.kl_div(x.log_softmax(1), y, reduction="batchmean"),
    "kl_div_mean": lambda x, t, y: F.kl_div(x.log_softmax(1), y * (y > 0.5)),
    "kl_div_log_target": lambda x, t, y: F.kl_div(x.log_softmax(1), y, log_target=True, reduction="sum"),
    "kl_div_of_target": lambda x, t, y: F.kl_div(y, x.exp(), reduction="sum"),
    "kl_div_of_log_target": lambda x, t, y: F.kl_div(y, x.log_softmax(1), log_target=True, reduction="sum"),
    "ctc": lambda x, t, y: F.ctc_loss(
        x[:, None].log_softmax(-1), torch.tensor([[1, 2]]).to(x.device), torch.tensor([4]), torch.tensor([2])
    ),
    "repeat_interleave": lambda x, t, y: x.repeat_interleave(2, 0).square().sum(),
    "repeat_interleave_tensor": lambda x, t, y: x[:, :4].repeat_interleave(t.clamp(min=0), 1).square().sum(),
    "renorm": lambda x, t, y: x.renorm(2, 0, 0.5).square().sum(),
    "fft": lambda x, t, y: torch.fft.irfft(torch.fft.rfft(x) * 2).square().sum(),
    "complex": lambda x, t, y: torch.view_as_real(torch.polar(x.abs(), y) * torch.complex(x, y)).square().sum(),
    "einsum": lambda x, t, y: torch.einsum("ij,kj->ik", x, y).square().sum(),
    "baddbmm": lambda x, t, y: torch.baddbmm(y[None, :, :4], x[None], y.t()[None]).square().sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_the_same_gradients(name: str) -> None:
    x, target, y = torch.randn(4, 5), torch.tensor([0, 2, 4, -100]), torch.rand(4, 5)
    x.requires_grad_()
    call = (x, target, y)
    on_device = to_npu(call)
    result, expected = LOSSES[name](*on_device), LOSSES[name](*call)
    assert_close(result, expected)
    result.backward()
    expected.backward()
    assert_close(on_device[0].grad, x.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "mask_of_batch", "additive", "scale", "shared_heads"])
def test_scaled_dot_product_attention(kind: str, dtype: torch.dtype) -> None:
    key_heads = 2 if kind == "shared_heads" else 4
    call = [torch.randn(2, heads, 7, 16).to(dtype).requires_grad_() for heads in (4, key_heads, key_heads)]
    options: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "mask": {"attn_mask": torch.ones(7, 7).tril().bool()},
        "mask_of_batch": {"attn_mask": (torch.rand(2, 1, 7, 7) > 0.5) | torch.eye(7).bool()},
        "additive": {"attn_mask": torch.randn(7, 7).to(dtype)},
        "scale": {"scale": 0.3},
        "shared_heads": {"enable_gqa": True},
    }
    kwargs = options.get(kind, {})
    on_device = to_npu(call)
    result = F.scaled_dot_product_attention(*on_device, **to_npu(kwargs))
    # the device adds in float32
    wide = [tensor.detach().float().requires_grad_() for tensor in call]
    if kind == "additive":
        kwargs = {"attn_mask": kwargs["attn_mask"].float()}
    expected = F.scaled_dot_product_attention(*wide, **kwargs)
    grad = torch.randn_like(expected).to(dtype)
    result.backward(grad.npu())
    expected.backward(grad.float())
    assert_rounded([result, *(leaf.grad for leaf in on_device)], [expected, *(leaf.grad for leaf in wide)])


def assert_rounded(results: list[Tensor], expected: list[Tensor]) -> None:
    """Equal up to the rounding of their dtype, of numbers about one."""
    for result, wanted in zip(results, expected, strict=True):
        eps = max(torch.finfo(result.dtype).eps, 1e-6)
        torch.testing.assert_close(result.detach().cpu().float(), wanted.detach(), rtol=4 * eps, atol=4 * eps)


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4)])
def test_double_backward(shape: tuple[int, ...]) -> None:
    def second(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad((x @ weight).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, weight))

    call = (torch.randn(shape, requires_grad=True), torch.randn(4, 4, requires_grad=True))
    assert_close(second(*to_npu(call)), second(*call))


@pytest.mark.parametrize("shapes", [((4,), (4,)), ((4,), (4, 3)), ((4,), (2, 4, 3)), ((3, 4), (4,)), ((3, 4), (4, 2)),
                                    ((2, 3, 4), (4,)), ((2, 3, 4), (4, 2)), ((3, 4), (2, 4, 3)),
                                    ((5, 1, 3, 4), (2, 4, 3))])  # fmt: skip
def test_gradients_of_matmul(shapes: tuple[tuple[int, ...], ...]) -> None:
    def gradients(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((x @ other).square().sum(), (x, other))

    call = [torch.randn(shape, requires_grad=True) for shape in shapes]
    assert_close(gradients(*to_npu(call)), gradients(*call))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_dropout(use_reentrant: bool) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).to("npu")
    x = torch.randn(5, 4).npu().requires_grad_()
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    torch.manual_seed(1)
    checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(3).npu() * 2
        x.add_(1)
        assert x.view(3, 1)[0].is_inference()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_modules(backend: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4)).to("npu")
    x = torch.randn(2, 3).npu().requires_grad_()
    result = torch.compile(module, backend=backend)(x)
    torch.testing.assert_close(result, module(x))
    (grad,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(module(x).sum(), x)[0])


# ---- optimizers, mixed precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_optimizers(optimizer: type[torch.optim.Optimizer], options: dict[str, bool]) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    on_device, x = copy.deepcopy(module).to("npu"), torch.randn(5, 4)
    for model, batch in ((module, x), (on_device, x.npu())):
        steps = optimizer(model.parameters(), lr=0.01, **options)  # type: ignore[call-arg]
        for _ in range(3):
            steps.zero_grad()
            model(batch).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            steps.step()
    assert_same(list(on_device.parameters()), list(module.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaler", ["torch", "torch_npu"])
def test_mixed_precision(dtype: torch.dtype, scaler: str) -> None:
    import torch_npu

    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).to("npu")
    steps = torch.optim.AdamW(module.parameters())
    scaling = torch.amp.GradScaler("npu") if scaler == "torch" else torch_npu.npu.amp.GradScaler()
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(3, 4).npu()
    with torch.autocast("npu", dtype=dtype), torch.autocast("cpu", enabled=False):
        y = module(x)
    assert y.dtype == dtype
    scaling.scale(y.float().square().mean()).backward()
    scaling.unscale_(steps)
    scaling.step(steps)
    scaling.update()
    after = copy.deepcopy(module.state_dict())
    assert not torch.equal(after["0.weight"], before["0.weight"])
    scale = scaling.get_scale()
    scaling.scale((module(x) * float("inf")).sum()).backward()
    scaling.step(steps)
    scaling.update()
    assert scaling.get_scale() < scale
    assert torch.equal(module.state_dict()["0.weight"], after["0.weight"])


def test_the_cpus_autocast_does_not_reach_the_device() -> None:
    x = torch.ones(2, 2).npu()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.float32


# ---- memory, storage, device -----------------------------------------------------------------------------------------


def test_saving_copying_and_pickling() -> None:
    module = nn.Linear(3, 4).to("npu")
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded["weight"].device.type == "npu"
    assert torch.equal(loaded["weight"], module.weight)
    file.seek(0)
    on_host = torch.load(file, map_location="cpu")
    assert on_host["weight"].device.type == "cpu"
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.weight.zero_()
    assert torch.equal(module.weight.cpu(), on_host["weight"])
    copied.load_state_dict(on_host)
    assert torch.equal(copied.weight, module.weight)
    assert torch.equal(pickle.loads(pickle.dumps(module.weight)), module.weight)
    x = torch.randn(3).npu()
    whole, part = copy.deepcopy((x, x[1:]))
    whole[1] = 7
    assert part[0].item() == 7


def test_pinned_memory_and_loaders() -> None:
    pinned = torch.randn(3).pin_memory()
    assert pinned.is_pinned()
    x = pinned.to("npu", non_blocking=True)
    back = torch.empty(3).pin_memory()
    back.copy_(x, non_blocking=True)
    torch.npu.synchronize()
    assert torch.equal(back, pinned)
    data = torch.randn(10, 3)
    batches = [batch for (batch,) in DataLoader(TensorDataset(data), 4, pin_memory=True)]
    assert all(batch.is_pinned() for batch in batches)
    assert torch.equal(torch.cat([batch.npu() for batch in batches]).cpu(), data)


def zeros_like(x: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=x.dtype, device=x.device)


def changed(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """What a tensor is after a change in place."""

    def run(x: Tensor) -> Tensor:
        change(x)
        return x

    return run


# of ``[6, 8]``; while jit_compile is set, torch_npu copies with graph operators
STRIDED_COPIES: dict[str, Callable[[Tensor], Any]] = {
    "row = number": changed(lambda x: x.__setitem__(3, 0)),
    "element = number": changed(lambda x: x.__setitem__((3, 5), 0)),
    "rows = number": changed(lambda x: x.__setitem__(slice(2, 4), 1)),
    "every second column = number": changed(lambda x: x.__setitem__((slice(None), slice(None, None, 2)), 0)),
    "every second row = number": changed(lambda x: x.__setitem__(slice(1, None, 2), 5)),
    "block = number": changed(lambda x: x.__setitem__((slice(1, 4), slice(2, 6)), 5)),
    "columns = columns": changed(lambda x: x[:, 4:].copy_(x[:, :4])),
    "rows = rows": changed(lambda x: x[3:].copy_(x[:3])),
    "row = column": changed(lambda x: x[2, :6].copy_(x[:, 7])),
    "column = row": changed(lambda x: x[:, 3].copy_(x[5, :6])),
    "rows = row": changed(lambda x: x[:3].copy_(x[4].clone())),
    "columns = column": changed(lambda x: x[:, :3].copy_(x[:, 6:7].clone())),
    "transposed = contiguous": changed(lambda x: x.t().copy_(torch.arange(48, device=x.device).view(8, 6))),
    "diagonal = number": changed(lambda x: x.diagonal().fill_(7)),
    "diagonal = row": changed(lambda x: x.diagonal().copy_(x[5, :6].clone())),
    "view = other dtype": changed(lambda x: x[::2, 1:4].copy_(torch.arange(9, device=x.device).view(3, 3))),
    "view = host": changed(lambda x: x[1:5:2, ::3].copy_(torch.arange(6).view(2, 3))),
    "expand": lambda x: x[0].expand(3, 8).contiguous(),
    "expand columns": lambda x: x[:, :1].expand(6, 4).contiguous(),
    "expand contiguous columns": lambda x: x[:, :1].contiguous().expand(6, 4).contiguous(),
    "expand whole": lambda x: x.expand(2, 6, 8).contiguous(),
    "expand scalar": lambda x: x[2, 3].expand(4, 5).contiguous(),
    "every second": lambda x: x[::2, ::2].contiguous(),
    "every second row": lambda x: x[::2].contiguous(),
    "every third row from one": lambda x: x[1::3].contiguous(),
    "every second matrix": lambda x: x.view(6, 2, 4)[1::2].contiguous(),
    "uneven step": lambda x: x[:5:4].contiguous(),
    "column": lambda x: x[1:, 3].contiguous(),
    "whole column": lambda x: x[:, 3].contiguous(),
    "columns": lambda x: x[:, 2:5].contiguous(),
    "block": lambda x: x[1:4, 2:5].clone(),
    "select": lambda x: x.view(2, 3, 8)[:, 1].contiguous(),
    "select of a copy": lambda x: x.view(2, 3, 8).clone()[:, 1].contiguous(),
    "select last": lambda x: x.view(2, 3, 8)[..., 5].contiguous(),
    "transposed": lambda x: x.t().contiguous(),
    "part of transposed": lambda x: x.t()[1:5, ::2].contiguous(),
    "permuted": lambda x: x.view(2, 3, 8).permute(2, 0, 1).contiguous(),
    "permuted part": lambda x: x.view(2, 3, 2, 4)[:, 1:, :, ::2].permute(3, 1, 0, 2).contiguous(),
    "windows": lambda x: x.unfold(0, 2, 1).contiguous(),
    "windows of rows": lambda x: x.unfold(1, 3, 2).contiguous(),
    "as_strided": lambda x: x.as_strided((3, 4), (5, 2), x.storage_offset() + 7).contiguous(),
    "diagonal": lambda x: x.diagonal().contiguous(),
    "reshape": lambda x: x[:, 1:].reshape(-1),
    "reshape transposed": lambda x: x.t().reshape(4, 12),
    "to other dtype": lambda x: x.t().to(torch.int32),
    "part to other dtype": lambda x: x[::2, 1:].to(torch.int32),
    "bytes": lambda x: x.view(torch.uint8)[:, ::3].contiguous(),
    "bytes = number": changed(lambda x: x.view(torch.uint8)[:, -1:].zero_()),
    "bytes = bytes": changed(lambda x: x.view(torch.uint8)[3:, -3:].copy_(x.view(torch.uint8)[:3, :3])),
    "other = part": lambda x: zeros_like(x, 3, 4).copy_(x[::2, ::2]),
    "part of other = part": changed(lambda x: zeros_like(x, 4, 9)[1:, ::2][:, :4].copy_(x[::2, ::2])),
    "to host": lambda x: x[::2, 1:].cpu(),
    "representation": lambda x: re.sub(", device='npu:0'", "", repr(x[::2, 1:])),
    "list": lambda x: x[1::2, ::3].tolist(),
    "nothing": lambda x: x[:, 3:3].contiguous(),
    "nothing = number": changed(lambda x: x.__setitem__((slice(None), slice(3, 3)), 1)),
}


@pytest.fixture
def _jit_compile(npu: torch.device) -> Iterator[None]:
    was_off = torch.npu.is_jit_compile_false()
    torch.npu.set_compile_mode(jit_compile=True)
    yield
    torch.npu.set_compile_mode(jit_compile=not was_off)


@pytest.mark.usefixtures("_jit_compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("copy", STRIDED_COPIES.values(), ids=STRIDED_COPIES)
def test_strided_copies_with_jit_compile(copy: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    x = (torch.arange(48) % 7).view(6, 8).to(dtype)
    # an offset of the whole, and elements behind it that no copy may reach
    memory = torch.arange(64).to(dtype).npu()
    on_device = memory[8:56].copy_(x.flatten().npu()).view(6, 8)
    around = memory[:8].tolist(), memory[56:].tolist()
    for tensor in (x.npu(), on_device):
        actual, expected = copy(tensor), copy(x.clone())
        if isinstance(expected, Tensor):
            assert actual.dtype == expected.dtype
            assert torch.equal(actual.cpu(), expected)
        else:
            assert actual == expected
    assert (memory[:8].tolist(), memory[56:].tolist()) == around


@pytest.mark.usefixtures("_jit_compile")
def test_masks_of_a_strided_slice_are_refused() -> None:
    import torch_npu

    x = torch.arange(48.0).view(6, 8).npu()
    assert torch.equal(torch_npu.npu_indexing(x, [1, 2], [5, 8], [2, 3]).cpu(), x.cpu()[1:5:2, 2:8:3])
    with pytest.raises(NotImplementedError, match="begin_mask"):
        torch_npu.npu_indexing(x, [1, 2], [5, 8], [2, 3], begin_mask=1)


def test_streams_and_events() -> None:
    stream = torch.npu.Stream()
    begin, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    with torch.npu.stream(stream):
        begin.record()
        x = torch.ones(3).npu() * 2
        end.record()
    torch.npu.current_stream().wait_stream(stream)
    x.record_stream(stream)
    end.synchronize()
    stream.synchronize()
    assert begin.query() and stream.query()
    assert begin.elapsed_time(end) >= 0


def test_device_properties() -> None:
    properties = torch.npu.get_device_properties(0)
    assert (properties.name, properties.total_memory) == ("Ascend910B1", 64 << 30)
    assert torch.npu.is_available()
    assert torch.npu.current_device() == 0
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    free, total = torch.npu.mem_get_info()
    assert 0 < free <= total == 64 << 30
    before = torch.npu.memory_allocated()
    x = torch.empty(1 << 20, dtype=torch.uint8, device="npu")
    assert torch.npu.memory_allocated() - before >= 1 << 20
    del x
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() >= before + (1 << 20)
    torch.npu.empty_cache()


def test_default_device() -> None:
    torch.set_default_device("npu")
    try:
        layer = nn.Linear(2, 2)
        layer(torch.randn(1, 2)).sum().backward()
        x = torch.ones(4, requires_grad=True)
        x.repeat_interleave(torch.tensor([1, 2, 1, 1])).sum().backward()
    finally:
        torch.set_default_device(None)
    assert layer.weight.grad.device.type == "npu"
    assert x.grad.tolist() == [1.0, 2.0, 1.0, 1.0]


def test_a_host_view_keeps_its_memory() -> None:
    x = torch.ones(1000).npu()
    view = aten.host_view(x)
    allocated = torch.npu.memory_allocated()
    del x
    assert torch.npu.memory_allocated() == allocated
    assert view.sum().item() == 1000
    del view
    assert torch.npu.memory_allocated() < allocated


def test_nothing_is_left_of_calls_that_succeed_or_fail() -> None:
    import torch_npu

    x, weight = torch.randn(8, 16).npu(), torch.randn(16, 16).npu()
    ids, query = torch.tensor([0, 1, 2]).npu(), torch.ones(1, 2, 4, 16).npu()

    def calls() -> None:
        leaf = x.clone().requires_grad_()
        (leaf @ weight).sum().backward()
        F.one_hot(ids, 5)
        x.t().contiguous().half().cpu().npu()
        torch.add(x, 1, out=torch.empty(0).npu())
        for fails in (
            lambda: x @ x,
            lambda: F.one_hot(ids, 5).to_sparse(),
            lambda: F.scaled_dot_product_attention(query, query, query, dropout_p=0.5),
            lambda: torch_npu.npu_fusion_attention(query, query, query, 2, "BNSD", sparse_mode=6),
        ):
            with pytest.raises((RuntimeError, NotImplementedError)) as error:
                fails()
            assert str(error.value)

    def measure() -> tuple[int, int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        runtime = simulated.runtime()
        runtime.moe_npu_sim_num_descriptors.restype = ctypes.c_uint64
        return pages, torch.npu.memory_allocated(), runtime.moe_npu_sim_num_descriptors()

    for _ in range(100):
        calls()
    pages, allocated, descriptors = measure()
    for _ in range(500):
        calls()
    more_pages, more_allocated, more_descriptors = measure()
    assert (more_allocated, more_descriptors) == (allocated, descriptors)
    assert more_pages - pages < 100  # less than a kilobyte a call
