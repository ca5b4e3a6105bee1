"""One scheme per layer within the budget: the problem, the integer program, cross terms, and the plan."""
