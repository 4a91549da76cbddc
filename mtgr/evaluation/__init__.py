"""How good the ranking is: metrics, their uncertainty, and the baselines to beat."""
