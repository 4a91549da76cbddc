"""Datasets as interaction tables."""
