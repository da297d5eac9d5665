"""What names and algorithms of tinc may be, in the configuration of a node and in the blocks that nodes hand each other."""

from __future__ import annotations

import ipaddress
import re

NAME = re.compile(r"[A-Za-z0-9_]{1,60}")
"""The name of a node: what tinc takes for one (``check_id`` in utils.c of 1.0.36), and no longer than a file's name may be."""

CIPHERS = ("aes-256-cbc", "aes-192-cbc", "aes-128-cbc")
DIGESTS = ("sha256", "sha384", "sha512")

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


def is_host(text: str) -> bool:
    """Whether this is an IP address without a zone, or may be the name of a host."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        # all digits and points is a mistyped address
        return bool(_HOST.fullmatch(text)) and not re.fullmatch(r"[0-9.]+", text)
    return "%" not in text
