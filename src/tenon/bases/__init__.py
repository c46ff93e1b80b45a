"""A base model found, identified and described, without loading a tensor."""
