"""vLLM as whoever makes the sequences: a process of its own in an environment of its own. No torch here."""
