"""Work in a thread that nobody has to wait for."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[T]":
    """Call a function in a daemon thread; the future holds what it returns or raises.

    asyncio.to_thread's threads are waited for when the process ends, and there are few: one that reads from a disk that hangs would hold up the
    exit, and a few of them everybody else. Whoever gives up waiting leaves this one to itself.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[], None]) -> None:
        if not future.done():
            outcome()

    def run() -> None:
        try:
            outcome = partial(future.set_result, function(*args, **kwargs))
        except BaseException as error:
            outcome = partial(future.set_exception, error if isinstance(error, Exception) else RuntimeError(repr(error)))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name=function.__name__, daemon=True).start()
    return future
