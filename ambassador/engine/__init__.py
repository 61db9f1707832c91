"""How to reach and ask a Docker Engine."""
