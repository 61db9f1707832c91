"""A Docker Engine: its interface, and the client that implements it."""
