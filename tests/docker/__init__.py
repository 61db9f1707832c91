"""Tests against a real Docker Engine. A package, and inside one, so that `docker` stays docker-py."""
