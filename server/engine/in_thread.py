"""Work in a thread that nobody has to wait for."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(function: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
    """Call a function in a daemon thread; the future holds what it returns or raises.

    asyncio.to_thread's threads are waited for when the process ends, and there are few: one that reads from a disk that hangs would hold up the
    exit, and a few of them everybody else. Whoever gives up waiting leaves this one to itself.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            outcome(value)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (future.set_result, function(*args))
        except BaseException as error:
            outcome = (future.set_exception, error if isinstance(error, Exception) else RuntimeError(repr(error)))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name=function.__name__, daemon=True).start()
    return future
