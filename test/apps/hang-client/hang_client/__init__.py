"""Its client app never answers for one partition."""
