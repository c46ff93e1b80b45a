"""What a user can do, as plain functions."""
