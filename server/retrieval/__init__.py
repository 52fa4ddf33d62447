"""The retrieval baselines: kNN-LM inside the step, passages in front of the prompt. Imports neither FastAPI nor vLLM."""
