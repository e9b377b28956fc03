"""Local learning as such: blocks, boundaries, objectives and methods, which know no trainer."""
