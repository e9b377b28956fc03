"""What every room of the package may use: files, tables, statistics, processes."""
