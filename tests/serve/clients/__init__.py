"""Programs that speak to a server as its users' clients do, each in an environment of its own."""
