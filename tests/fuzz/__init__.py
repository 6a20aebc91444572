"""Random inputs for all readers of untrusted data. `make fuzz` runs them for an hour, the tests for a minute."""
