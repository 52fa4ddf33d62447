"""The type of JSON whose entries only the reader knows."""

from typing import Any

JsonObject = dict[str, Any]
"""A JSON object: what a client has sent, or part of an answer. Whoever reads an entry checks it."""
