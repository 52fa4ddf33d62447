"""uvicorn's HTTP protocol with limits on what comes before the body, which has none there: a header of any size, sent in any time."""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from memdec.server.errors import HeadersTooLarge, HeadersTooSlow, MemdecError

HEAD_BYTES = 64 << 10
HEAD_SECONDS = 30


class BoundedHttp(HttpToolsProtocol):
    """Answers 431 and 408 itself, and closes the connection; nothing of such a request reaches the app."""

    in_head = True
    seen = 0
    """Bytes of a head that isn't complete."""
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A first request is awaited; between requests uvicorn's keep-alive has its own time."""
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """The head is complete: hand the request to the app, if it isn't too large."""
        self.in_head, self.seen = False, 0
        self._stop_timer()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self._refuse(HeadersTooLarge(f"The request's headers are over {HEAD_BYTES:,} bytes."))
        elif not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A refused request's body is nobody's."""
        if self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """As above."""
        if self.cycle is not None:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """A head that never ends is refused before it has filled the memory."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self.seen += len(data) if self.in_head else 0
        if self.in_head and self.seen > HEAD_BYTES and not self.transport.is_closing():
            self._refuse(HeadersTooLarge(f"The request's headers are over {HEAD_BYTES:,} bytes."))

    def connection_lost(self, exc: Exception | None) -> None:
        """The timer goes with the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self.in_head, self.seen = True, 0
        self._stop_timer()
        self.timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _too_slow(self) -> None:
        if self.seen or self.cycle is not None:
            self._refuse(HeadersTooSlow(f"The request's headers did not arrive within {HEAD_SECONDS} seconds."))
        else:
            self.transport.close()  # who has said nothing gets no answer

    def _refuse(self, error: MemdecError) -> None:
        status, body = HTTPStatus(error.status), error.to_json().encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
