"""Its clients do what an app should not."""
