"""A run's result as a table, an HTML page and a model card."""
