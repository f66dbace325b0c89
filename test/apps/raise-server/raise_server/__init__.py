"""Its server app raises at once or at the beginning of round raise-at."""
