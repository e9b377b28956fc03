"""The methods of local learning: what each block learns from, and how far a gradient reaches."""
