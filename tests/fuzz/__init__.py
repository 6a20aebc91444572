"""Random inputs for everything that reads what strangers wrote. `make fuzz` runs it for an hour, the tests for a minute."""
