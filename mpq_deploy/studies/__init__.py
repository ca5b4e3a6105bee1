"""Studies of a finished run: budgets swept, sensitivities audited."""
