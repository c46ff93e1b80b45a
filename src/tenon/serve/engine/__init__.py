"""The engine's thread: jobs in, tokens out, adapters in and out of the bank. It knows no text and no HTTP."""
