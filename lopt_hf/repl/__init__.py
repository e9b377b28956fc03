"""RepL: layers of a pretrained model replaced by surrogates of their neighbours."""
