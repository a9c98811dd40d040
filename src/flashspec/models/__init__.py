"""Networks that score tokens."""
