"""An endpoint's address and the name of the variable with its key: what may stand there, told without showing a secret."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import SplitResult, urlsplit

HOW = "give it with http:// or https://, up to and without /chat/completions"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
KEY_LENGTH = 20  # names of variables that long are there, but not of small letters and digits mixed
LOCAL_NAMES = (".localhost", ".local", ".internal")


def address_fault(address: str) -> tuple[str, str] | None:
    """What is wrong with an endpoint's address, and the remedy; None if nothing is.

    The address itself is shown only where it can hold no password and no key.
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return "is no address", HOW
    if "@" in (parts.netloc or address):
        return (
            "holds a user name or a password, which would be written down",
            "leave them out; a key goes into an environment variable, whose name is api_key_env",
        )
    if parts.query or parts.fragment:
        return "holds more than an address (? or #), which may be a key and would be written down", HOW
    if not address.isprintable() or " " in address or not _has_host(parts) or port == 0:
        return f"{address!r} is no address", HOW
    if parts.path.rstrip("/").endswith("/chat/completions"):
        return f"{address!r} goes too far", HOW
    return None


def _has_host(parts: SplitResult) -> bool:
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def key_name_fault(name: str) -> tuple[str, str] | None:
    """What is wrong with the name of the variable that holds a key, and the remedy; None if nothing is. Never shows it."""
    remedy = "export the key in a variable, and write the variable's name here, such as OPENAI_API_KEY"
    if NAME.fullmatch(name) is None:
        return "is no name of an environment variable (not shown, as it may be a key)", remedy
    mixed = re.search("[a-z]", name) and re.search("[0-9]", name)
    if len(name) >= KEY_LENGTH and mixed and name not in os.environ:
        return "looks like a key in the place of a variable's name (not shown)", remedy
    return None


def is_local(address: str) -> bool:
    """Whether an address lies on this machine or in a private network, where servers mostly want no key."""
    host = urlsplit(address).hostname or ""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(LOCAL_NAMES)
    return found.is_private or found.is_loopback or found.is_link_local


def is_this_machine(address: str) -> bool:
    """Whether an address is a loopback one, which no proxy can reach."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
