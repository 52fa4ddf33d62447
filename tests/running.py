"""Wait for a process that says in its log when it is ready."""

import subprocess
import time
from pathlib import Path

READY = "memdec is ready"


def wait_until_ready(process: "subprocess.Popen[bytes]", log: Path, seconds: float = 240, says: str = READY, times: int = 1) -> None:
    """Return when the log holds `says` so many times; otherwise end the process and raise RuntimeError with the log's end."""
    deadline = time.monotonic() + seconds
    while log.read_text(errors="replace").count(says) < times:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"not ready:\n{log.read_text(errors='replace')[-6000:]}")
        time.sleep(0.5)
