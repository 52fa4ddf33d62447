"""The spans of a request carry its mode and domain, and no other request's."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from memdec.server.engine import tracing


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What a tracer exports that vLLM has set up, after `install`."""
    provider, memory = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    tracing.install()
    return memory


def span(name: str) -> None:
    """Begin and end a span in one call, as vLLM does."""
    trace.get_tracer_provider().get_tracer("vllm").start_span(name).end()


def attributes(exporter: InMemorySpanExporter) -> dict[str, dict[str, object]]:
    """Name -> attributes of each span."""
    return {span.name: dict(span.attributes or {}) for span in exporter.get_finished_spans()}


def test_a_span_has_the_mode_and_domain_of_its_request(exporter: InMemorySpanExporter) -> None:
    """Those of the innermost request; a span outside of any has none."""
    with tracing.attributes_of(("decoder", "law")):
        span("first")
        with tracing.attributes_of(("knn", "biomed")):
            span("second")
        span("third")
    span("none")
    law = {"memdec.mode": "decoder", "memdec.domain": "law"}
    assert attributes(exporter) == {
        "first": law,
        "second": {"memdec.mode": "knn", "memdec.domain": "biomed"},
        "third": law,
        "none": {},
    }


def test_a_failure_ends_the_label(exporter: InMemorySpanExporter) -> None:
    """The next request's span doesn't carry the failed one's."""
    with pytest.raises(RuntimeError), tracing.attributes_of(("decoder", "law")):
        raise RuntimeError
    span("next")
    assert attributes(exporter) == {"next": {}}


def test_labels_are_of_one_context(exporter: InMemorySpanExporter) -> None:
    """Work elsewhere at the same time has none of them."""
    with tracing.attributes_of(("decoder", "law")), ThreadPoolExecutor(1) as pool:
        pool.submit(span, "elsewhere").result()
    assert attributes(exporter) == {"elsewhere": {}}


def test_without_a_tracer_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry's provider by default takes no processors."""
    monkeypatch.setattr(trace, "get_tracer_provider", trace.NoOpTracerProvider)
    tracing.install()
    with tracing.attributes_of(("decoder", "law")):
        span("dropped")
