"""Its clients sleep before every answer to fit."""
