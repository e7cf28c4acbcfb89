"""The demo at a tiny size: its results, and that an interrupted run continues as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_npu.demo import run_demo
from moe_npu.demo.corpus import Corpus, decode, encode
from moe_npu.demo.training import Settings, Trainer

TINY = Settings(
    steps=6,
    batch_size=2,
    sequence_length=32,
    hidden_size=32,
    num_layers=2,
    num_experts=4,
    top_k=2,
    intermediate_size=16,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"module_{number}.py").write_text(f"def function_{number}(x):\n    return x\n" * 600)
    return Corpus.load(folder)


def test_corpus_is_split_by_file(corpus: Corpus, tmp_path: Path) -> None:
    assert corpus.num_train_files + corpus.num_held_out_files == 60
    assert corpus.num_held_out_files > 0
    assert "function_" in decode(corpus.train[:30])
    with pytest.raises(FileNotFoundError, match="too few Python sources"):
        Corpus.load(tmp_path)


def test_text_survives_the_tokens() -> None:
    text = "naïve ∑"
    assert decode(encode(text.encode())) == text


def test_batches_depend_on_seed_and_step_only(corpus: Corpus) -> None:
    first = corpus.batch(2, 8, seed=1, step=3)
    assert torch.equal(first, corpus.batch(2, 8, seed=1, step=3))
    assert not torch.equal(first, corpus.batch(2, 8, seed=1, step=4))
    assert not torch.equal(first, corpus.batch(2, 8, seed=2, step=3))


class InterruptError(Exception):
    """Stands for Ctrl-C."""


def test_an_interrupted_training_continues_exactly(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_npu.demo.training.CHECKPOINT_EVERY", 2)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Trainer(TINY, corpus, tmp_path / "a", "cpu")
    whole.train(lambda _: None)

    def interrupt(trainer: Trainer) -> None:
        if trainer.step == 5:  # one step after the last state that was kept
            raise InterruptError

    with pytest.raises(InterruptError):
        Trainer(TINY, corpus, tmp_path / "b", "cpu").train(interrupt)
    resumed = Trainer(TINY, corpus, tmp_path / "b", "cpu")
    assert resumed.step == 4
    resumed.train(lambda _: None)
    assert resumed.history.train == whole.history.train
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.parameters[name]), name


def test_whole_run(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Corpus, "load", classmethod(lambda cls: corpus))
    out = tmp_path / "out"
    console = Console(width=120, record=True, force_terminal=False)
    results = run_demo(out, settings=TINY, num_windows=4, num_tokens=6, console=console)
    assert [result.scheme for result in results] == ["float", "w8a8", "w4a16"]
    assert results[0].num_bytes > results[1].num_bytes > results[2].num_bytes
    for result in results[1:]:
        assert abs(result.bits_per_byte - results[0].bits_per_byte) < 0.05
    assert len(json.loads((out / "results.json").read_text())) == 3
    for picture in ("loss.png", "expert_load.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    text = console.export_text()
    assert "bits per byte" in text
    assert "tokens/s" in text

    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer("def", add_special_tokens=False).input_ids == encode(b"def").tolist()

    again = Console(width=120, record=True)
    assert [r.bits_per_byte for r in run_demo(out, settings=TINY, num_windows=4, num_tokens=6, console=again)] == [
        r.bits_per_byte for r in results
    ]
    assert "Trained model found" in again.export_text()

    with pytest.raises(FileExistsError, match="steps 6 there, 7 here"):
        run_demo(out, settings=Settings(**{**TINY.__dict__, "steps": 7}))


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    if getattr(torch, "npu", None):
        pytest.skip("there is an NPU here")
    with pytest.raises((ValueError, RuntimeError), match="install torch_npu"):
        run_demo(tmp_path / "out", device="npu")
    assert not (tmp_path / "out").exists()
