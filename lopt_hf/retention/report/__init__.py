"""What a retention benchmark found, as a page, tables and plots."""
