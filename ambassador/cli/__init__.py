"""The command line: reads it, wires the objects, runs them."""
