"""Whole checkpoints: quantize, read back, inspect; and everything that must be refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_npu import quant
from moe_npu.quant.checkpoint import INDEX, Checkpoint, SafetensorsWriter
from moe_npu.quant.formats import native
from moe_npu.quant.inspection import inspect_checkpoint
from tests.helpers.assertions import assert_bits_equal

SCHEMES = quant.scheme_names()


def qwen(**changes: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes}))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded bfloat16 checkpoint with a tokenizer file."""
    folder = tmp_path_factory.mktemp("source") / "model"
    qwen().to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    assert (folder / INDEX).is_file()
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_become_integers_and_the_rest_is_copied(source: Path, tmp_path: Path, scheme: str) -> None:
    dst = tmp_path / "quantized"
    calls = []
    report = quant.quantize_checkpoint(
        source, dst, quant.get_scheme(scheme), on_progress=lambda *call: calls.append(call)
    )
    before, after = Checkpoint(source), Checkpoint(dst)
    for name in before.tensors:
        if ".experts." not in name:
            assert_bits_equal(after.read(name), before.read(name))
            continue
        expected = quant.get_scheme(scheme).quantize(before.read(name))
        assert_bits_equal(after.read(name), expected.weight)
        assert_bits_equal(after.read(name + "_scale"), expected.scale)
    assert report.num_quantized == 2 * 4 * 3
    assert report.num_quantized + report.num_copied == len(before.tensors)
    assert report.bytes_before == before.num_bytes == calls[-1][0] == calls[-1][1]
    assert report.bytes_after == after.num_bytes
    assert [call[2] for call in calls] == list(before.tensors)
    assert sorted(file.name for file in dst.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    config = json.loads((dst / "config.json").read_text())
    assert config.pop("quantization_config")["scheme"] == scheme
    assert config == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_snr_of_the_report_is_that_of_the_weights(source: Path, tmp_path: Path, scheme: str) -> None:
    report = quant.quantize_checkpoint(source, tmp_path / "quantized", quant.get_scheme(scheme))
    before, after = Checkpoint(source), Checkpoint(tmp_path / "quantized")
    for layer in (0, 1):
        signal = noise = 0.0
        for name in before.tensors:
            if f"layers.{layer}.mlp.experts." in name:
                weight = before.read(name).double()
                codes = after.read(name)
                codes = quant.unpack_int4(codes) if codes.dtype == torch.int32 else codes
                scale = after.read(name + "_scale").double()
                restored = codes.double() * scale.repeat_interleave(weight.size(1) // scale.size(1), 1)
                signal += weight.square().sum().item()
                noise += (weight - restored).square().sum().item()
        assert math.isclose(report.snr_db[f"model.layers.{layer}"], 10 * math.log10(signal / noise), rel_tol=1e-6)
    assert report.snr_db["model.layers.0"] > {"w8a8": 40, "w4a16": 15}[scheme]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_loads_runs_and_saves_it(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    model = qwen().to(dtype).eval()
    model.save_pretrained(tmp_path / "float")
    quant.quantize_checkpoint(
        tmp_path / "float",
        tmp_path / "quantized",
        quant.get_scheme(scheme, **({"group_size": 16} if scheme == "w4a16" else {})),
    )
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert quantized.config._experts_implementation == "moe_npu"
    experts = quantized.model.layers[1].mlp.experts
    assert experts.gate_up_proj.dtype in (torch.int8, torch.int32)
    restored = Checkpoint(tmp_path / "quantized")
    for layer, block in enumerate(model.model.layers):
        for expert in range(4):
            names = [f"model.layers.{layer}.mlp.experts.{expert}.{p}_proj.weight" for p in ("gate", "up", "down")]
            gate, up, down = (
                quant.get_scheme(scheme).dequantize(
                    quant.QuantizedWeight(restored.read(name), restored.read(name + "_scale"))
                )
                for name in names
            )
            block.mlp.experts.gate_up_proj.data[expert] = torch.cat([gate, up])
            block.mlp.experts.down_proj.data[expert] = down
    ids = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        actual, expected = quantized(ids).logits.float(), model(ids).logits.float()
    assert (actual - expected).norm() <= 0.02 * expected.norm()
    assert quantized.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 15)
    quantized.save_pretrained(tmp_path / "again")
    first, second = Checkpoint(tmp_path / "quantized"), Checkpoint(tmp_path / "again")
    assert set(first.tensors) == set(second.tensors)
    for name in first.tensors:
        assert_bits_equal(second.read(name), first.read(name))
    assert second.config["quantization_config"] == first.config["quantization_config"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_runs_without_no_grad_and_trains_what_can_be_trained(tmp_path: Path, scheme: str) -> None:
    qwen().to(torch.bfloat16).save_pretrained(tmp_path / "float")
    quant.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", quant.get_scheme(scheme))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    logits = model(torch.randint(0, 64, (1, 8))).logits
    passes = quant.get_scheme(scheme).passes_gradient
    assert logits.requires_grad == passes
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("experts" in name for name in trainable)
    assert bool(trainable) == passes
    if passes:
        logits.float().square().mean().backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float32_model_runs_with_quantized_experts(tmp_path: Path, scheme: str) -> None:
    model = qwen()
    model.save_pretrained(tmp_path / "float")
    quant.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", quant.get_scheme(scheme))
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert quantized.dtype == torch.float32
    ids = torch.randint(0, 64, (1, 8))
    with torch.no_grad():
        expected = model(ids).logits
        assert (quantized(ids).logits - expected).norm() <= 0.05 * expected.norm()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (quantized(ids).logits - expected).norm() <= 0.05 * expected.norm()


class TestDamagedQuantizedFolders:
    """Each would load with a warning at most, and compute nonsense."""

    @pytest.fixture
    def folder(self, source: Path, tmp_path: Path) -> Path:
        quant.quantize_checkpoint(source, tmp_path / "q", quant.get_scheme("w4a16"))
        return tmp_path / "q"

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            pytest.param(
                lambda tensors: {name: t for name, t in tensors.items() if not name.endswith("_scale")},
                "is missing",
                id="no-scales",
            ),
            pytest.param(
                lambda tensors: {name: t for name, t in tensors.items() if "experts" not in name},
                "holds no experts",
                id="no-experts",
            ),
            pytest.param(
                lambda tensors: {name: t.float() if t.dtype == torch.int32 else t for name, t in tensors.items()},
                "must be a w4a16 weight",
                id="float-codes",
            ),
            pytest.param(
                lambda tensors: {name: t[:1].clone() if "_scale" in name else t for name, t in tensors.items()},
                "must hold float scales",
                id="short-scales",
            ),
        ],
    )
    def test_is_refused(
        self, folder: Path, damage: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
    ) -> None:
        save_file(damage(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)


def test_mixtral_names(tmp_path: Path) -> None:
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
    ).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    assert any(name.endswith("experts.2.w3.weight") for name in Checkpoint(tmp_path / "float").tensors)
    report = quant.quantize_checkpoint(tmp_path / "float", tmp_path / "w8a8", quant.get_scheme("w8a8"))
    assert report.num_quantized == 9
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "w8a8")
    ids = torch.randint(0, 32, (1, 9))
    with torch.no_grad():
        actual, expected = quantized(ids).logits.float(), model(ids).logits.float()
    assert (actual - expected).norm() <= 0.03 * expected.norm()


