"""What the savings of `fast` are to be measured against."""
