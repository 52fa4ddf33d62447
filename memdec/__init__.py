"""Domain memories for any LLM on vLLM, picked per request.

The import names are `memdec.server` and `memdec.decoders`; the two links beside this file lead to the folders at the top of the repository.
"""
