"""A run as a page that explains itself: figures, tables, and where they come from. See ``python -m perf.report -h``."""
