"""The log as JSON: one object a line on stdout, and one line for every request. What vLLM writes has the same fields."""

import logging
from logging.config import dictConfig

FIELDS = "%(asctime)s %(levelname)s %(name)s %(processName)s %(process)d %(message)s"  # those of vLLM's own JSON format
MEMDEC = logging.getLogger("memdec")
REQUESTS = logging.getLogger("memdec.requests")


def write_json() -> None:
    """Send everything that this process logs, warnings included, to stdout as JSON."""
    dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": "pythonjsonlogger.json.JsonFormatter", "fmt": FIELDS}},
            "handlers": {"stdout": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}},
            "root": {"handlers": ["stdout"], "level": "WARNING"},
            "loggers": {name: {"level": "INFO"} for name in (MEMDEC.name, "uvicorn")},
        }
    )
    logging.captureWarnings(True)
