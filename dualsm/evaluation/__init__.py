"""Evaluation of trained runs: scoring, zero-shot tasks, held-out text, lm-evaluation-harness."""
