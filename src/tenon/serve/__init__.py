"""Many adapters, one base, one server: the engine's thread, which adapters are in the bank, text, OpenAI's HTTP."""
