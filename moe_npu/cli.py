"""The ``moe-npu`` command: a thin face over functions of the package."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe_npu.quant import get_scheme, quantize_checkpoint, scheme_names
from moe_npu.quant.inspection import inspect_checkpoint
from moe_npu.sim import SimulatorError, launcher

app = typer.Typer(
    help="Mixture-of-Experts models on Ascend NPUs and CPUs: quantize checkpoints, look into them, run a demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# the registry decides which schemes there are; --help lists them
_Scheme = Enum("_Scheme", {name: name for name in scheme_names()}, type=str)  # type: ignore[misc]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for models, pictures and results; run again to resume.")] = Path(
        "demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and the batches.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, npu, npu:1, ...")] = "cpu",
) -> None:
    """Train a small MoE on real text, quantize it, compare.

    Trains transformers' Qwen3-MoE on the sources of the Python standard library, saves it as a Hugging Face
    checkpoint, quantizes that to W8A8 and W4A16, evaluates all three on held-out files and lets each continue a prompt.
    Takes a few minutes on two CPU cores.
    """
    try:
        from moe_npu.demo.run import run_demo  # transformers and matplotlib are needed for this command only
        from moe_npu.demo.training import Settings
    except ModuleNotFoundError as error:
        raise ValueError(f"the demo needs {error.name}; install it with pip install 'moe-npu[demo]'") from None
    run_demo(out, settings=Settings(steps=steps, seed=seed), device=device)


@app.command()
def quantize(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of a Hugging Face checkpoint (config.json, safetensors).")
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must not exist.")],
    scheme: Annotated[_Scheme, typer.Option(help="How to store the experts.")],
    group_size: Annotated[
        int | None, typer.Option(min=2, help="w4a16: input features that share a scale (default 128).")
    ] = None,
) -> None:
    """Quantize the experts of a checkpoint.

    Everything but the routed experts is copied bit for bit.

    w8a8: int8 weights, one scale per output channel; activations are rounded to int8 per token when it runs.

    w4a16: int4 weights, one scale per group of input features; activations stay as they are.

    The result loads with transformers' from_pretrained after `import moe_npu`. Tensors are converted one by one; DST
    appears when it is complete, or not at all.
    """
    options: dict[str, Any] = {} if group_size is None else {"group_size": group_size}
    console = Console()
    progress = Progress(
        TextColumn("Quantizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console, transient=True
    )
    task = progress.add_task("quantizing", total=None)

    def on_progress(done: int, total: int, _: str) -> None:
        progress.start()  # at the first tensor: an error before it stays alone on the screen
        progress.update(task, completed=done, total=total)

    try:
        report = quantize_checkpoint(src, dst, get_scheme(scheme.value, **options), on_progress=on_progress)
    finally:
        if progress.live.is_started:
            progress.stop()
    table = Table(title=f"{src} -> {dst}, {report.scheme}")
    table.add_column("layer")
    table.add_column("SNR of expert weights [dB]", justify="right")
    for layer, snr in report.snr_db.items():
        table.add_row(layer or "-", f"{snr:.2f}")
    console.print(table)
    console.print(
        f"{report.num_quantized} tensors quantized, {report.num_copied} copied; "
        f"{report.bytes_before / 1e6:,.2f} MB -> {report.bytes_after / 1e6:,.2f} MB "
        f"({report.bytes_after / report.bytes_before:.0%})"
    )


@app.command()
def inspect(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of a Hugging Face checkpoint, quantized by us or not.")
    ],
) -> None:
    """Show what a checkpoint holds.

    Its experts, the shapes and dtypes of all tensors, and where the bytes are; no weight is read.
    """
    summary = inspect_checkpoint(src)
    console = Console()
    table = Table(title=str(src), box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column, justify in (
        ("tensors", "left"),
        ("dtype", "left"),
        ("shape", "left"),
        ("number", "right"),
        ("size", "right"),
        ("share", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in summary.rows:
        table.add_row(
            row.kind,
            row.dtype,
            row.shape,
            f"{row.number:,}",
            f"{row.num_bytes / 1e6:,.2f} MB",
            f"{row.num_bytes / max(1, summary.num_bytes):.1%}",
        )
    console.print(
        f"{summary.model_type}: {summary.num_layers} layer(s) with experts, {summary.num_experts} experts each, "
        f"{summary.quantization}, {summary.num_bytes / 1e6:,.2f} MB"
    )
    console.print(table)


@app.command()
def report(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="Folder of a Hugging Face checkpoint, or its config.json alone.")
    ],
    implementation: Annotated[
        str, typer.Option(help="The experts_implementation to load the model with: moe_npu, eager, grouped_mm, ...")
    ] = "moe_npu",
    accelerate: Annotated[
        bool, typer.Option("--accelerate", help="Show the model after moe_npu.accelerate(model, strict=False).")
    ] = False,
) -> None:
    """Show what would run in the MoE layers of a model.

    One row per kind of layer: its class, the implementation that really computes it, how its weights are stored, and
    why moe_npu does not compute it where that is so. Reads the configuration only: no weights are needed, and no code
    that comes with a checkpoint is run.

    Example: moe-npu report path/to/Qwen3-30B-A3B/config.json
    """
    try:
        from moe_npu.layers.hf_config import report_config  # transformers is needed for this command only
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the report needs {error.name}; install it with pip install 'moe-npu[transformers]'"
        ) from None
    # as it is: a table that is wider than the terminal is still one that other programs can read
    typer.echo(report_config(config, implementation=implementation, accelerated=accelerate))


@app.command(
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
    options_metavar="[OPTIONS]",
)
def sim(
    program: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SCRIPT [ARGS]...", help="What python gets: a file, -m MODULE or -c CODE, and arguments."
        ),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    compat: Annotated[
        bool, typer.Option("--compat", help="Accept calls for earlier releases of torch_npu, with a warning.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Simulate although CANN is installed.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Print what is installed and whether a smoke test passes.")
    ] = False,
) -> None:
    """Run a program on a simulated NPU.

    The unmodified torch_npu runs without an NPU and without CANN; its operators are computed by the CPU kernels of
    moe_npu.ops. For development and tests: it says nothing about the speed of a device. Needs torch_npu
    (pip install --no-deps torch-npu==2.13.0) and g++; the first start compiles for a few seconds.

    Example: moe-npu sim train.py --epochs 1
    """
    variables = launcher.environment(devices=devices, compat=compat, force=force)
    if not check:
        if not program:
            raise ValueError("name a program to run, e.g. moe-npu sim script.py, or use --check")
        launcher.run(program, variables)
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    findings = launcher.check(variables)
    for finding in findings:
        table.add_row("ok" if finding.is_fine else "NO", finding.what, finding.value)
    Console().print(table)
    if not all(finding.is_fine for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a mistake of the user is one sentence on standard error and exit code 2."""
    try:
        app()
    except (ValueError, OSError, SimulatorError) as error:
        sys.stderr.write(f"moe-npu: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
