"""Mixed precision: what each linear costs at each width, and the choice of widths under a budget, solved exactly."""
