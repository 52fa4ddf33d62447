"""uvicorn's HTTP protocol with limits on heads, chunk lengths and trailers, and with early answers that a client still sending can read."""

import asyncio
from http import HTTPStatus

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from memdec.server.api.linger import LingeringTransport
from memdec.server.errors import HeadersTooLarge, HeadersTooSlow, MemdecError, RequestError

HEAD_BYTES = 64 << 10
HEAD_SECONDS = 30
FRAME = 16  # bytes of framing that each piece of a body may bring: a chunk's length and line ends
PIECE = 16 << 10  # bytes parsed at once: a limit may be exceeded by this much before it is noticed
UPGRADING = (b"connection", b"upgrade", b"http2-settings")
PIPELINED = 16  # requests that may wait for the answers before theirs


class BoundedHttp(HttpToolsProtocol):
    """Answers 400, 408 and 431 itself, and closes the connection; nothing of such a request reaches the app.

    A request that is answered before it is complete is its connection's last, and what still comes of it is dropped.
    """

    transport: LingeringTransport  # type: ignore[assignment]
    in_body = False
    """Whether the body is being read: true from the end of the head, which makes the request's `cycle`, to the last byte."""
    beside = 0
    """Bytes other than body since the last request: blank lines, head, chunk lengths, trailers."""
    keeps = True
    """Whether the connection may outlive the request that is being read."""
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit for the first request's head."""
        super().connection_made(LingeringTransport(transport, self.loop))  # type: ignore[arg-type]
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Parse piece by piece, so that whatever is too large is refused before it has filled the memory."""
        if self.transport.drop(len(data)):
            return
        if not self.in_body and not self._answering():
            self._await_head()
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self.beside += len(piece)
            self._parse(piece)
            if self.transport.deaf:
                return
            if self.beside > HEAD_BYTES:
                self._refuse_size("trailers, or what comes between its chunks," if self.in_body else "headers")

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self.transport.unread = True
        if len(self.pipeline) >= PIPELINED:
            self.transport.deafen()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. Trailers are dropped: no check of headers has seen them."""
        if not self.in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete: hand the request to the app, if it isn't too large. Until its body is here too, an answer ends the connection."""
        self.beside = 0
        self._stop_timer()
        if self.transport.deaf or self._would_upgrade():
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self._refuse_size("headers")
            return
        super().on_headers_complete()
        self.in_body = True
        self.keeps, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body; that of a refused request is dropped."""
        self.beside = max(0, self.beside - len(body) - FRAME)
        if not self.transport.deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self.transport.deaf or self._would_upgrade():
            return
        self.in_body, self.transport.unread, self.beside = False, False, 0
        if not self.cycle.response_started:
            self.cycle.keep_alive = self.keeps
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is complete: start the time limit of a pipelined request that has begun to arrive, or close the connection."""
        super().on_response_complete()
        if self._answering():
            return
        if self.transport.deaf:
            self.transport.close()
        elif self.transport.unread or self.beside:
            self._await_head()

    def pause_writing(self) -> None:
        """The write buffer is full: the client reads slower than it is sent."""
        super().pause_writing()
        self.transport.expect_reading()

    def resume_writing(self) -> None:
        """The write buffer has room again."""
        super().resume_writing()
        self.transport.reading_goes_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed: cancel its timers."""
        self._stop_timer()
        self.transport.lost()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server shuts down: don't wait for clients that have been answered."""
        self.keeps = False
        super().shutdown()
        self.transport.hurry()

    def _would_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_upgrade(self) -> bytes:
        kept = [name + b": " + value for name, value in self.headers if name not in UPGRADING]
        version = b"HTTP/" + self.parser.get_http_version().encode()
        lines = [b" ".join((self.parser.get_method(), self.url, version)), *kept, b"connection: close", b"", b""]
        return b"\r\n".join(lines)

    def _parse(self, piece: bytes) -> None:
        """Feed the parser. It takes a wish to upgrade for a request without a body, so that such a head is fed again without the wish."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            if not self._would_upgrade():
                self.transport.deafen()
                return
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self._parse(head + piece[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(RequestError("The request is not HTTP/1.1."))

    def _answering(self) -> bool:
        """Whether an answer is due or under way to a request before the one that is being read."""
        return bool(self.pipeline) or (not self.in_body and self.cycle is not None and not self.cycle.response_complete)

    def _await_head(self) -> None:
        if self.timer is None:
            self.timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _too_slow(self) -> None:
        if self.transport.unread:
            self._refuse(HeadersTooSlow(f"The request's headers did not arrive within {HEAD_SECONDS} seconds."))
        else:
            self.transport.close()  # a client that has sent nothing, or blank lines alone, gets no answer

    def _refuse_size(self, part: str) -> None:
        self._refuse(HeadersTooLarge(f"The request's {part} are over {HEAD_BYTES:,} bytes."))

    def _refuse(self, error: MemdecError) -> None:
        """Answer in the app's place and close; while an answer to an earlier request is under way, close after that one, without an answer of its own."""
        if self.transport.deaf:
            return
        self.transport.unread = True  # what still arrives is unknown
        if self._answering():
            self.transport.deafen()
            if self.in_body:
                self.pipeline.popleft()
            return
        if self.in_body:  # the app waits for the rest, in vain
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not self.in_body or not self.cycle.response_started:
            self.transport.write(as_http(error))
        self.transport.close()


def as_http(error: MemdecError) -> bytes:
    """An error as a complete HTTP response, the connection's last."""
    status, body = HTTPStatus(error.status), error.to_json().encode()
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
