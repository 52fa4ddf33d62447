"""`memdec evaluate`: memory decoders against retrieval and fine-tuning, everybody tuned on the same validation split."""
