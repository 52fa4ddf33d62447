"""`memdec evaluate`: memory decoders against retrieval and fine-tuning, all tuned on the same validation split."""
