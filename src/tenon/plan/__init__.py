"""Pure arithmetic from a recipe and facts to a Plan, or the reason why not."""
