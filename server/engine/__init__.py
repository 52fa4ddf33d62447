"""The one place, with memdec.server.model, that knows vLLM's import paths."""
