"""Data: from text to a corpus, and from a corpus to batches of packed sequences."""
