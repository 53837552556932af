"""Reads, loads and saves dataset rows, and builds the teacher's prompt from a row."""
