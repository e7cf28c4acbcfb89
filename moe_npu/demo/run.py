"""Train, save, quantize, evaluate and generate; every stage is skipped when its result is there already."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, ByT5Tokenizer
from transformers.utils import logging as transformers_logging

from moe_npu.demo.corpus import Corpus
from moe_npu.demo.evaluation import Evaluation, evaluate, expert_load
from moe_npu.demo.plots import plot_loss
from moe_npu.demo.training import Settings, Trainer
from moe_npu.layers.stats import plot_expert_load
from moe_npu.quant import get_scheme, quantize_checkpoint

PROMPT = "    def __init__(self, name, value=None):\n"
_SETTINGS = "settings.json"
_SCHEMES = ("w8a8", "w4a16")


def run_demo(
    out: Path,
    *,
    settings: Settings | None = None,
    device: str = "cpu",
    num_windows: int = 96,
    num_tokens: int = 160,
    console: Console | None = None,
) -> list[Evaluation]:
    """Run the demo in the folder ``out``, or what is left of it.

    Args:
        out: made if it does not exist; holds ``model/``, ``w8a8/``, ``w4a16/``, ``loss.png``, ``expert_load.png``,
            ``results.json`` and the training state.
        settings: the model and its training.
        device: ``"cpu"``, ``"npu"`` or any other torch device.
        num_windows: held-out windows that are evaluated.
        num_tokens: tokens that are generated and timed.
        console: where to print.

    Returns:
        The figures of the float, W8A8 and W4A16 model.

    Raises:
        FileExistsError: ``out`` holds something else, or a run with other settings.
        ValueError: the device does not exist.
    """
    settings = Settings() if settings is None else settings
    console = Console() if console is None else console
    _check_device(device)
    _claim(out, settings)
    with _quiet_transformers():
        corpus = Corpus.load()
        windows = corpus.held_out_windows(num_windows, settings.sequence_length).to(device)
        console.print(
            f"Text: the Python standard library, {corpus.num_train_files} files, {corpus.train.numel() / 1e6:.1f} MB; "
            f"held out {corpus.num_held_out_files} files, {corpus.held_out.numel() / 1e6:.1f} MB",
            soft_wrap=True,
        )
        model_folder = out / "model"
        if model_folder.is_dir():
            console.print(f"Trained model found in {model_folder}")
        else:
            _train(settings, corpus, windows, out, device, console)
        for scheme in _SCHEMES:
            _quantize(model_folder, out / scheme, scheme, console)
        results = [
            _evaluate(name, out / folder, windows, device, num_tokens)
            for name, folder in (("float", "model"), *((scheme, scheme) for scheme in _SCHEMES))
        ]
    (out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    _print_results(results, console)
    console.print(f"Pictures: {out / 'loss.png'}, {out / 'expert_load.png'}")
    return results


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:  # torch knows "npu" only once torch_npu is there
        kind = device.split(":")[0]
    if kind != "cpu" and not (hasattr(torch, kind) and getattr(torch, kind).is_available()):
        hint = "; install torch_npu with pip install 'moe-npu[npu]'" if kind == "npu" else ""
        raise ValueError(f"there is no device {device!r} here{hint}")


def _claim(out: Path, settings: Settings) -> None:
    """Make ``out`` this run's folder, or check that it is."""
    path = out / _SETTINGS
    ours = asdict(settings)
    if path.is_file():
        theirs = json.loads(path.read_text())
        if theirs != ours:
            changed = ", ".join(
                f"{key} {theirs.get(key)} there, {value} here"
                for key, value in ours.items()
                if theirs.get(key) != value
            )
            raise FileExistsError(f"{out} holds a run with other settings ({changed}); choose another --out")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not the folder of a demo run; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ours, indent=2) + "\n")


def _train(settings: Settings, corpus: Corpus, windows: torch.Tensor, out: Path, device: str, console: Console) -> None:
    trainer = Trainer(settings, corpus, out, device)
    model = trainer.model
    total = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"Model: Qwen3-MoE, {settings.num_layers} layers, {settings.num_experts} experts, top-{settings.top_k}, "
        f"{total / 1e6:.1f} M parameters, experts_implementation={model.config._experts_implementation!r}, on {device}",
        soft_wrap=True,
    )
    if trainer.step:
        console.print(f"Resuming after step {trainer.step}")
    tokens_per_step = settings.batch_size * settings.sequence_length
    with Progress(
        TextColumn("Training"),
        BarColumn(bar_width=16),
        TextColumn("{task.completed}/{task.total}, {task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("training", total=settings.steps, completed=trainer.step, figures="")

        def on_step(state: Trainer) -> None:
            history = state.history
            bits = history.train[-1]
            speed = f"{state.step * tokens_per_step / history.seconds:,.0f} tokens/s"
            progress.update(task, completed=state.step, figures=f"{bits:.2f} bits/byte, {speed}")
            if state.step in history.held_out:
                progress.console.print(
                    f"step {state.step}: loss {bits * math.log(2):.3f}, {bits:.3f} bits/byte, held out "
                    f"{history.held_out[state.step]:.3f}, load balance {history.balance[-1]:.2f}, {speed}",
                    soft_wrap=True,
                )

        trainer.train(on_step)
    plot_loss(trainer.history, out / "loss.png")
    model.eval()
    plot_expert_load(
        expert_load(model, windows[:32]),
        out / "expert_load.png",
        title="Routed tokens per expert on held-out text, relative to an even split",
    )
    partial = out / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    ByT5Tokenizer(extra_ids=0).save_pretrained(partial)
    partial.rename(out / "model")


def _quantize(src: Path, dst: Path, scheme: str, console: Console) -> None:
    if dst.is_dir():
        console.print(f"Quantized model found in {dst}")
        return
    report = quantize_checkpoint(src, dst, get_scheme(scheme))
    snr = ", ".join(f"{value:.1f}" for value in report.snr_db.values())
    console.print(
        f"Quantized {report.num_quantized} expert weights to {scheme}: {report.bytes_before / 1e6:.1f} MB -> "
        f"{report.bytes_after / 1e6:.1f} MB, SNR per layer {snr} dB",
        soft_wrap=True,
    )


def _evaluate(name: str, folder: Path, windows: torch.Tensor, device: str, num_tokens: int) -> Evaluation:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="moe_npu")
    return evaluate(name, model.to(device).eval(), folder, windows, PROMPT, num_tokens)


def _print_results(results: list[Evaluation], console: Console) -> None:
    for result in results:
        console.rule(f"{result.scheme} continues", align="left")
        console.print(PROMPT + result.text, markup=False, highlight=False, soft_wrap=True)
    console.rule()
    table = Table(title="Held-out text and generation")
    table.add_column("scheme")
    for column in ("size on disk", "bits per byte", "Δ to float", "tokens/s generated"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.scheme,
            f"{result.num_bytes / 1e6:.2f} MB",
            f"{result.bits_per_byte:.4f}",
            f"{result.bits_per_byte - results[0].bits_per_byte:+.4f}",
            f"{result.tokens_per_second:.1f}",
        )
    console.print(table)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and advice out of ours."""
    verbosity: Any = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
