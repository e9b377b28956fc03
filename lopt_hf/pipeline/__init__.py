"""PPLL: a pipeline in which no stage waits for a gradient of its step, one process per stage."""
