"""Rows of a dataset: reading, loading and saving them, and the teacher's view of a row."""
