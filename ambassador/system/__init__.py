"""What the operating system offers: logs, processes, titles."""
