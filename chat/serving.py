"""Serve the page of ``trimtab chat``: Gradio itself, the address, and who can reach it."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

from trimtab.axis.addresses import is_this_machine
from trimtab.axis.errors import UserError

log = logging.getLogger("trimtab")

STYLE = Path(__file__).with_name("page.css")
FIRST_PORT = 7860  # the port that Gradio pages are known by; the next free one is taken


def import_gradio() -> Any:
    """Gradio, which is an extra, with its telemetry off.

    Raises:
        UserError: if it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError("the page needs Gradio", remedy='pip install "trimtab[chat]"') from error
    return gradio


def check_address(host: str, port: int | None) -> None:
    """Try the address: for one that this machine hasn't, Gradio would try a hundred ports, five seconds each.

    Raises:
        UserError: if it can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            tried.bind((address[0], port or 0, *address[2:]))
    except (OSError, OverflowError) as error:  # OverflowError: a port beyond 65535, which getaddrinfo wraps around
        raise _unavailable(host, port) from error


def _unavailable(host: str, port: int | None) -> UserError:
    place = f"{host}, port {port}" if port is not None else f"{host}, port {FIRST_PORT} or one of the next"
    return UserError(
        f"the page can't be served at {place}",
        key="--host" if port is None else "--port",
        remedy="choose a port that is free, and an address of this machine",
    )


def stays_here(host: str) -> bool:
    """Whether only this machine reaches an address."""
    bare = host.strip("[]")
    return is_this_machine(f"//[{bare}]" if ":" in bare else f"//{bare}")


def serve(page: Any, host: str, port: int | None, *, browser: bool) -> None:
    """Serve the page until it is interrupted.

    Args:
        page: of :func:`trimtab.chat.page.build_page`.
        host: address.
        port: None for the first free one from 7860 on.
        browser: open it in the browser.

    Raises:
        UserError: if the address can't be had.
    """
    gr = import_gradio()
    # Gradio asks its own address whether it is up, which must not go through a proxy.
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = ",".join(filter(None, [excepted, "127.0.0.1", "localhost", host]))
    # fonts of the system: nothing is fetched
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", **fonts)
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True,
            share=False, enable_monitoring=False, run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
            footer_links=[], theme=theme, css_paths=[STYLE],
        )  # fmt: skip
    except OSError as error:
        raise _unavailable(host, port) from error
    if not stays_here(host):
        log.warning("the page is served at %s: other machines can open it", host)
    print(f"page: {url}   (Ctrl+C ends it)", flush=True)
    page.block_thread()
