"""Folders of results: what is in them, and that they appear whole or not at all."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import ConfigError

FORMAT = 2
# Below a comparison: the runs that settings were chosen by.
CHOOSING = "choosing"
RECORD, SERVED, REPORT = "record.json", "served.safetensors", "report.html"
UPDATES = "updates.safetensors"


def write_json(file: Path, content: Any) -> None:
    """Write JSON that a person can read; what is NaN or infinite becomes null."""
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def _finite(content: Any) -> Any:
    """Replace numbers that JSON does not have, as a run that diverged leaves them."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def refuse_existing(folder: Path) -> None:
    """Raise `ConfigError` if `folder` exists: a run never overwrites another."""
    if folder.exists():
        raise ConfigError(f"{folder} exists; remove it, or say --out OTHER_FOLDER")


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `folder` only if all goes well."""
    refuse_existing(folder)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def continued(folder: Path) -> Iterator[Path]:
    """Give the folder that a study is written into; it becomes `folder` once all is there."""
    refuse_existing(folder)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        yield unfinished
    except BaseException:
        if not any(unfinished.rglob(RECORD)):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unfinished.rename(folder)
