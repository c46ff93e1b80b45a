"""The way in: who asks, what they mean by a name, how many are let in, what becomes of aliases meanwhile."""
