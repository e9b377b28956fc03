"""Image classifiers in a pipeline: a stage's part of one, and its trainer."""
