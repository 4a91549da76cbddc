"""Exports: checkpoint -> complete, checked model directories in a Triton model repository."""
