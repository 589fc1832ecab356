"""What test modules share: cases, formulas, bounds, worlds with known answers, helpers."""
