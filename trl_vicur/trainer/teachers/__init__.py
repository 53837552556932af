"""Teachers that score the student's completions: one class per kind, with one interface."""
