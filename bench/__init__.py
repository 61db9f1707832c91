"""The benchmark: every row against every peer and against no relay at all. See README.md."""
