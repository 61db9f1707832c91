"""Long scenarios, each for some minutes: restarts, kills, crowds (`make soak`, docs/soak.md).

`make soak` collects tests/soak/test_*.py; `make test` does not.
"""
