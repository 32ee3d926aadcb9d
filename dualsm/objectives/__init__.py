"""Objectives: pure functions that turn a packed row into an example."""
