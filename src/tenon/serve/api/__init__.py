"""OpenAI's API: bodies read and written, text to sequences and back. It does not know who makes the sequences."""
