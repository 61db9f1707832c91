"""What runs only under the sanitizers: see scripts/sanitize.py."""
