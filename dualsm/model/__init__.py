"""The model: transformer, attention from key ranges, cross-entropy."""
