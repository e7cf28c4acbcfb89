"""Quantize the experts of a checkpoint to int8 and int4, load both again, and compare what they compute.

python examples/quantize_checkpoint.py [--device npu]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_npu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
    )
    ids = torch.randint(1000, (1, 64), device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "float")
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
        model.save_pretrained(source)
        with torch.no_grad():
            expected = model.to(args.device)(ids).logits.float()

        for scheme in ("w8a8", "w4a16"):
            # the same on the command line: moe-npu quantize SRC DST --scheme w8a8
            report = moe_npu.quantize_checkpoint(source, Path(folder, scheme), moe_npu.get_scheme(scheme))
            quantized = AutoModelForCausalLM.from_pretrained(Path(folder, scheme)).to(args.device).eval()
            with torch.no_grad():
                logits = quantized(ids).logits.float()
            error = (logits - expected).norm() / expected.norm()
            print(
                f"{scheme}: {report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB, weights "
                f"{min(report.snr_db.values()):.1f} dB, relative error of the logits {error:.3f}"
            )


if __name__ == "__main__":
    main()
