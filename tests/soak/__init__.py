"""Hours of restarts, kills and daemon bounces under clients that check every byte: `make soak`."""
