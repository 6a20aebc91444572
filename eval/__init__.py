"""What INT4 costs, against FP16."""
