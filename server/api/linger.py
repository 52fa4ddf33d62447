"""Closes connections so that the last answer arrives: to close a socket with unread bytes resets it, and the answer is lost."""

import asyncio
from typing import Any

LINGER_BYTES = 64 << 20
LINGER_SECONDS = 30
UNTAKEN_SECONDS = 120  # seconds after which a client that reads nothing from a full buffer is cut off


class LingeringTransport:
    """A transport whose `close`, while the client is still sending, ends the writing side alone; then it drops incoming bytes, up to a bound.

    It also ends a connection whose client reads nothing of its answers.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.inner, self.loop = transport, loop
        self.unread = False
        """Whether a request is still arriving."""
        self.deaf = False
        """Whether incoming bytes are dropped: no further request is answered."""
        self.dropped = 0
        """Bytes dropped so far."""
        self.ended = False
        """Whether the last answer is written."""
        self.closing: asyncio.TimerHandle | None = None
        self.untaken: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        """Pass everything else on to the transport."""
        return getattr(self.inner, name)

    def is_closing(self) -> bool:
        """Whether nothing more may be written."""
        return self.ended or self.inner.is_closing()

    def close(self) -> None:
        """Close, or end the answers and wait for the client to end too."""
        if self.is_closing():
            return
        self.deaf = self.ended = True
        if not self.unread:
            self.inner.close()
            return
        self.inner.resume_reading()
        if self.inner.can_write_eof():  # not over TLS
            self.inner.write_eof()
        self.closing = self.loop.call_later(LINGER_SECONDS, self.inner.abort)

    def deafen(self) -> None:
        """Drop all that comes from now on."""
        self.deaf = True

    def drop(self, size: int) -> bool:
        """Whether `size` bytes that have come are to be dropped. Over the bound the connection ends."""
        if self.deaf:
            self.dropped += size
            if self.dropped > LINGER_BYTES:
                self.inner.abort()
        return self.deaf

    def hurry(self) -> None:
        """Close at once if the last answer is written, without waiting for the client."""
        if self.ended:
            self.inner.close()

    def expect_reading(self) -> None:
        """The write buffer is full: end the connection unless the client reads a part of it within UNTAKEN_SECONDS, again and again."""
        self.reading_goes_on()
        self.untaken = self.loop.call_later(UNTAKEN_SECONDS, self._look, self.inner.get_write_buffer_size())

    def reading_goes_on(self) -> None:
        """The write buffer has room again: stop that timer."""
        if self.untaken is not None:
            self.untaken.cancel()
            self.untaken = None

    def lost(self) -> None:
        """The connection is gone: cancel its timers."""
        self.reading_goes_on()
        if self.closing is not None:
            self.closing.cancel()

    def _look(self, size: int) -> None:
        if self.inner.get_write_buffer_size() < size:
            self.expect_reading()
        else:
            self.inner.abort()
