"""Whether the model hub can be reached: its libraries try for a minute before they say so."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


def host() -> str:
    """Return the name of the hub's machine."""
    return urlsplit(constants.ENDPOINT).hostname or "the hub"


def in_reach() -> bool:
    """Return False where the name of the hub cannot be looked up."""
    if getproxies().keys() & {"http", "https", "all"}:  # then the proxy looks it up
        return True
    try:
        socket.getaddrinfo(host(), 443)
    except socket.gaierror:
        return False
    return True


def local_only(name: str | Path) -> dict[str, Any]:
    """Return arguments of transformers' from_pretrained that spare it a hub out of reach; none where it is in reach."""
    return {} if Path(name).exists() or in_reach() else {"local_files_only": True}
