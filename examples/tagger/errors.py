"""Errors that end a run with one line for the user."""

from __future__ import annotations

import importlib


class UserError(Exception):
    """A one-line message for the user; `code` is the exit status."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def require(*packages: str) -> None:
    """Raises UserError with the command to run unless the packages can be imported."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise UserError(f"{' and '.join(missing)} not found: pip install {' '.join(missing)}")
