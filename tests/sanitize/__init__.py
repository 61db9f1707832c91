"""What runs only under the sanitizers: see __main__.py."""
