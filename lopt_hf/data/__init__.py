"""Training data: loading and formatting for TRL, and word problems of our own making."""
