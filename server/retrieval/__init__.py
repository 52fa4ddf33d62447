"""The retrieval baselines: kNN-LM inside the step, passages in front of the prompt. Knows neither FastAPI nor vLLM."""
