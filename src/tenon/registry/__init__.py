"""Adapter versions with their lineage: files and hashes, no tensors."""
