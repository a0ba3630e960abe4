"""The names of the kernels that are launched through CuPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lars_array.kernels.cuda.device import Device

__all__ = ["noted_launches"]


def noted_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the launches of kernels that are made from now on add their names."""
    seen: list[str] = []
    launcher = Device.launcher

    def noting(self: Any, name: str, *arguments: Any) -> Callable[[], None]:
        launch = launcher(self, name, *arguments)

        def noted() -> None:
            seen.append(name)
            launch()

        return noted

    monkeypatch.setattr(Device, "launcher", noting)
    return seen
