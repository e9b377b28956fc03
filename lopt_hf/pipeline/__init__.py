"""PPLL: a pipeline of local learners, one process per stage; only hidden states travel, and only forward."""
