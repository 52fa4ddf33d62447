"""Programs that some tests use. Where CI is to have them they must be there: a test that skips tests nothing."""

import os
import shutil

import pytest


def needs(program: str, hint: str, found: str | None = None) -> pytest.MarkDecorator:
    """A mark that skips where `program` is missing, but not under CI=true: there the test runs, and fails. `found`: its path, where it isn't on PATH."""
    there = bool(found or shutil.which(program))
    return pytest.mark.skipif(not there and not os.environ.get("CI"), reason=f"needs {program} ({hint})")
