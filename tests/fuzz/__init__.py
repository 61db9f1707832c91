"""What strangers can write, fed with nonsense: `doors.py` says what must hold, `mutate.py` makes the
nonsense, the corpus keeps the seeds and whatever was ever found."""
