"""Evaluation: validation during training, scoring of a trained model."""
