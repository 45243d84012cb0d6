"""The finished runs of a study, one file each: a study that was killed goes on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..common.output import write_json

__all__ = ["Journal"]


class Journal:
    """Records by what identifies them, in a folder.

    A record stays as it is until its file is deleted; what identifies it is in the file too.

    Args:
        folder: of the files; made with the first.

    Attributes:
        made: how many records were made by this object, not read.
    """

    def __init__(self, folder: Path) -> None:
        """Note the folder."""
        self.folder, self.made = folder, 0

    def path_of(self, kind: str, key: Mapping[str, Any]) -> Path:
        """Return the file of a record."""
        text = json.dumps(key, sort_keys=True)
        return self.folder / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def read(self, kind: str, key: Mapping[str, Any]) -> Any:
        """Return a record, or None if it is not there."""
        path = self.path_of(kind, key)
        return json.loads(path.read_text())["record"] if path.exists() else None

    def keep(self, kind: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Return a record; it is made and written if it is not there."""
        record = self.read(kind, key)
        if record is None:
            record = make()
            write_json(self.path_of(kind, key), {"key": key, "record": record})
            self.made += 1
        return record
