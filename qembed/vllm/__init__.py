"""Running vLLM: settings, memory plan (plan.py), arguments, and a supervised process (supervisor.py)."""
