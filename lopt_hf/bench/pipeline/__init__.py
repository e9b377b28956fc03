"""`lopt-hf bench pipeline`: PPLL beside one process and beside torch's own schedules, on the same batches."""
