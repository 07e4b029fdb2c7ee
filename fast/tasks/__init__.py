"""Tasks to train and measure on."""
