"""What Docker says of the targets, as TargetState values."""
