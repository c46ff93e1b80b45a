"""Parse, call the service, print."""
