"""Tensors from a file that nobody vouches for: safetensors, PyTorch's pickles, TorchScript archives.

A pickle can run code, and so can TorchScript. Ordinary pickles go through torch's `weights_only`; of a TorchScript archive
only the module tree in its `data.pkl` is read, by an unpickler that knows tensors and plain containers, and its code is never
looked at. What a file claims about sizes is held against what it has before anything of that size is made.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from msclip.errors import UserError

Kind = Literal["safetensors", "pickle", "torchscript"]
WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Where training checkpoints of other programs keep the model's tensors."""
MARK = "msclip"
STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Archive:
    """What a file holds, names as they are there."""

    kind: Kind
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """The header of a safetensors file; of a pickled state dict, what msclip said beside the tensors."""


def read_metadata(file: Path) -> dict[str, str] | None:
    """The header's text values of a safetensors file; None for a file of another kind.

    Raises:
        UserError: it starts as one and is damaged.
    """
    if _kind(file) != "safetensors":
        return None
    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable safetensors file (damaged or cut short?): {error}") from None


def read_archive(file: Path) -> Archive:
    """The tensors of a file, on the CPU, mapped from the disk where that is possible.

    Raises:
        UserError: damaged, cut short, of an unknown kind, or holding more than tensors.
    """
    kind = _kind(file)
    if kind == "safetensors":
        metadata = read_metadata(file) or {}
        return Archive(kind, _checked(load_file(file), file), metadata)
    if kind == "torchscript":
        return Archive(kind, _checked(_read_torchscript(file), file))
    value = _read_pickle(file)
    return Archive(kind, _checked(_unwrapped(value, file), file), _said(value))


def _kind(file: Path) -> Kind:
    with file.open("rb") as opened:
        start = opened.read(16)
    if start.startswith(b"PK\x03\x04"):
        names = [name.split("/", 1)[-1] for name in _zip_names(file)]
        if "data.pkl" not in names:
            raise UserError(f"{file} is a zip file, but none that PyTorch wrote: it has no data.pkl")
        return "torchscript" if "constants.pkl" in names else "pickle"
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"\x80"):
        return "pickle"
    raise UserError(f"{file} is no model: it is neither a safetensors nor a PyTorch file (damaged, or a download that failed?)")


def _zip_names(file: Path) -> list[str]:
    """Names of the entries, none of which is compressed: PyTorch stores data plainly, and small files cannot become large."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{file} is not a readable PyTorch file (damaged or cut short?): {error}") from None
    size = file.stat().st_size
    data = [entry for entry in entries if "/code/" not in entry.filename]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in data) or sum(e.file_size for e in data) > size:
        raise UserError(f"{file} is refused: its zip entries are compressed or overlap, which PyTorch's never are")
    return [entry.filename for entry in entries]


def _read_pickle(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} is refused: its pickle is damaged or holds more than tensors, and reading such objects can run code. "
            "Where you trust it, save its state_dict alone, best as safetensors"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # hostile bytes meet the unpickler with errors of many types
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{file} is not a readable PyTorch file (damaged or cut short?): {reason}") from None


def marked(tensors: Mapping[str, Tensor], **said: str) -> OrderedDict[str, Tensor]:
    """A state dict that says something of itself, where PyTorch keeps versions of modules: to others it stays a state dict."""
    state = OrderedDict(tensors)
    vars(state)["_metadata"] = {MARK: said}
    return state


def _said(value: Any) -> dict[str, str]:
    modules = getattr(value, "_metadata", None)
    said = modules.get(MARK) if isinstance(modules, Mapping) else None
    return {str(name): str(text) for name, text in said.items()} if isinstance(said, Mapping) else {}


def _unwrapped(value: Any, file: Path) -> dict[str, Any]:
    for name in WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(name), Mapping):
            value = value[name]
    if not isinstance(value, Mapping) or not value or not all(isinstance(name, str) for name in value):
        raise UserError(f"{file} is a PyTorch file, but holds no state dict (names with tensors)")
    prefix = "module."  # of torch's data-parallel wrappers
    wrapped = all(name.startswith(prefix) for name in value)
    return {name.removeprefix(prefix) if wrapped else name: tensor for name, tensor in value.items()}


def _checked(values: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The values, if all are plain tensors that have a number in memory for each of theirs, or single numbers."""
    tensors = {}
    for name, value in values.items():
        if isinstance(value, int | float):
            value = torch.tensor(value)
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(f"{file} is refused: {name} must be a dense tensor of real numbers, got a {type(value).__name__}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{file} is refused: {name} claims shape {tuple(value.shape)}, more than the file holds")
        tensors[name] = value.detach()
    if not tensors:
        raise UserError(f"{file} holds no tensors")
    return tensors


class _Scripted:
    """Stands for any object of a TorchScript class; its attributes are the pickle's."""


class _ScriptedUnpickler(pickle.Unpickler):
    """Reads `data.pkl` of a TorchScript archive: module attributes, tensors, numbers, strings, containers."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(root + "data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Scripted
        if module == "torch" and name in STORAGE_TYPES:
            return name
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        _, kind, key, _, count = pid
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            dtype = STORAGE_TYPES[kind]
            if len(data) != count * dtype.itemsize:
                raise ValueError(f"its data/{key} holds {len(data)} bytes, not {count} numbers")
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _rebuilt(storage: Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if math.prod(shape) > storage.numel():
        raise ValueError(f"a tensor claims shape {shape} with {storage.numel()} numbers")
    return storage.as_strided(shape, stride, offset)  # torch holds the last element against the storage


def _read_torchscript(file: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(file) as archive:
            data = next(name for name in archive.namelist() if name.split("/", 1)[-1] == "data.pkl")
            tree = _ScriptedUnpickler(archive, data.removesuffix("data.pkl")).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is refused: this TorchScript archive holds more than modules and tensors: {error}") from None
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{file} is not a readable TorchScript archive (damaged or cut short?): {reason}") from None
    tensors: dict[str, Tensor] = {}
    pending: list[tuple[str, Any]] = [("", tree)]
    seen: set[int] = set()
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, Tensor):
            tensors[prefix] = node
        elif isinstance(node, _Scripted) and id(node) not in seen:
            seen.add(id(node))
            pending += [(f"{prefix}.{name}" if prefix else name, value) for name, value in vars(node).items()]
    return tensors
