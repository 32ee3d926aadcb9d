"""Optimizers and schedules: functions from `config.optimizer` to Optax transformations."""
