"""Logging of every command and entry script: plain lines or JSON lines on standard error."""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys

from trimtab.axis.progress import set_quiet

JSON_LOGS = "TRIMTAB_JSON_LOGS"


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def json_logs_asked() -> bool:
    """Whether logs are JSON lines in this process and those it starts."""
    return os.environ.get(JSON_LOGS) == "1"


def setup_logging(*, quiet: bool = False, json_logs: bool = False, main_process: bool = True) -> None:
    """Log to standard error; the choice of JSON lines is handed to child processes through the environment.

    Args:
        quiet: only warnings and errors, and no progress bars.
        json_logs: JSON lines instead of text, and no progress bars.
        main_process: False on ranks other than 0, which only warn and draw no bars.
    """
    if json_logs:
        os.environ[JSON_LOGS] = "1"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if json_logs_asked() else logging.Formatter("%(message)s"))
    logger = logging.getLogger("trimtab")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet or not main_process else logging.INFO)
    set_quiet(quiet or json_logs_asked() or not main_process)
