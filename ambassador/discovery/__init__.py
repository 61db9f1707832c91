"""Where the targets are: sources that keep their `TargetState` values current."""
