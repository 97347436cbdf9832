"""Safetensors files read byte by byte and NVFP4 decoded in plain NumPy: independent of nibble and of PyTorch."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BLOCK = 16


def e4m3_table() -> np.ndarray:
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[byte & 127 == 127] = np.nan
    return np.where(byte < 128, magnitude, -magnitude).astype(np.float32)


E4M3 = e4m3_table()


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def numbers(self) -> np.ndarray:
        """The stored numbers; BF16 and F8_E4M3 widened to F32, which holds them exactly."""
        match self.dtype:
            case "BF16":
                flat = (np.frombuffer(self.data, "<u2").astype(np.uint32) << 16).view(np.float32)
            case "F8_E4M3":
                flat = E4M3[np.frombuffer(self.data, np.uint8)]
            case other:
                flat = np.frombuffer(self.data, {"F32": "<f4", "U8": "u1", "I64": "<i8"}[other])
        return flat.reshape(self.shape)


def read(file: Path) -> dict[str, Tensor]:
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), raw[start + begin : start + end])
    return tensors


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's files, which `model*.safetensors` are."""
    return {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in read(file).items()}


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensor.data for tensor in tensors.values()))


def dequantized(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Every weight of a ModelOpt export in F32, under the names of the BF16 layout.

    Linears are [out, in / 2], experts [E, in / 2, out]: the packed dimension is the second either way.
    """
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(("_scale", "_scale_2")):
            continue
        # A linear's scales replace the last part of `….weight`, an expert's are appended to its name.
        stem = name if name.endswith(".weight") else f"{name}_weight"
        if f"{stem}_scale" not in tensors:
            weights[name] = tensor.numbers()
            continue
        packed = tensor.numbers()
        codes = np.stack([packed & 15, packed >> 4], axis=2)
        codes = codes.reshape(packed.shape[0], 2 * packed.shape[1], *packed.shape[2:])
        scale = tensors[f"{stem}_scale"].numbers()
        scale_2 = tensors[f"{stem}_scale_2"].numbers()
        scale_2 = scale_2.reshape(scale_2.shape + (1,) * (scale.ndim - scale_2.ndim))
        weights[name] = E2M1[codes] * np.repeat(scale * scale_2, BLOCK, axis=1)
    return weights
