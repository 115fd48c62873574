"""Write log lines to stderr: as text if stderr is a terminal, else as JSON."""

from __future__ import annotations

import sys

import structlog


def log_to_stderr() -> None:
    """Configure structlog for this process: one line per event, with level and UTC time."""
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
