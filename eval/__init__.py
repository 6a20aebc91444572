"""`qembed eval`: what INT4 costs compared with FP16."""
