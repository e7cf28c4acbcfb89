"""References of gating by groups, its gradient, and replica choice."""
