"""Its server app exits before it asks any client."""