def test_written_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "view": torch.arange(12, dtype=torch.int32).view(3, 4).T,
    }
    with (tmp_path / "x.safetensors").open("wb") as file:
        writer = SafetensorsWriter(file, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    loaded = load_file(tmp_path / "x.safetensors")
    assert list(loaded) == sorted(tensors)
    for name, tensor in tensors.items():
        assert_bits_equal(loaded[name], tensor.contiguous())


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        writer = SafetensorsWriter(file, [("a", torch.float32, (2,))])
        with pytest.raises(AssertionError, match="next"):
            writer.write("a", torch.zeros(3))
        writer = SafetensorsWriter(file, [("a", torch.float32, (2,))])
        with pytest.raises(AssertionError, match="nothing came"):
            writer.finish()


class TestInspect:
    def test_float(self, source: Path) -> None:
        summary = inspect_checkpoint(source)
        assert (summary.model_type, summary.num_layers, summary.num_experts) == ("qwen3_moe", 2, 4)
        assert summary.quantization == "not quantized"
        assert sum(row.num_bytes for row in summary.rows) == summary.num_bytes == Checkpoint(source).num_bytes
        (row,) = (row for row in summary.rows if row.kind == "model.layers.*.mlp.experts.*.down_proj.weight")
        assert (row.dtype, row.shape, row.number) == ("bfloat16", "[64, 32]", 8)

    def test_quantized(self, source: Path, tmp_path: Path) -> None:
        quant.quantize_checkpoint(source, tmp_path / "q", quant.get_scheme("w4a16", group_size=8))
        summary = inspect_checkpoint(tmp_path / "q")
        assert summary.quantization == "quantized by moe_npu to w4a16, group_size 8"
        assert {row.dtype for row in summary.rows if "experts" in row.kind} == {"int32", "bfloat16"}


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file(tensors, folder / "model.safetensors")
    return folder


EXPERT = "model.layers.0.mlp.experts.0.up_proj.weight"


class TestRefusals:
    """Every refusal names the rule, and leaves nothing behind."""

    def refuse(self, src: Path, error: type[Exception], message: str, scheme: str = "w8a8") -> None:
        dst = src.parent / "dst"
        with pytest.raises(error, match=message):
            quant.quantize_checkpoint(src, dst, quant.get_scheme(scheme))
        assert not dst.exists()
        assert not [file for file in src.parent.iterdir() if file.name.startswith(".")]

    def test_destination_exists(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "dst").mkdir()
        (tmp_path / "dst" / "precious").touch()
        with pytest.raises(FileExistsError, match="exists already"):
            quant.quantize_checkpoint(source, tmp_path / "dst", quant.get_scheme("w8a8"))
        assert [file.name for file in (tmp_path / "dst").iterdir()] == ["precious"]

    @pytest.mark.parametrize("inside", ["quantized", "new/.."])
    def test_destination_in_the_source(self, source: Path, inside: str) -> None:
        before = sorted(source.iterdir())
        with pytest.raises((ValueError, FileExistsError), match=r"lies inside|exists already"):
            quant.quantize_checkpoint(source, source / inside, quant.get_scheme("w8a8"))
        assert sorted(source.iterdir()) == before

    def test_no_folder(self, tmp_path: Path) -> None:
        self.refuse(tmp_path / "missing", FileNotFoundError, "is not a folder")

    def test_no_config(self, tmp_path: Path) -> None:
        (tmp_path / "src").mkdir()
        self.refuse(tmp_path / "src", FileNotFoundError, r"no config\.json")

    def test_no_weights(self, tmp_path: Path) -> None:
        (tmp_path / "src").mkdir()
        (tmp_path / "src" / "config.json").write_text("{}")
        self.refuse(tmp_path / "src", FileNotFoundError, "only safetensors checkpoints are read")

    def test_quantized_already(self, tmp_path: Path) -> None:
        src = checkpoint(
            tmp_path / "src", {EXPERT: torch.ones(8, 8)}, '{"quantization_config": {"quant_method": "fp8"}}'
        )
        self.refuse(src, ValueError, "quantized already .*fp8")

    def test_no_experts(self, tmp_path: Path) -> None:
        self.refuse(checkpoint(tmp_path / "src", {"lm_head.weight": torch.ones(8, 8)}), ValueError, "has no experts")

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            pytest.param("model.layers.0.mlp.experts.gate_up_proj", torch.ones(2, 8, 8), id="fused"),
            pytest.param("model.layers.0.mlp.experts.0.up_proj.bias", torch.ones(8), id="bias"),
            pytest.param("model.layers.0.mlp.experts.0.other.weight", torch.ones(8, 8), id="unknown-name"),
            pytest.param(
                "model.layers.0.mlp.experts.1.up_proj.weight", torch.ones(8, 8).to(torch.float8_e4m3fn), id="fp8"
            ),
        ],
    )
    def test_an_expert_left_unquantized(self, tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
        src = checkpoint(tmp_path / "src", {EXPERT: torch.ones(8, 8), name: tensor})
        self.refuse(src, ValueError, "would be left unquantized")

    def test_not_finite(self, tmp_path: Path) -> None:
        weight = torch.ones(8, 8)
        weight[3, 3] = math.inf
        self.refuse(checkpoint(tmp_path / "src", {EXPERT: weight}), ValueError, f"{EXPERT}.*finite")

    def test_a_shape_that_cannot_be_packed(self, tmp_path: Path) -> None:
        src = checkpoint(tmp_path / "src", {EXPERT: torch.ones(8, 12)})
        self.refuse(src, ValueError, rf"{EXPERT} \[8, 12\].*multiple of 8", "w4a16")

    def test_a_scale_in_the_way(self, tmp_path: Path) -> None:
        src = checkpoint(tmp_path / "src", {EXPERT: torch.ones(8, 8), EXPERT + "_scale": torch.ones(8)})
        self.refuse(src, ValueError, "would be left unquantized")

    def test_damaged_weights(self, tmp_path: Path) -> None:
        src = checkpoint(tmp_path / "src", {EXPERT: torch.ones(8, 8)})
        (src / "model.safetensors").write_bytes(b"\xff" * 64)
        self.refuse(src, ValueError, "not a valid safetensors file")

    @pytest.mark.parametrize(
        "text", ["{", "[]", "\udcff".encode("utf-8", "surrogatepass")], ids=["cut", "list", "utf8"]
    )
    def test_damaged_config(self, tmp_path: Path, text: str | bytes) -> None:
        src = checkpoint(tmp_path / "src", {EXPERT: torch.ones(8, 8)})
        (src / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        self.refuse(src, ValueError, r"config\.json")

    @pytest.mark.parametrize(
        ("index", "error", "message"),
        [
            pytest.param({"weight_map": {EXPERT: "../x.safetensors"}}, ValueError, "folder itself", id="escape"),
            pytest.param({"weight_map": {EXPERT: "/etc/passwd"}}, ValueError, "folder itself", id="absolute"),
            pytest.param({"weight_map": {EXPERT: "y.safetensors"}}, FileNotFoundError, "missing", id="missing-file"),
            pytest.param({"weight_map": [1]}, ValueError, "no weight_map", id="no-map"),
            pytest.param({"weight_map": {EXPERT: 3}}, ValueError, "no weight_map", id="no-name"),
            pytest.param(
                {"weight_map": {EXPERT: "model.safetensors", "b": "model.safetensors"}},
                ValueError,
                "which no file holds",
                id="missing-tensor",
            ),
            pytest.param({"weight_map": {"b": "model.safetensors"}}, ValueError, "places in None", id="stray-tensor"),
        ],
    )
    def test_index(self, tmp_path: Path, index: dict, error: type[Exception], message: str) -> None:
        src = checkpoint(tmp_path / "src", {EXPERT: torch.ones(8, 8)})
        (src / INDEX).write_text(json.dumps(index))
        self.refuse(src, error, message)

    def test_an_interruption_leaves_nothing(self, source: Path, tmp_path: Path) -> None:
        def interrupt(*_: object) -> None:
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quant.quantize_checkpoint(source, tmp_path / "dst", quant.get_scheme("w8a8"), on_progress=interrupt)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method"),
        ({"format_version": 2}, "format_version"),
        ({"scheme": None}, "scheme must be the name"),
        ({"scheme": "w2"}, "no quantization scheme"),
        ({"group_size": 4, "scheme": "w8a8"}, "does not take the option group_size; it takes none"),
        ({"group_size": 16.5}, "whole number"),
        ({"group_size": "8"}, "whole number"),
        ({"name": "x"}, "does not take the option name"),
    ],
)
def test_foreign_quantization_configs_are_refused(change: dict, message: str) -> None:
    config = {**native.quantization_config(quant.get_scheme("w4a16")), **change}
    with pytest.raises(ValueError, match=message):
        native.scheme_from_config(config)


def test_memory_is_bounded_by_a_few_tensors(tmp_path: Path) -> None:
    """The resident memory of a process that quantizes 256 MB in tensors of 4 MB grows by a small part of that."""
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": torch.randn(1024, 1024)
        for layer in range(8)
        for expert in range(8)
    }
    src = checkpoint(tmp_path / "src", tensors)
    code = (
        "import resource, sys, torch\n"
        "from moe_npu import quant\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "quant.get_scheme('w4a16').quantize(torch.randn(1024, 1024))\n"
        "before = peak()\n"
        "quant.quantize_checkpoint(sys.argv[1], sys.argv[2], quant.get_scheme('w4a16'))\n"
        "print(peak() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, src, tmp_path / "dst"], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(result.stdout) < 16 * 2**20 * 4 < (src / "model.safetensors").stat().st_size
