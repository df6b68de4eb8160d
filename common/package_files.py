"""Files that ship with the code but are no code: weights, templates."""

import json
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import unquote, urlparse

from common.errors import ConfigError


def package_file(relative: str) -> Path:
    """Return the shipped file or folder at `relative`, as in `common/shipped/glyph-vit`.

    A Flower app bundle carries the code and leaves out all but source and settings; what it lacks
    is taken from the installed fedcopra.

    Raises:
        ConfigError: it is in neither place.
    """
    for root in _roots():
        if (root / relative).exists():
            return root / relative
    raise ConfigError(
        f"{relative} is not beside this code, and fedcopra is not installed here; install it"
    )


def _roots() -> Iterator[Path]:
    yield Path(__file__).parent.parent
    for found in distributions(name="fedcopra"):
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            yield Path(unquote(urlparse(origin["url"]).path))
        else:
            yield Path(str(found.locate_file("")))
