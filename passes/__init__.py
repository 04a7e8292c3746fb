"""The passes: one folder per family, recipes, and the manager that checks the contract of each."""
