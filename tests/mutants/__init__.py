"""Whether the tests notice a fault: see __main__.py."""
