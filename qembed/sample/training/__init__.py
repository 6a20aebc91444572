"""How the sample checkpoint was made: `corpus` → `student` → `distil`. Not needed to use it."""
