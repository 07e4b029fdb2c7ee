"""What the savings are worth: measurements side by side, in one run."""
