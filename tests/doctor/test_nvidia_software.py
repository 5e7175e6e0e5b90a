"""Tests of the description of NVIDIA software."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from ringattn.doctor import nvidia

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (user@host)\nGCC version:\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\n"


@pytest.mark.parametrize("text,version", [(OPEN, "580.159.04"), (CLOSED, "535.54.03"), ("nothing", None)])
def test_the_driver_is_read_from_the_kernel(tmp_path: Path, text: str, version: str | None) -> None:
    path = tmp_path / "version"
    path.write_text(text)
    assert nvidia.driver(path) == version
    assert nvidia.driver(tmp_path / "missing") is None


@pytest.mark.parametrize(
    "installed,expected",
    [
        ({"mlx-cuda-13": "0.32.4", "nvidia-nccl-cu13": "2.28.9"}, "driver 1.2, mlx-cuda-13 0.32.4, NCCL 2.28.9"),
        ({}, "driver 1.2, no mlx-cuda wheel, no NCCL wheel"),
    ],
)
def test_the_description_names_driver_wheel_and_nccl(monkeypatch, installed: dict[str, str], expected: str) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(nvidia, "version", version)
    monkeypatch.setattr(nvidia, "driver", lambda: "1.2")
    assert nvidia.description() == expected
