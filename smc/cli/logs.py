"""What the libraries log while a command runs: on standard error, because standard output is data."""

from __future__ import annotations

import logging
import sys


def to_stderr(level: int = logging.WARNING) -> None:
    """Let events of this level and above through."""
    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
    )
