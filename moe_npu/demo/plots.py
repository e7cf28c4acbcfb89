"""The picture of the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_npu.demo.training import History


def plot_loss(history: History, path: Path) -> None:
    """Training and held-out loss, and the load-balancing loss, over the steps."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(history.train) + 1)
    axes.plot(steps, history.train, color="tab:blue", linewidth=1, label="training batch")
    axes.plot(list(history.held_out), list(history.held_out.values()), "o-", color="tab:orange", label="held-out files")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy [bits per byte]")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    balance = axes.twinx()
    balance.plot(steps, history.balance, color="tab:green", linewidth=1, alpha=0.7, label="load balance (1 = even)")
    balance.set_ylabel("load-balancing loss / top-k")
    balance.set_ylim(0.9, max(2.0, *history.balance))
    lines = [*axes.get_lines(), *balance.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    axes.set_title("Qwen3-MoE on the Python standard library")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the user's pyplot alone
    figure.savefig(path, dpi=150)
