"""The one place, with server.model, that knows vLLM's import paths."""
