"""Hugging Face checkpoint folders: what they hold, and writing one tensor at a time.

Only safetensors and JSON are read; both are treated as untrusted: file names may not leave the folder, JSON is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 256 * 2**20

# safetensors' spelling of the dtypes that may occur in a checkpoint that we read or write
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk: its name, file, dtype and shape."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return num_bytes(self.dtype, self.shape)


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ``dtype`` and ``shape``."""
    return torch.Size(shape).numel() * dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ValueError: not JSON, not an object, or larger than 256 MiB.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; JSON files of a checkpoint may have {_MAX_JSON_BYTES}"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(value).__name__}")
    return value


class Checkpoint:
    """A folder with ``config.json`` and safetensors weights, sharded or not.

    Args:
        folder: the checkpoint.

    Raises:
        FileNotFoundError: the folder, its config or its weights do not exist.
        ValueError: a file is damaged, or the index names a file outside the folder or a tensor that no file holds.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not a folder; give the folder of a Hugging Face checkpoint")
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"{self.folder} has no config.json; is it the folder of a Hugging Face checkpoint?")
        self.config = read_json(self.folder / "config.json")
        self.tensors = {info.name: info for info in self._read_infos()}

    def _weight_files(self) -> tuple[list[Path], dict[str, str] | None]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / WEIGHTS).is_file():
                raise FileNotFoundError(
                    f"{self.folder} has neither {WEIGHTS} nor {INDEX}; only safetensors checkpoints are read"
                )
            return [self.folder / WEIGHTS], None
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or name in (".", ".."):
                raise ValueError(f"{index} names the file {name!r}; weight files must lie in the folder itself")
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{index} names {name}, which is missing in {self.folder}")
        return [self.folder / name for name in names], weight_map

    def _read_infos(self) -> Iterator[TensorInfo]:
        files, weight_map = self._weight_files()
        seen: set[str] = set()
        for file in files:
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    if weight_map is not None and weight_map.get(name) != file.name:
                        raise ValueError(f"{file} holds {name}, which {INDEX} places in {weight_map.get(name)}")
                    part = tensors.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise ValueError(f"{file} holds {name} of dtype {part.get_dtype()}, which is not supported")
                    seen.add(name)
                    yield TensorInfo(name, file, _DTYPES[part.get_dtype()], tuple(part.get_shape()))
        missing = sorted(set(weight_map or ()) - seen)
        if missing:
            raise ValueError(f"{self.folder / INDEX} lists {missing[0]}, which no file holds ({len(missing)} missing)")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, read from its file."""
        with _open(self.tensors[name].file) as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is not a valid safetensors file: {error}") from None


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, in the announced order, holding none of them.

    Args:
        file: open for writing bytes.
        layout: name, dtype and shape of every tensor, in the order in which they will come.
    """

    def __init__(self, file: BinaryIO, layout: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape in layout:
            end = offset + num_bytes(dtype, shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        file.write(len(text).to_bytes(8, "little") + text)
        self._file = file
        self._expected = iter(layout)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor of the layout."""
        expected = next(self._expected, None)
        actual = (name, tensor.dtype, tuple(tensor.shape))
        if expected != actual:
            raise AssertionError(f"the layout has {expected} next, but {actual} came")
        if tensor.numel():
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Check that every tensor of the layout came."""
        missing = next(self._expected, None)
        if missing is not None:
            raise AssertionError(f"the layout has {missing} next, but nothing came")
