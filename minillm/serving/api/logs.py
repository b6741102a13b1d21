"""Structured logs: one JSON object per line, on standard error.

A request is one line: status, model, tokens, times, why its answers ended. What was asked and answered is in it only
with ``--log_content``; API keys never are.
"""

import json
import logging
import sys
import time

LOGGERS = ("minillm.serving", "uvicorn.error")


class JsonFormatter(logging.Formatter):
    """Writes a record as JSON; ``extra={"fields": {...}}`` of the call are its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. A line break in a message is an escape in it: nobody can forge a line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII: lone surrogates can be written too


def log_as_json(stream=None) -> None:
    """Write the server's log lines, and uvicorn's, as JSON to ``stream`` (default: standard error)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name.startswith("minillm") else logging.WARNING)
