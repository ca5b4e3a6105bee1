"""One scheme per layer within the budget: problem, integer program, cross terms, plan."""
