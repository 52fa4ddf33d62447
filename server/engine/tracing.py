"""OpenTelemetry: mode and domain as attributes of vLLM's spans, of which there is one a request with --otlp-traces-endpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

MODE, DOMAIN = "memdec.mode", "memdec.domain"
_label: ContextVar[tuple[str, str] | None] = ContextVar("label", default=None)


class MemoryAttributes(SpanProcessor):
    """Adds the current request's label to every span that starts."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
        """vLLM makes its span and ends it in one call, so this is the only place to add to it."""
        if (label := _label.get()) is not None:
            span.set_attributes({MODE: label[0], DOMAIN: label[1]})


@contextmanager
def attributes_of(label: tuple[str, str]) -> Iterator[None]:
    """Spans that begin within have a request's mode and domain."""
    token = _label.set(label)
    try:
        yield
    finally:
        _label.reset(token)


def install() -> None:
    """Add the attributes to the tracer that vLLM has set up, if it has."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.add_span_processor(MemoryAttributes())
