"""Results of a retention benchmark as a page, tables and plots."""
