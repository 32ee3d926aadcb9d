"""Data: tokenizer, corpus, the order of rows, batches by step."""
