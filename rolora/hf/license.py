"""Under which licence a base model is, where its card is on this machine."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import yaml


def license_of(name: str) -> str | None:
    """The licence that the card of a folder, or of a hub model in the cache, names; None where
    there is no card, or it says none.
    """
    path: str | Path | None = Path(name) / "README.md"
    if not Path(name).is_dir():
        found = huggingface_hub.try_to_load_from_cache(name, "README.md")
        path = found if isinstance(found, str) else None
    if path is None or not Path(path).is_file():
        return None
    try:
        said = (huggingface_hub.metadata_load(path) or {}).get("license")
    except (ValueError, OSError, AttributeError, yaml.YAMLError):
        return None
    return said if isinstance(said, str) and said else None
