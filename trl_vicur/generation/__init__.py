"""Ask a vision-language model for text."""
