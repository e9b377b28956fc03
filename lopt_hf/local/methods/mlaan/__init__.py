"""MLAAN: windows of blocks inside which gradients flow, and auxiliaries that leap to deeper layers."""
