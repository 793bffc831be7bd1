"""Compressed keys: fewer numbers, and each of them on a grid."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DatastoreCorrupt, KeyOverflow, ShapeError
from ..tensors import Layout, create_tensors, open_tensors
from ._manifest import Manifest
from ._part import CODEC_FILE, Part

# Keys decoded with larger numbers would overflow where distances are computed, smaller steps where keys are encoded.
_LARGEST, _LEAST = 1e12, 1e-30


@dataclass(frozen=True, eq=False)
class Codec:
    """Turns keys of a model into codes, and codes into keys of a smaller space, in which distances are computed.

    A key x becomes z = (x - mean) · projection, whose columns are orthonormal, and the code of z is
    (z - offset) / step, rounded. A query is projected and not rounded. The distance between a query and a stored key
    is that of their projections. What both have outside the subspace is left out: of the query it would add the same
    number to the distances of all keys, which changes neither their order nor the weights of a softmax over them.

    Attributes:
        mean: float32, shape (key width,).
        projection: float32, shape (key width, width).
        offset: Middle of each number's grid, float32, shape (width,); zeros for float16.
        step: Width of its steps, positive, float32, shape (width,); ones for float16.
        key_dtype: Type of the codes: "int8", from -128 to 127, or "float16".
    """

    mean: Tensor
    projection: Tensor
    offset: Tensor
    step: Tensor
    key_dtype: str

    @property
    def key_width(self) -> int:
        """Numbers in a key of the model, and in a query."""
        return self.projection.shape[0]

    @property
    def width(self) -> int:
        """Numbers in a code."""
        return self.projection.shape[1]

    def project(self, keys: Tensor) -> Tensor:
        """Return keys or queries in the smaller space.

        Args:
            keys: Any float type, shape (n, key width).

        Returns:
            float32, shape (n, width).
        """
        return (keys.float() - self.mean) @ self.projection

    def encode(self, keys: Tensor) -> Tensor:
        """Return the codes of keys; numbers that lie outside their grid go to its nearest end.

        Args:
            keys: Any float type, shape (n, key width).

        Returns:
            int8 or float16, shape (n, width).

        Raises:
            KeyOverflow: A key is not finite, or overflows float16.
            ShapeError: Keys have another width.
        """
        if keys.ndim != 2 or keys.shape[1] != self.key_width:
            raise ShapeError(f"keys have shape {tuple(keys.shape)}; expected (n, {self.key_width})")
        codes = (self.project(keys.cpu()) - self.offset) / self.step
        if not codes.isfinite().all():
            raise KeyOverflow("the model gave keys that are NaN or infinite; check its weights and its dtype")
        if self.key_dtype == "int8":
            codes = codes.round().clamp(-128, 127)
        coded = codes.to(getattr(torch, self.key_dtype))
        if not coded.isfinite().all():
            raise KeyOverflow(f"keys up to {codes.abs().max():.3g} overflow float16; compress them to int8")
        return coded

    def decode(self, codes: Tensor) -> Tensor:
        """Return the keys that codes stand for, in the smaller space.

        Args:
            codes: int8 or float16, shape (n, width).

        Returns:
            float32, shape (n, width).
        """
        return torch.addcmul(self.offset, codes.float(), self.step)

    def write(self, folder: Path, name: str, keys: dict[str, object]) -> Part:
        """Write this as a new part; on any error nothing of it is left.

        Args:
            folder: Of all codecs.
            name: Of the part.
            keys: Type and width of the keys that it was fitted to, for the manifest.
        """
        try:
            (folder / name).mkdir(parents=True)
            tensors = {name: getattr(self, name) for name in _shapes(self.key_width, self.width)}
            layout: Layout = {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
            for name_, array in create_tensors(folder / name / CODEC_FILE, layout).items():
                array[:] = tensors[name_].numpy()
                if isinstance(array, np.memmap):
                    array.flush()
            return Part.describe(folder, name, {"keys": keys})
        except BaseException:
            shutil.rmtree(folder / name, ignore_errors=True)
            raise

    @classmethod
    def open(cls, folder: Path, part: Part, keys: dict[str, object], *, verify: bool) -> Codec:
        """Read a codec.

        Args:
            folder: Of all codecs.
            part: Which one.
            keys: Type and width of the codes, from the manifest.
            verify: Compare its file with its checksum; otherwise only with its size.

        Raises:
            DatastoreCorrupt: It is damaged, or another one than the manifest describes.
        """
        part.check(folder, contents=verify)
        file = folder / part.name / CODEC_FILE
        arrays = open_tensors(file)
        expected = _shapes(part.details["keys"]["width"], keys["width"])
        if {name: (array.dtype.name, array.shape) for name, array in arrays.items()} != {
            name: ("float32", shape) for name, shape in expected.items()
        }:
            raise DatastoreCorrupt(f"{file} holds other tensors than its manifest says; restore it from a copy")
        sound = all((np.abs(array) <= _LARGEST).all() for array in arrays.values()) and (arrays["step"] >= _LEAST).all()
        if not sound:
            raise DatastoreCorrupt(f"{file} holds numbers that cannot be; restore it from a copy")
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return cls(**tensors, key_dtype=str(keys["dtype"]))


def _shapes(key_width: object, width: object) -> dict[str, tuple[object, ...]]:
    """Return the shapes of a codec's tensors."""
    return {"mean": (key_width,), "projection": (key_width, width), "offset": (width,), "step": (width,)}


def open_codec(path: Path, manifest: Manifest) -> Codec | None:
    """Return the codec of a version, its file's size compared; None where keys are not compressed.

    Raises:
        DatastoreCorrupt: It is damaged.
    """
    if manifest.codec is None:
        return None
    return Codec.open(path / "codec", manifest.codec, manifest.keys, verify=False)
