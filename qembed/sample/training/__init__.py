"""Training of the sample checkpoint: `corpus` → `student` → `distil`. Not needed to use it."""
