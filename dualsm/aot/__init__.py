"""Ahead-of-time compilation of train steps for absent devices."""
