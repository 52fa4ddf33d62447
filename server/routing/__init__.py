"""From what a client sent to which decoder, mode and lambda the request gets. Knows neither FastAPI nor vLLM."""
