"""Pipeline schedules simulated from measured times, without a model."""
