"""The benchmark: that it runs, and that what it says follows from its samples."""
