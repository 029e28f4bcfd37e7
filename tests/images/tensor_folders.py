"""Folders of tensors of every kind of file, in class folders, and networks that take them."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

NETWORKS = """
import torch
from torch import nn

class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)

def made(conv, n):
    torch.manual_seed(0)
    layers = (conv(n, 4, 3), nn.ReLU(), conv(4, 4, 3), nn.ReLU(), Mean(), nn.Linear(4, 3))
    return nn.Sequential(*layers).eval()
"""
CODE = f"""{NETWORKS}
def unscaled(tensor):
    assert tensor.dtype == torch.uint16
    return tensor.float() / 1000 - 8

def npy():
    return made(nn.Conv1d, 2)
def pt():
    return made(nn.Conv3d, 1)
def safetensors():
    return made(nn.Conv2d, 6)
def tif():
    return made(nn.Conv2d, 6), unscaled
"""
SHAPES = {"npy": (2, 64), "pt": (1, 6, 8, 7), "safetensors": (6, 9, 8), "tif": (6, 9, 8)}
CLASSES = ("ant", "bee", "cow")


def save(path, tensor):
    """Write a file of the kind that its name says."""
    kind = path.suffix[1:]
    if kind == "npy":
        np.save(path, tensor.numpy())
    elif kind == "pt":
        torch.save(tensor, path)
    elif kind == "safetensors":
        save_file({"one": tensor}, path)
    else:
        save_tiff(path, ((tensor + 8) * 1000).round().clamp(0, 65535).numpy().astype(np.uint16))


def save_tiff(path, bands, **options):
    """Write bands (C, H, W) as samples of one page, as most programs for satellites do."""
    tifffile = pytest.importorskip("tifffile", reason="needs .[tiff]")
    usual = {"photometric": "minisblack", "planarconfig": "separate"}
    tifffile.imwrite(path, bands, **(options or usual))


def write(root, kind, n):
    """So many tensors of each class: a pattern of the class's, and noise."""
    known = torch.Generator().manual_seed(1)
    patterns = torch.randn(3, *SHAPES[kind], generator=known)
    noise = torch.Generator().manual_seed(n)
    for pattern, name in zip(patterns, CLASSES, strict=True):
        (root / name).mkdir(parents=True)
        for k in range(n):
            drawn = torch.randn(SHAPES[kind], generator=noise)
            save(root / name / f"{k}.{kind}", pattern + drawn / 3)
    return root
