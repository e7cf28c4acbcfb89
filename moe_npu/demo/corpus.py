"""Real text that every machine with Python has: the sources of its standard library."""

from __future__ import annotations

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

# byte b is token b + 3: transformers' byte-level ByT5Tokenizer, whose first three ids are pad, end and unknown
BYTE_OFFSET = 3
VOCAB_SIZE = 256 + BYTE_OFFSET

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "config"}
_HELD_OUT_SHARE = 20  # every twentieth file, chosen by the checksum of its name
_MIN_BYTES = 1_000_000


@dataclass(frozen=True)
class Corpus:
    """Token ids of the training files and of the held-out files, each one long tensor int64 ``[n]``."""

    train: torch.Tensor
    held_out: torch.Tensor
    num_train_files: int
    num_held_out_files: int

    @classmethod
    def load(cls, folder: Path | None = None) -> Corpus:
        """All ``.py`` files below ``folder``, by default of the standard library, without its tests.

        Raises:
            FileNotFoundError: there are less than a million bytes of them.
        """
        folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
        files = sorted(
            file for file in folder.rglob("*.py") if _LEFT_OUT.isdisjoint(file.relative_to(folder).parts[:-1])
        )
        parts: dict[bool, list[bytes]] = {True: [], False: []}
        for file in files:
            name = file.relative_to(folder).as_posix()
            parts[zlib.crc32(name.encode()) % _HELD_OUT_SHARE == 0].append(file.read_bytes())
        if sum(map(len, parts[False])) < _MIN_BYTES or not parts[True]:
            raise FileNotFoundError(
                f"{folder} holds too few Python sources to train on; is the standard library zipped?"
            )
        return cls(encode(b"".join(parts[False])), encode(b"".join(parts[True])), len(parts[False]), len(parts[True]))

    def batch(self, batch_size: int, length: int, *, seed: int, step: int) -> torch.Tensor:
        """Random windows ``[batch_size, length]`` of the training files; the same for the same seed and step."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(self.train.numel() - length, (batch_size,), generator=generator)
        return torch.stack([self.train[start : start + length] for start in starts.tolist()])

    def held_out_windows(self, number: int, length: int) -> torch.Tensor:
        """``[number, length]`` windows spread evenly over the held-out files, without overlap where there is room."""
        last = self.held_out.numel() - length
        starts = torch.linspace(0, last, number).long()
        return torch.stack([self.held_out[start : start + length] for start in starts.tolist()])


def encode(text: bytes) -> torch.Tensor:
    """Token ids of bytes, int64 ``[n]``."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64) + BYTE_OFFSET


def decode(ids: torch.Tensor) -> str:
    """The text of token ids; what is no byte or no UTF-8 is replaced."""
    return bytes(value - BYTE_OFFSET for value in ids.tolist() if value >= BYTE_OFFSET).decode(errors="replace")
