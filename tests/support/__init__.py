"""What tests of every folder share. Each thing is here once."""
