"""Its server imports a module that is not among its dependencies."""
