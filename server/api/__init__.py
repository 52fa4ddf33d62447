"""HTTP: vLLM's OpenAI layer in a FastAPI app of our own."""
