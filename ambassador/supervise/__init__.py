"""The parent's side: listeners, workers and the loop that keeps them as desired."""
