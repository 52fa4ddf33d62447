"""What runs inside the vLLM worker: the base, the memory tower beside it, and the mixing of their distributions."""
